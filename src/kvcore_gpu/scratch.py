"""Scratch: device memory that launches share, kept from one to the next."""

from __future__ import annotations

from typing import Any

from kvcore_gpu.runtime import Runtime


class Scratch:
    """Memory by name, grown when more is asked for.

    What was handed out before stays, as captured graphs go on using it; sizes are rounded up to
    powers of two, so that all of it together is at most twice what the largest call needs. Calls in
    one stream can share it.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._addresses: dict[str, tuple[int, int]] = {}
        self._kept: list[Any] = []

    def get(self, name: str, count: int, dtype: Any) -> int:
        """The address of `count` elements; zeros when they are new."""
        size, address = self._addresses.get(name, (-1, 0))
        if count > size:
            self._runtime.check_not_capturing()
            size = 1 << max(0, count - 1).bit_length()
            array = self._runtime.zeros((size,), dtype)
            self._kept.append(array)
            address = self._runtime.address(array)
            self._addresses[name] = size, address
        return address
