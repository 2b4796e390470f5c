"""Launcher: the kernels of a runtime, specialised by macros, each with parameters that are kept."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvcore_gpu.params import Params
from kvcore_gpu.runtime import Function, Runtime

P = TypeVar("P", bound=Params)


class Kernel(Generic[P]):
    """A compiled kernel and the parameters of its next launch.

    Attributes:
        function: the kernel.
        params: what the next launch passes; filled in place, by the owner alone.
    """

    __slots__ = ("_runtime", "function", "params")

    def __init__(self, runtime: Runtime, function: Function, params: P) -> None:
        self._runtime = runtime
        self.function = function
        self.params = params

    def launch(
        self, grid: tuple[int, int, int], block: tuple[int, int, int], shared_bytes: int = 0
    ) -> None:
        """Runs the kernel in the caller's current stream, without waiting."""
        self._runtime.launch(self.function, grid, block, shared_bytes, self.params)


class Launcher:
    """Makes kernels, and keeps what they are given again and again.

    Attributes:
        runtime: the device.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._constants: dict[bytes, Any] = {}

    def function(self, source: str, entry: str, **defines: int | str) -> Function:
        """The kernel `entry` of kernels/`source` with these macros."""
        return self.runtime.function(source, entry, defines)

    def constant(self, values: NDArray[np.float32]) -> int:
        """The address of a copy of a few values, kept because callers pass the same again."""
        key = values.tobytes()
        array = self._constants.get(key)
        if array is None:
            self.runtime.check_not_capturing()
            array = self._constants[key] = self.runtime.to_device(values)
        return self.runtime.address(array)

    def kernel(self, source: str, entry: str, params: type[P], **defines: int | str) -> Kernel[P]:
        """The same, with parameters of its own."""
        return Kernel(self.runtime, self.function(source, entry, **defines), params())
