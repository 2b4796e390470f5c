"""The parameter structs of Python and of the kernels are the same, byte for byte."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

from kvcore_gpu import params

KERNELS = Path(params.__file__).parent / "kernels"

HEADER = (KERNELS / "params.cuh").read_text()
# The sizes that device.cuh gives its types.
TYPES = "using u8 = unsigned char; using s32 = int; using s64 = long long;"


def structs() -> list[type[ctypes.Structure]]:
    found = [value for value in vars(params).values() if isinstance(value, type)]
    return [s for s in found if issubclass(s, ctypes.Structure) and hasattr(s, "_fields_")]


def assertions(struct: type[ctypes.Structure]) -> list[str]:
    name = struct.__name__
    lines = [f'static_assert(sizeof({name}) == {ctypes.sizeof(struct)}, "{name}");']
    for field, _ in struct._fields_:
        place = getattr(struct, field)
        member = f"{name}::{field}"
        lines.append(
            f"static_assert(offsetof({name}, {field}) == {place.offset} && "
            f'sizeof({member}) == {place.size}, "{member}");'
        )
    return lines


def compile_with(lines: list[str]) -> subprocess.CompletedProcess[str]:
    structs_alone = re.sub(r"#(?:include|pragma) .*", "", HEADER)
    return subprocess.run(
        ["g++", "-std=c++17", "-fsyntax-only", "-x", "c++", "-"],
        input="\n".join(["#include <cstddef>", TYPES, structs_alone, *lines]),
        capture_output=True,
        text=True,
    )


def test_offsets_and_sizes_are_equal():
    lines = [line for struct in structs() for line in assertions(struct)]
    result = compile_with(lines)
    assert result.returncode == 0, result.stderr


def test_a_difference_would_show():
    result = compile_with(["static_assert(offsetof(Plan, max_new) == 4);"])
    assert result.returncode != 0
    assert "static assertion failed" in result.stderr


def test_every_struct_of_the_header_is_there():
    names = re.findall(r"^struct (\w+)", HEADER, re.MULTILINE)
    assert names == [struct.__name__ for struct in structs()]


@pytest.mark.parametrize(
    "struct", [s for s in structs() if issubclass(s, params.Params)], ids=lambda s: s.__name__
)
def test_the_driver_finds_the_struct(struct):
    made = struct()
    pointer = ctypes.c_void_p.from_address(made.arguments)
    assert pointer.value == ctypes.addressof(made)
    assert bytes(made) == bytes(ctypes.sizeof(struct))
    assert ctypes.sizeof(struct) <= 4096  # what a kernel's parameters may take
