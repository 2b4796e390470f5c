"""Ragged rows [T, H, D] as the layouts of append and attend have them, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Rows that padding has beyond the longest sequence.
EXTRA = 1


def to_layout(rows: NDArray[Any], layout: str, counts: list[int]) -> NDArray[Any]:
    """`rows` in `layout`; padding is NaN.

    Args:
        counts: new tokens of each sequence.
    """
    if layout == "NHD":
        return rows
    if layout == "HND":
        return np.ascontiguousarray(rows.swapaxes(0, 1))
    padded = np.full((len(counts), max(counts) + EXTRA, *rows.shape[1:]), np.nan, rows.dtype)
    start = 0
    for s, count in enumerate(counts):
        padded[s, :count] = rows[start : start + count]
        start += count
    return padded if layout == "BSHD" else np.ascontiguousarray(padded.swapaxes(1, 2))


def from_layout(array: NDArray[Any], layout: str, counts: list[int]) -> NDArray[Any]:
    """The ragged rows of what attend gave.

    Raises:
        AssertionError: its padding is not zero.
    """
    if layout == "NHD":
        return array
    if layout == "HND":
        return np.ascontiguousarray(array.swapaxes(0, 1))
    padded = array if layout == "BSHD" else array.swapaxes(1, 2)
    for s, count in enumerate(counts):
        if not (padded[s, count:] == 0).all():
            raise AssertionError(f"{layout}: the padding of sequence {s} is not zero")
    return np.concatenate([padded[s, :count] for s, count in enumerate(counts)])
