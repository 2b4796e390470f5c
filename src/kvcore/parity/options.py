"""The options of attend that cases name, with values fixed by sequence and token."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

WINDOW = 40
#: Of the sequences' masks: "a" and others see half of the keys, "b" has no mask, "c" sees few keys.
DENSITY = {"b": None, "c": 0.02}
NAMES = ("softcap", "alibi", "window", "non-causal", "mask", "positions", "sinks", "scale")


@dataclass(frozen=True)
class Entry:
    """One sequence of a step: its text, and its tokens [first, stop) that are new."""

    text: str
    first: int
    stop: int


def for_step(names: tuple[str, ...], entries: list[Entry], num_heads: int) -> dict[str, Any]:
    """What `Step.attend` is given."""
    given = _for_heads(names, num_heads)
    if "mask" in names:
        masks = [_mask(entry) for entry in entries]
        # Bits mean what booleans do.
        given["mask"] = [
            np.packbits(mask, axis=1, bitorder="little") if i % 2 and mask is not None else mask
            for i, mask in enumerate(masks)
        ]
    if "positions" in names:
        given["positions"] = np.concatenate([_positions(entry) for entry in entries])
    return given


def for_oracle(
    names: tuple[str, ...], entry: Entry, num_heads: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same for one sequence: what it sees, and how it scores that."""
    scoring = _for_heads(names, num_heads)
    sight: dict[str, Any] = {}
    for name in ("window", "causal"):
        if name in scoring:
            sight[name] = scoring.pop(name)
    if "mask" in names:
        sight["mask"] = _mask(entry)
    if "positions" in names:
        sight["positions"] = _positions(entry)
    return sight, scoring


def _for_heads(names: tuple[str, ...], num_heads: int) -> dict[str, Any]:
    heads = np.arange(num_heads, dtype=np.float32)
    values: dict[str, dict[str, Any]] = {
        "softcap": {"softcap": 1.5},
        "alibi": {"alibi_slopes": np.exp2(-1 - heads / 2).astype(np.float32)},
        "window": {"window": WINDOW},
        "non-causal": {"causal": False},
        "sinks": {"sinks": (heads - num_heads / 2).astype(np.float32)},
        "scale": {"scale": 0.0625},
    }
    return {key: value for name in names for key, value in values.get(name, {}).items()}


def _mask(entry: Entry) -> NDArray[np.bool_] | None:
    density = DENSITY.get(entry.text, 0.5)
    if density is None:
        return None
    rng = _random(entry, "mask")
    drawn = rng.random((entry.stop, entry.stop)) < density
    return np.ascontiguousarray(drawn[entry.first :])


def _positions(entry: Entry) -> NDArray[np.int32]:
    offsets = _random(entry, "positions").integers(0, 5, entry.stop)
    return (np.arange(entry.stop) + offsets)[entry.first :].astype(np.int32)


def _random(entry: Entry, what: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(f"{what} {entry.text}".encode()))
