"""A C program against the installed package, and the header under other compilers' rules."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

import kvcore

ROOT = Path(__file__).parents[1]
HEADER = "kvcore/kvcore.h"


def c_compiler() -> list[str]:
    candidates = [shlex.split(sysconfig.get_config_var("CC") or "cc"), ["cc"], ["gcc"], ["clang"]]
    for candidate in candidates:
        if shutil.which(candidate[0]):
            return candidate[:1]
    pytest.fail("a C compiler is needed to test the C interface")


def run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout}{result.stderr}"
    return result.stdout


def test_c_program_runs_against_the_installed_package(tmp_path: Path) -> None:
    library_dir = kvcore.get_library_dir()
    program = tmp_path / "embed"
    run(
        *c_compiler(), "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror",
        str(ROOT / "examples" / "c" / "embed.c"), f"-I{kvcore.get_include()}",
        f"-L{library_dir}", f"-Wl,-rpath,{library_dir}", "-lkvcore", "-lm", "-o", str(program),
    )  # fmt: skip
    # The program compares its own results with a plain softmax, and fails when they differ.
    assert run(str(program)).startswith(f"kvcore {kvcore.__version__}: largest error")


@pytest.mark.parametrize("standard", ["c99", "c11", "c17"])
def test_header_stands_alone_in_c(tmp_path: Path, standard: str) -> None:
    source = tmp_path / "header.c"
    source.write_text(f"#include <{HEADER}>\nint unit_is_not_empty;\n")
    run(
        *c_compiler(), f"-std={standard}", "-pedantic", "-Wall", "-Wextra", "-Wstrict-prototypes",
        "-Werror", "-fsyntax-only", f"-I{kvcore.get_include()}", str(source),
    )  # fmt: skip


@pytest.mark.parametrize("standard", ["c++11", "c++17"])
def test_header_stands_alone_in_cpp(tmp_path: Path, standard: str) -> None:
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    # Names that the linker must find unmangled.
    source = tmp_path / "header.cpp"
    source.write_text(f"#include <{HEADER}>\nint main() {{ return kv_version() == nullptr; }}\n")
    library_dir = kvcore.get_library_dir()
    run(
        compiler, f"-std={standard}", "-pedantic", "-Wall", "-Wextra", "-Werror",
        f"-I{kvcore.get_include()}", str(source), f"-L{library_dir}",
        f"-Wl,-rpath,{library_dir}", "-lkvcore", "-o", str(tmp_path / "program"),
    )  # fmt: skip
    run(str(tmp_path / "program"))
