"""Compiles kernels and the emulator for this machine's CPU; every result is kept by its content."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from kvcore_gpu import sources

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / "build" / "cuda_emulator"
# The arithmetic is the kernels' own: no product and sum are fused that the source does not fuse.
_FLAGS = ["-std=c++17", "-g1", "-fPIC", "-ffp-contract=off"]
_CHECK = ["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"]


class CompileError(Exception):
    """What the compiler said."""


def compile_kernel(
    source: str, defines: Mapping[str, int | str], check: bool, changed: Mapping[str, str]
) -> Path:
    """A shared object of kernels/`source`; `changed`: texts that stand for the package's."""
    texts = sources.collect(source, changed)
    macros = [f"-D{name}={value}" for name, value in sorted(defines.items())]
    flags = [
        *_FLAGS,
        *_cpu_flags(),
        "-Og",
        "-fvisibility=hidden",
        "-fstack-clash-protection",
        "-DKV_HOST_EMULATION",
        *macros,
    ]
    flags += _CHECK if check else []
    # Its name is made of all that the emulator consists of, the headers included.
    key = sources.digest(texts, source, *flags, library().parent.name)

    def build(folder: Path) -> None:
        for name, text in texts.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        flags.extend([f"-ffile-prefix-map={folder}/=", f"-I{folder}", f"-I{HERE}"])
        _run(*flags, "-x", "c++", "-c", folder / source, "-o", folder / "kernel.o")
        # Linked without the sanitizer: the emulator's library has the hooks.
        rpath = f"-Wl,-rpath,{library().parent}"
        _run("-shared", folder / "kernel.o", library(), rpath, "-o", folder / "kernel.so")

    return _cached(f"{Path(source).stem}-{key}", build) / "kernel.so"


@cache
def library() -> Path:
    """The emulator itself."""
    flags = [*_FLAGS, *_cpu_flags(), "-O3", "-Wall", "-Wextra", "-Werror"]
    files = sorted([*HERE.glob("*.hpp"), *HERE.glob("*.cpp")])
    key = sources.digest(
        {path.name: path.read_text() for path in files}, *flags, _compiler_version()
    )

    def build(folder: Path) -> None:
        units = [path for path in files if path.suffix == ".cpp"]
        _run(*flags, "-shared", *units, "-o", folder / "libkvemulator.so")

    return _cached(f"library-{key}", build) / "libkvemulator.so"


def line_of(kernel: Path, offset: str) -> str:
    """The lines of source at a place in a compiled kernel, the innermost inlined call first."""
    tool = shutil.which("addr2line")
    if tool is None:
        return offset
    # A return address is that of the next instruction, which may be of another line.
    call = hex(int(offset, 16) - 1)
    command = [tool, "-i", "-e", str(kernel), call]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
    return " in ".join(Path(line.split(" ")[0]).name for line in lines if line)


def compiler() -> str | None:
    """The C++ compiler: $CXX, or g++; None where there is none."""
    return shutil.which(os.environ.get("CXX") or "g++")


@cache
def _compiler_version() -> str:
    return subprocess.run([_compiler(), "--version"], capture_output=True, text=True).stdout


def _compiler() -> str:
    path = compiler()
    if path is None:
        raise CompileError("no C++ compiler: install g++, or name one in CXX")
    return path


@cache
def _cpu_flags() -> tuple[str, ...]:
    """fmaf is an instruction where the CPU has it, and a call elsewhere."""
    try:
        has = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return ()
    return ("-mavx2", "-mfma") if {"avx2", "fma"} <= has else ()


def _run(*arguments: str | Path) -> None:
    command = [_compiler(), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise CompileError(result.stderr)


def _cached(name: str, build: Callable[[Path], None]) -> Path:
    """The folder of a result; made once, also where several processes ask for it at once."""
    target = CACHE / name
    if target.exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with _locked(CACHE / f"{name}.lock"):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                fresh = Path(folder, "fresh")
                fresh.mkdir()
                build(fresh)
                fresh.rename(target)
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        # The file stays: one that is removed can be locked by two processes under one name.
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
