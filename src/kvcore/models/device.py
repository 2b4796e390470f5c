"""Where a decoder computes: the arrays of a backend's device, and how they get there and back."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcore.backend import Backend, get_backend
from kvcore.cache import KVCache
from kvcore.errors import BackendUnavailable, InvalidArgument
from kvcore.models.linear import ArrayLinear, HostLinear, Linear
from kvcore.spec import CacheSpec


class Device:
    """A device of a backend, as the decoder uses it.

    Args:
        backend: "cpu" or "cuda".
        number: the CUDA device's, None for the current one; None for the CPU.

    Attributes:
        backend: the backend.
        number: as given.
        xp: the module of its arrays.
        is_host: whether they are NumPy's.
        linear: linear layers over them.

    Raises:
        InvalidArgument: there is no such backend or device.
        BackendUnavailable: the backend cannot be used here, or lacks what the decoder needs.
    """

    def __init__(self, backend: str = "cpu", number: int | None = None) -> None:
        self.backend: Backend = get_backend(backend)
        self.number = number
        self.xp = self.backend.xp
        self.is_host = self.xp is np
        self.linear: Linear = HostLinear() if self.is_host else ArrayLinear(self.xp)
        with self.active():  # so that what is missing is told before weights are read
            if not self.is_host:
                self._check_arithmetic()

    def __repr__(self) -> str:
        return _name(self.backend, self.number)

    def describe(self) -> str:
        """What computes here, in a few words."""
        return self.backend.describe(self.number)

    def make_cache(self, spec: CacheSpec, *counts: Any, **options: Any) -> KVCache:
        """A cache whose blocks lie here; arguments are those of `KVCache`."""
        return KVCache(spec, *counts, backend=self.backend.name, device=self.number, **options)

    def check(self, cache: KVCache, argument: str) -> None:
        """Raises InvalidArgument unless the blocks of a cache lie here."""
        numbers = {self.number, cache.device} - {None}
        if cache.backend is not self.backend or len(numbers) > 1:
            came = _name(cache.backend, cache.device)
            raise InvalidArgument(
                f"{argument}: a cache on {self} expected, where the model is, got one on {came}"
            )

    def active(self) -> AbstractContextManager[Any]:
        """A context in which `xp` makes its arrays on this device."""
        return self.backend.on_device(self.number)

    def _check_arithmetic(self) -> None:
        """Raises unless products and sums work, for which CuPy needs cuBLAS and CUDA's headers."""
        try:
            ones = self.put(np.ones((2, 2), np.float32))
            out = self.xp.empty((2, 2), self.xp.float32)
            self.linear.apply(ones, ones, ones[0], out)
            self.get(out)
        except Exception as error:  # CuPy turns what its libraries lack into many kinds
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise BackendUnavailable(
                f'backend "{self.backend.name}": a matrix product failed: {reason}; the decoder '
                'needs cuBLAS and the CUDA headers: pip install "kvcore[models-cuda]"'
            ) from error

    def put(self, array: npt.NDArray[Any]) -> Any:
        """A NumPy array as one of `xp`; call it within `active`."""
        return array if self.is_host else self.xp.asarray(array)

    def get(self, array: Any) -> npt.NDArray[Any]:
        """An array of `xp` as NumPy's, once all that it waits for is computed."""
        result: npt.NDArray[Any] = array if self.is_host else self.xp.asnumpy(array)
        return result


def _name(backend: Backend, number: int | None) -> str:
    return backend.name if number is None else f"{backend.name}:{number}"
