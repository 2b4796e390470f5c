"""Constants per channel: key biases, and the scales of int8_static."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcore.errors import InvalidArgument, InvalidType


@dataclass(frozen=True)
class Channels:
    """One float32 for each channel of each head of a layer.

    Attributes:
        shape: (num_kv_heads, head_dim).
        data: the numbers' bytes.
    """

    shape: tuple[int, int]
    data: bytes

    @property
    def array(self) -> NDArray[np.float32]:
        """float32 [H, D], read-only."""
        return np.frombuffer(self.data, np.float32).reshape(self.shape)

    def __repr__(self) -> str:
        return f"Channels({list(self.shape)}, {self.array.min():.4g} to {self.array.max():.4g})"


def per_layer(value: Any, count: int, argument: str) -> Sequence[Any]:
    """An array [L, H, D], or a list with an array [H, D] or None for each layer, layer by layer.

    Raises:
        InvalidArgument, InvalidType: it is neither.
    """
    if value is None:
        return [None] * count
    if not hasattr(value, "__len__") or isinstance(value, str | bytes):
        raise InvalidType(
            f"{argument}: expected an array [L, H, D] or a list of one [H, D] or None a layer, "
            f"got {type(value).__name__}"
        )
    if len(value) != count:
        raise InvalidArgument(f"{argument}: expected {count} layers, got {len(value)}")
    return list(value)


def bias_of(value: Any, shape: tuple[int, int], argument: str) -> Channels:
    """A key bias, rounded to bfloat16.

    Raises:
        InvalidArgument, InvalidType: naming the argument.
    """
    array = _numbers(value, shape, argument)
    bits = array.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    if not np.isfinite(rounded).all():
        raise InvalidArgument(f"{argument}: expected bfloat16 numbers, got {abs(array).max()}")
    return Channels(shape, rounded.tobytes())


def scales_of(value: Any, shape: tuple[int, int], argument: str) -> Channels:
    """Scales: above 0.

    Raises:
        InvalidArgument, InvalidType: naming the argument.
    """
    array = _numbers(value, shape, argument)
    if not (array > 0).all():
        raise InvalidArgument(f"{argument}: expected numbers above 0, got {array.min()}")
    return Channels(shape, array.tobytes())


def _numbers(value: Any, shape: tuple[int, int], argument: str) -> NDArray[np.float32]:
    try:
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(np.asarray(value).astype(np.float32))
    except (TypeError, ValueError):
        raise InvalidType(
            f"{argument}: expected numbers [H, D] = {list(shape)}, got {type(value).__name__}"
        ) from None
    if array.shape != shape:
        raise InvalidArgument(
            f"{argument}: expected shape [H, D] = {list(shape)}, got {list(array.shape)}"
        )
    if not np.isfinite(array).all():
        worst = array[~np.isfinite(array)][0]
        raise InvalidArgument(f"{argument}: expected finite numbers, got {worst}")
    return array
