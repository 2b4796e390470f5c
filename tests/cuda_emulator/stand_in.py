"""CuPy on a machine without a device: its calls of the driver are recorded instead of made.

Arrays are CuPy's own, over addresses of host memory that nothing but tests looks at.
"""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from kvcore_gpu import compiler

DEVICE = 3
STREAM = 0x5EED


@dataclass(frozen=True)
class Launch:
    """What cuLaunchKernel was given; `params` as the struct was then."""

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    stream: int
    params: bytes


class StandIn:
    """Patches CuPy, by a pytest MonkeyPatch.

    Attributes:
        launches: what was launched.
        copies: (address, bytes) of each asynchronous copy to the device.
        compiled: (source, defines) of each kernel.
        opted_in: the kernels that were given more shared memory than any has, and how much.
        allocations: how many arrays were made.
        error: raised by the next launch, if any.
        capturing: whether the stream is being captured.
    """

    def __init__(self, monkeypatch: Any) -> None:
        import cupy

        self.cupy = cupy
        self.launches: list[Launch] = []
        self.copies: list[tuple[int, bytes]] = []
        self.compiled: list[tuple[str, dict[str, Any]]] = []
        self.opted_in: dict[str, int] = {}
        self.allocations = 0
        self.error: Exception | None = None
        self.capturing = False
        self.params_size = 0
        self._names: dict[int, str] = {}
        self._memory: list[np.ndarray] = []
        self._stream = SimpleNamespace(
            ptr=STREAM, is_capturing=lambda: self.capturing, synchronize=lambda: None
        )
        cuda = cupy.cuda
        for owner, name, value in (
            (cuda.runtime, "getDevice", lambda: DEVICE),
            (cuda.runtime, "getDeviceCount", lambda: DEVICE + 1),
            (cuda.runtime, "driverGetVersion", lambda: 13000),
            (cuda.runtime, "getDeviceProperties", self._properties),
            (cuda.runtime, "memcpyAsync", self._copy),
            (cuda.driver, "launchKernel", self._launch),
            (cuda, "get_current_stream", lambda: self._stream),
            (cuda, "alloc_pinned_memory", bytearray),
            (cuda, "Event", lambda **_: SimpleNamespace(record=_nothing, synchronize=_nothing)),
            (cuda, "Device", lambda number: contextlib.nullcontext()),
            (cupy, "RawModule", self._module),
            (cupy, "empty", self._array),
            (cupy, "zeros", self._array),
            (cupy, "array", self._upload),
            (compiler, "compile_kernel", self._compile),
        ):
            monkeypatch.setattr(owner, name, value)

    def array(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
        """A CuPy array, for callers."""
        memory = np.zeros(int(np.prod(shape)) * np.dtype(dtype).itemsize + 16, np.uint8)
        self._memory.append(memory)
        address = -(-memory.ctypes.data // 16) * 16
        chunk = self.cupy.cuda.UnownedMemory(address, memory.nbytes - 16, memory, DEVICE)
        return self.cupy.ndarray(shape, dtype, self.cupy.cuda.MemoryPointer(chunk, 0))

    def _array(self, shape: Any, dtype: Any) -> Any:
        self.allocations += 1
        return self.array(shape, dtype)

    def _upload(self, host: Any, order: str) -> Any:
        return self._array(host.shape, host.dtype)

    def _properties(self, number: int) -> dict[str, Any]:
        return {
            "name": b"Stand-in",
            "sharedMemPerBlockOptin": 232448,
            "major": 9,
            "minor": 0,
        }

    def _compile(self, source: str, defines: Any, arch: str) -> compiler.Cubin:
        assert arch == "sm_90"
        self.compiled.append((source, dict(defines)))
        return compiler.Cubin(Path(f"{source}.cubin"), {})

    def _module(self, path: str) -> Any:
        def get_function(entry: str) -> Any:
            address = 0x1000 + len(self._names)
            self._names[address] = entry
            return _Kernel(self, entry, address)

        return SimpleNamespace(get_function=get_function)

    def _copy(self, target: int, source: int, size: int, kind: int, stream: int) -> None:
        assert stream == STREAM and kind == self.cupy.cuda.runtime.memcpyHostToDevice
        self.copies.append((target, ctypes.string_at(source, size)))

    def _launch(
        self, function: int, gx: int, gy: int, gz: int, bx: int, by: int, bz: int,
        shared_bytes: int, stream: int, arguments: int, extra: int,
    ) -> None:  # fmt: skip
        if self.error is not None:
            raise self.error
        address = ctypes.c_void_p.from_address(arguments).value
        assert address is not None and extra == 0
        params = ctypes.string_at(address, self.params_size)
        self.launches.append(
            Launch(self._names[function], (gx, gy, gz), (bx, by, bz), shared_bytes, stream, params)
        )


class _Kernel:
    """CuPy's RawKernel."""

    def __init__(self, stand_in: StandIn, name: str, address: int) -> None:
        self._stand_in = stand_in
        self._name = name
        self.kernel = SimpleNamespace(ptr=address)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "max_dynamic_shared_size_bytes":
            self._stand_in.opted_in[self._name] = value
        else:
            object.__setattr__(self, name, value)


def _nothing(*_: Any) -> None:
    pass
