"""NVRTC, the compiler of CUDA C++ as a library, by ctypes: it needs no driver and no device."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from functools import cache
from pathlib import Path

from kvcore.errors import BackendUnavailable, KVCoreError

__all__ = ["CompileError", "Nvrtc", "load"]


class CompileError(KVCoreError):
    """NVRTC refused a kernel; the message is its log."""


class Nvrtc:
    """The library, as `load` finds it.

    Attributes:
        version: such as (13, 0).
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        major, minor = c_int(), c_int()
        self._call("nvrtcVersion", byref(major), byref(minor))
        self.version = (major.value, minor.value)

    def compile(
        self, name: str, texts: Mapping[str, str], options: Sequence[str]
    ) -> tuple[bytes, str]:
        """The cubin of a source, and what the compiler had to say. Threads may compile at once.

        Args:
            name: the source among `texts`; the others are found by #include under their names.
            texts: the sources and headers.
            options: such as "-arch=sm_90"; the architecture must be a real one.

        Raises:
            CompileError: the source or an option is not accepted.
        """
        headers = [header for header in texts if header != name]
        program = c_void_p()
        self._call(
            "nvrtcCreateProgram",
            byref(program),
            texts[name].encode(),
            name.encode(),
            len(headers),
            _strings([texts[header] for header in headers]),
            _strings(headers),
        )
        try:
            compile_program = self._library.nvrtcCompileProgram
            status = compile_program(program, len(options), _strings(options))
            log = self._output(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if status:
                raise CompileError(f"{name}: {self._error(status)} ({' '.join(options)})\n{log}")
            return self._output(program, "CUBIN"), log
        finally:
            self._library.nvrtcDestroyProgram(byref(program))

    def _output(self, program: c_void_p, kind: str) -> bytes:
        size = c_size_t()
        self._call(f"nvrtcGet{kind}Size", program, byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{kind}", program, buffer)
        return buffer.raw

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise CompileError(f"{function}: {self._error(status)}")

    def _error(self, status: int) -> str:
        describe = self._library.nvrtcGetErrorString
        describe.restype = c_char_p
        text: bytes = describe(status)
        return text.decode()


@cache
def load() -> Nvrtc:
    """NVRTC of the wheel nvidia-cuda-nvrtc, else of a CUDA toolkit.

    Raises:
        BackendUnavailable: there is none, and how to install one.
    """
    failures = []
    for path in _candidates():
        try:
            # It opens its builtins by name only, which finds them where they are loaded already.
            if path.is_absolute():
                for builtins in sorted(path.parent.glob("libnvrtc-builtins.so.*")):
                    ctypes.CDLL(str(builtins))
            return Nvrtc(_declare(ctypes.CDLL(str(path))))
        except OSError as error:
            failures.append(str(error))
    raise BackendUnavailable(
        'NVRTC, which compiles the kernels, is not installed: pip install "kvcore[cuda]"'
        + "".join(f"\n  tried: {failure}" for failure in failures)
    )


def _candidates() -> Iterator[Path]:
    """Where the library may be, newest first: wheels, toolkits, then the loader's own places."""
    for base in sys.path:
        yield from _newest(Path(base, "nvidia").absolute(), "*/lib/libnvrtc.so.*")
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield from _newest(Path(os.environ[variable]).absolute(), "lib*/libnvrtc.so.*")
    yield from (Path("libnvrtc.so.13"), Path("libnvrtc.so.12"))


def _newest(folder: Path, pattern: str) -> list[Path]:
    # "alt" is a second build of the compiler, with another allocator.
    found = [path for path in folder.glob(pattern) if ".alt." not in path.name]
    return sorted(found, key=lambda path: [int(part) for part in path.name.split(".")[2:]])[::-1]


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    strings = POINTER(c_char_p)
    library.nvrtcCreateProgram.argtypes = [
        POINTER(c_void_p), c_char_p, c_char_p, c_int, strings, strings,
    ]  # fmt: skip
    library.nvrtcCompileProgram.argtypes = [c_void_p, c_int, strings]
    library.nvrtcDestroyProgram.argtypes = [POINTER(c_void_p)]
    for kind in ("ProgramLog", "CUBIN"):
        getattr(library, f"nvrtcGet{kind}Size").argtypes = [c_void_p, POINTER(c_size_t)]
        getattr(library, f"nvrtcGet{kind}").argtypes = [c_void_p, c_char_p]
    return library


def _strings(values: Sequence[str]) -> ctypes.Array[c_char_p]:
    return (c_char_p * len(values))(*[value.encode() for value in values])
