"""Staging: pinned host memory from which plans go to the device without anyone waiting."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ITEM = 4  # bytes of an int32
_SLOTS = 8
_LEAST = 1 << 12  # elements


class Staging:
    """A ring of pinned buffers. One is filled while copies from the others are under way."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self._slots = [_Slot() for _ in range(_SLOTS)]
        self._next = 0

    def take(self, count: int) -> NDArray[np.int32]:
        """Room for `count` elements, until the next call of this."""
        self._next = (self._next + 1) % _SLOTS
        slot = self._slots[self._next]
        if slot.event is not None:
            slot.event.synchronize()  # long done, unless the device is a ring of steps behind
        if slot.array.size < count:
            size = 1 << max(_LEAST.bit_length() - 1, (count - 1).bit_length())
            memory = self._cuda.alloc_pinned_memory(size * _ITEM)
            slot.array = np.frombuffer(memory, np.int32, size)
        return slot.array[:count]

    def send(self, staged: NDArray[np.int32], address: int) -> None:
        """Copies what `take` gave last to the device, in the current stream's order."""
        slot = self._slots[self._next]
        stream = self._cuda.get_current_stream()
        runtime = self._cuda.runtime
        runtime.memcpyAsync(
            address, staged.ctypes.data, staged.nbytes, runtime.memcpyHostToDevice, stream.ptr
        )
        if slot.event is None:
            slot.event = self._cuda.Event(disable_timing=True)
        slot.event.record(stream)


class _Slot:
    def __init__(self) -> None:
        self.array: NDArray[np.int32] = np.empty(0, np.int32)
        self.event: Any = None

    def __del__(self) -> None:
        """Of a thread that ends: others get the memory then, and a copy may still be to come."""
        if self.event is not None:
            with suppress(Exception):  # as where CuPy itself is gone
                self.event.synchronize()
