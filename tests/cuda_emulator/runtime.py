"""A runtime of the CUDA backend without a GPU: NumPy's memory, the same sources, a CPU instead.

A kernel that goes wrong raises EmulationError and says where. KVCORE_EMULATOR is a list of "check"
and an order of threads and blocks: "ascending" (the default), "descending" or "random".
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_emulator import build
from kvcore.arrays import as_array
from kvcore.errors import InvalidArgument

ORDERS = ("ascending", "descending", "random")


class EmulationError(Exception):
    """What a kernel did wrong, in which block and thread."""


@dataclass(frozen=True, eq=False)
class EmulatedFunction:
    """An entry of a compiled source."""

    name: str
    path: Path
    address: int
    library: ctypes.CDLL


class _Index(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint32), ("y", ctypes.c_uint32), ("z", ctypes.c_uint32)]


class _Launch(ctypes.Structure):
    """Mirrors launch.hpp."""

    _fields_ = [
        ("kernel", ctypes.c_void_p),
        ("params", ctypes.c_void_p),
        ("params_size", ctypes.c_uint32),
        ("grid", _Index),
        ("block", _Index),
        ("shared_bytes", ctypes.c_uint32),
        ("order", ctypes.c_int32),
        ("check", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("begins", ctypes.c_void_p),
        ("ends", ctypes.c_void_p),
        ("writable", ctypes.c_void_p),
        ("num_ranges", ctypes.c_uint32),
    ]


_one_launch = threading.Lock()


class EmulatedRuntime:
    """Implements kvcore_gpu.runtime.Runtime.

    Attributes:
        order: in which order threads and blocks run, one of ORDERS.
        check: whether kernels are compiled and run with the checker: races in shared memory, and
            accesses outside of the arrays of this runtime, or writes to those that NumPy has as
            read-only.
        seed: of the random order.
        changed: texts that stand for those of kernels/.
        launches: how many kernels ran so far.
    """

    name = "emulator"
    xp: Any = np
    array_type: type = np.ndarray
    arch = "sm_90"
    device = 0
    shared_per_block = 227 * 1024

    def __init__(
        self,
        *,
        order: str | None = None,
        check: bool | None = None,
        seed: int = 1,
        changed: Mapping[str, str] | None = None,
    ) -> None:
        wishes = [word for word in os.environ.get("KVCORE_EMULATOR", "").split(",") if word]
        unknown = set(wishes) - {"check", *ORDERS}
        if unknown or order not in (None, *ORDERS):
            raise ValueError(
                f"emulator: expected check or an order of {ORDERS}, got {wishes, order}"
            )
        self.check = "check" in wishes if check is None else check
        self.order = order or next((word for word in wishes if word in ORDERS), ORDERS[0])
        self.seed = seed
        self.changed = changed or {}
        self.launches = 0
        self._library = _load_library()
        self._functions: dict[object, EmulatedFunction] = {}
        self._arrays: dict[int, weakref.ref[NDArray[Any]]] = {}

    def on_device(self, device: int | None) -> EmulatedRuntime:
        if device not in (None, self.device):
            raise InvalidArgument(f"device: expected 0, the only one, got {device}")
        return self

    def active(self) -> AbstractContextManager[None]:
        return nullcontext()

    # ---- memory

    def empty(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        array = np.empty(shape, dtype)
        array.reshape(-1).view(np.uint8)[...] = 0xFF  # NaN in every float type, -1 in integers
        return self._know(array)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        return self._know(np.zeros(shape, dtype))

    def check_not_capturing(self) -> None:
        """Nothing ever is."""

    def available_memory(self) -> int:
        return 1 << 30

    def check_active(self) -> None:
        """It always is."""

    def copy(self, array: NDArray[Any]) -> NDArray[Any]:
        fresh = self.empty(array.shape, array.dtype)
        fresh[...] = array
        return fresh

    def clear(self, array: NDArray[Any]) -> None:
        array[...] = 0

    def to_device(self, array: NDArray[Any]) -> NDArray[Any]:
        return self._know(np.array(array, order="C"))

    def as_array(self, value: Any, argument: str) -> NDArray[Any]:
        return self._know(as_array(value, argument))

    def address(self, array: NDArray[Any]) -> int:
        return self._know(array).ctypes.data

    def to_host(self, array: NDArray[Any]) -> NDArray[Any]:
        return np.array(array)

    def stage(self, count: int) -> NDArray[np.int32]:
        return np.empty(count, np.int32)

    def upload(self, staged: NDArray[np.int32], target: NDArray[np.int32]) -> None:
        target[: staged.size] = staged

    def _know(self, array: NDArray[Any]) -> NDArray[Any]:
        """Lets kernels use the array, as long as it lives."""
        key = id(array)
        self._arrays[key] = weakref.ref(array, lambda _: self._arrays.pop(key, None))
        return array

    def _ranges(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint8]]:
        """Begin and end of all memory that kernels may use, sorted and apart, and if to write."""
        spans: list[tuple[int, int, bool]] = []
        for reference in list(self._arrays.values()):
            array = reference()
            if array is not None and array.size:
                spans.append((*np.lib.array_utils.byte_bounds(array), array.flags.writeable))
        # Views of one array overlap: where they do, what any may write may be written.
        cuts = sorted({at for begin, end, _ in spans for at in (begin, end)})
        ranges = []
        for begin, end in pairwise(cuts):
            over = [may for first, last, may in spans if first <= begin and end <= last]
            if not over:
                continue
            if ranges and ranges[-1][1] == begin and ranges[-1][2] == any(over):
                begin = ranges.pop()[0]
            ranges.append((begin, end, any(over)))
        table = np.array(ranges, np.uint64).reshape(-1, 3)
        return table[:, 0].copy(), table[:, 1].copy(), table[:, 2].astype(np.uint8)

    # ---- kernels

    def function(
        self, source: str, entry: str, defines: Mapping[str, int | str]
    ) -> EmulatedFunction:
        key = (source, entry, *sorted(defines.items()), self.check)
        if key not in self._functions:
            path = build.compile_kernel(source, defines, self.check, self.changed)
            library = ctypes.CDLL(str(path))
            try:
                address = ctypes.addressof(ctypes.c_char.in_dll(library, entry))
            except ValueError:
                raise InvalidArgument(f"kernels/{source} has no entry {entry}") from None
            self._functions[key] = EmulatedFunction(entry, path, address, library)
        return self._functions[key]

    def launch(
        self,
        function: EmulatedFunction,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        params: ctypes.Structure,
    ) -> None:
        launch = _Launch(
            kernel=function.address,
            params=ctypes.addressof(params),
            params_size=ctypes.sizeof(params),
            grid=_Index(*grid),
            block=_Index(*block),
            shared_bytes=shared_bytes,
            order=ORDERS.index(self.order),
            check=self.check,
            seed=self.seed + self.launches,
        )
        self.launches += 1
        if self.check:
            ranges = self._ranges()
            launch.begins, launch.ends, launch.writable = (part.ctypes.data for part in ranges)
            launch.num_ranges = len(ranges[0])
        with _one_launch:
            if self._library.kv_emulator_launch(ctypes.byref(launch)):
                error, _, place = self._library.kv_emulator_error().decode().partition(" at +")
                line = f" at {build.line_of(function.path, place)}" if place else ""
                raise EmulationError(f"{function.name}: {error}{line}")

    def synchronize(self) -> None:
        """Nothing is ever under way."""


def _load_library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build.library()))
    library.kv_emulator_launch.argtypes = [ctypes.POINTER(_Launch)]
    library.kv_emulator_launch.restype = ctypes.c_int
    library.kv_emulator_error.restype = ctypes.c_char_p
    return library
