"""What is under test: a backend, on the CPU one of its instruction sets, and arrays of its kind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcore.backend import Backend, get_backend
from kvcore.cache import KVCache
from kvcore.machine import get_isa, set_isa
from kvcore.spec import CacheSpec

#: Every bit set is NaN in all float formats and in all metadata.
POISON = 0xFF


@dataclass(frozen=True)
class Subject:
    """A backend under test.

    Attributes:
        backend: its name, "cpu" or "cuda".
        isa: the instruction set of the CPU's kernels; None for the one in use.
    """

    backend: str
    isa: str | None = None

    @property
    def operations(self) -> Backend:
        """The backend itself, whose operations on plain arrays are those of `kvcore.ops`."""
        return get_backend(self.backend)

    @property
    def device(self) -> str:
        """The instruction set, or what the kernels run on."""
        if self.backend == "cpu":
            return self.isa or get_isa()
        return self.operations.describe(None)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Runs the body on this instruction set."""
        before = get_isa()
        try:
            if self.isa is not None:
                set_isa(self.isa)
            yield
        finally:
            set_isa(before)

    def cache(self, spec: CacheSpec, num_blocks: int | tuple[int, ...]) -> KVCache:
        """A cache with NaN in every slot."""
        cache = KVCache(spec, num_blocks, backend=self.backend)
        for layer, form in enumerate(spec.layers):
            k_blocks, v_blocks = cache.blocks(layer)
            self._poison(k_blocks)
            if not form.v_in_k:
                self._poison(v_blocks)
        return cache

    def _poison(self, blocks: Any) -> None:
        """Sets every bit, by a copy: to fill an array CuPy would compile a kernel."""
        memory = blocks.view(np.uint8)
        memory[...] = self.array(np.full(memory.shape, POISON, np.uint8))

    def array(self, host: NDArray[Any] | None) -> Any:
        """`host` as the backend takes it: NumPy's on the CPU, the device's own otherwise."""
        if host is None or self.backend == "cpu":
            return host
        return self.operations.xp.asarray(host)

    def host(self, array: Any) -> NDArray[Any]:
        """A copy of the backend's array in NumPy."""
        return np.array(array.get() if hasattr(array, "get") else array)


#: Whose stored bytes every other subject must have.
REFERENCE = Subject("cpu", "scalar")
