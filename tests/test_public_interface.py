"""The public names: documented in Python, exported by the library, declared alike everywhere."""

from __future__ import annotations

import ctypes
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kvcore
from kvcore._native.blocks import status_table
from kvcore.errors import STATUS_EXCEPTIONS

HEADER = Path(kvcore.get_include()) / "kvcore" / "kvcore.h"
CAPI = Path(kvcore.__file__).parent / "_native" / "capi.pxd"
LIBRARY = Path(kvcore.get_library_dir()) / (
    "libkvcore.dylib" if sys.platform == "darwin" else "libkvcore.so"
)


def declared_in_header() -> set[str]:
    text = re.sub(r"/\*.*?\*/", " ", HEADER.read_text(), flags=re.DOTALL)
    functions = set(re.findall(r"KV_API\b[^;(]*?\b(kv_\w+)\s*\(", text))
    assert len(functions) > 40
    return functions


def test_library_exports_what_the_header_declares() -> None:
    library = ctypes.CDLL(str(LIBRARY))
    assert [name for name in sorted(declared_in_header()) if not hasattr(library, name)] == []


def test_library_exports_nothing_else() -> None:
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    flags = ["-gU"] if sys.platform == "darwin" else ["-D", "--defined-only"]
    symbols = subprocess.run(
        ["nm", *flags, str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    exported = {line.split()[-1].removeprefix("_") for line in symbols.splitlines() if line}
    assert exported == declared_in_header()


def test_cython_declares_what_the_header_declares() -> None:
    text = re.sub(r"#[^\n]*", "", CAPI.read_text())
    assert set(re.findall(r"\b(kv_\w+)\(", text)) == declared_in_header()


def test_every_status_has_an_exception() -> None:
    assert status_table()[0] == "OK"
    assert status_table()[1:] == list(STATUS_EXCEPTIONS)


PUBLIC = {name: getattr(kvcore, name) for name in kvcore.__all__} | {
    f"ops.{name}": getattr(kvcore.ops, name) for name in kvcore.ops.__all__
}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_docstring(name: str) -> None:
    docstring = inspect.getdoc(PUBLIC[name]) or ""
    # dataclass writes "Name(field: type, ...)" where there is none.
    assert docstring.strip() and not docstring.startswith(f"{name}(")


@pytest.mark.parametrize("name", CLASSES)
def test_public_members_are_documented(name: str) -> None:
    listed = set(re.findall(r"(\w+)(?=[\w, ]*:)", inspect.getdoc(CLASSES[name]) or ""))
    silent = [
        attribute
        for attribute, member in vars(CLASSES[name]).items()
        if not attribute.startswith("_")
        and (inspect.isfunction(member) or isinstance(member, property | classmethod))
        and not inspect.getdoc(member)
        and attribute not in listed
    ]
    assert silent == []


def test_all_is_sorted_and_has_no_private_name() -> None:
    assert kvcore.__all__ == sorted(kvcore.__all__)
    assert not [name for name in kvcore.__all__ if name.startswith("_")]


def test_version_is_the_distribution_s() -> None:
    from importlib.metadata import version

    assert kvcore.__version__ == version("kvcore")
