"""Small checks of arguments, each with a message that says what was expected and what came."""

from __future__ import annotations

import operator
from typing import Any

from kvcore.errors import InvalidArgument, InvalidType


def integer(value: Any, argument: str, low: int, high: int | None = None) -> int:
    """`value` as an int within [low, high]; anything with __index__ is accepted but bool."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise InvalidType(f"{argument}: expected an int, got {type(value).__name__}") from None
    if number < low or (high is not None and number > high):
        expected = f"at least {low}" if high is None else f"{low} to {high}"
        raise InvalidArgument(f"{argument}: expected {expected}, got {number}")
    return number


def no_v(value: Any, layer: int, v_in_k: int) -> None:
    """Raises if V is given for a layer that takes it from K."""
    if value is not None:
        raise InvalidArgument(
            f"v: expected None, as V of layer {layer} is the first {v_in_k} elements of k, "
            f"got {type(value).__name__}"
        )


def shape(actual: tuple[int, ...], expected: tuple[int, ...], argument: str, axes: str) -> None:
    """Raises unless the shapes are equal; `axes` names them, as in "[T, H, D]"."""
    if actual != expected:
        raise InvalidArgument(
            f"{argument}: expected shape {axes} = {list(expected)}, got {list(actual)}"
        )
