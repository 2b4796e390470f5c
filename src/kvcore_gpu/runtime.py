"""Runtime: all that the backend knows of a device. CupyRuntime is one; tests have another."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvcore_gpu.params import Params


class Function(Protocol):
    """A compiled kernel, loaded on the device."""

    @property
    def name(self) -> str: ...


class Runtime(Protocol):
    """Memory, copies and launches of one device, in the order of the caller's current stream.

    Attributes:
        name: what the device calls itself.
        xp: the module of its arrays, with NumPy's functions.
        array_type: the class of its arrays.
        arch: what kernels are compiled for, such as "sm_90".
        device: the device's number.
        shared_per_block: bytes of shared memory that a block may ask for.
    """

    name: str
    xp: Any
    array_type: type
    arch: str
    device: int
    shared_per_block: int

    def on_device(self, device: int | None) -> Runtime:
        """The runtime of a device, or of the one that is current.

        Raises:
            InvalidArgument: there is no such device.
        """
        ...

    def active(self) -> AbstractContextManager[Any]:
        """A context in which `xp` makes its arrays on this device."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """A dense array of the device, aligned to 16 bytes, with anything in it."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """The same, with zeros."""
        ...

    def check_not_capturing(self) -> None:
        """Raises StepError while the current stream is being captured into a graph.

        For what no graph can hold: memory that is made, kernels that are loaded, values of the
        host.
        """
        ...

    def available_memory(self) -> int:
        """Bytes that could still be had."""
        ...

    def check_active(self) -> None:
        """Raises InvalidArgument unless this device is the current one."""
        ...

    def copy(self, array: Any) -> Any:
        """A dense copy, aligned to 16 bytes."""
        ...

    def clear(self, array: Any) -> None:
        """Makes every element 0."""
        ...

    def to_device(self, array: NDArray[Any]) -> Any:
        """A dense copy of a host array, which may wait."""
        ...

    def as_array(self, value: Any, argument: str) -> Any:
        """An array of the device over a caller's memory: its own kind, an array interface, DLPack.

        Never a copy: InvalidType says what cannot be taken, memory of the host for one.
        """
        ...

    def address(self, array: Any) -> int:
        """Where an array's first element lies."""
        ...

    def to_host(self, array: Any) -> NDArray[Any]:
        """A copy on the host, which waits for the stream."""
        ...

    def stage(self, count: int) -> NDArray[np.int32]:
        """Host memory to fill and to hand to `upload` before the next call of this."""
        ...

    def upload(self, staged: NDArray[np.int32], target: Any) -> None:
        """Copies the beginning of what `stage` gave to a device array of int32, without waiting."""
        ...

    def function(self, source: str, entry: str, defines: Mapping[str, int | str]) -> Function:
        """The kernel `entry` of kernels/`source`, compiled with the macros, once for each."""
        ...

    def launch(
        self,
        function: Any,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        params: Params,
    ) -> None:
        """Runs a kernel, without waiting; `params` may be filled anew at once."""
        ...

    def synchronize(self) -> None:
        """Waits for the caller's current stream. DeviceFault: something in it has failed."""
        ...
