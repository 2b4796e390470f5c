"""The rows of q, k and v that sequences are made of, fixed by a token's place in its text."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from kvcore import arrays
from kvcore.spec import CacheSpec

Rows = NDArray[np.float32]


class Texts:
    """Random rows in the dtype of a case, the same in every run.

    Args:
        spec: the cache they are for.
        group: query heads of a KV head.
        dtype: "float32", "float16" or "bfloat16".
        length: tokens of each text.
        nans: (sequence, token, KV head, "k" or "v") of rows that are NaN.
    """

    def __init__(
        self,
        spec: CacheSpec,
        group: int,
        dtype: str,
        length: int,
        nans: tuple[tuple[str, int, int, str], ...] = (),
    ) -> None:
        self._spec, self._group, self._length = spec, group, length
        self._dtype = arrays.bfloat16() if dtype == "bfloat16" else np.dtype(dtype)
        self._nans = nans
        self._parents: dict[str, tuple[str, int]] = {}
        self._made: dict[tuple[str, int, str], Rows] = {}

    def branch(self, parent: str, child: str, length: int) -> None:
        """The first `length` tokens of the text `child` are those of `parent`."""
        self._parents[child] = parent, length

    def rows(self, kind: str, layer: int, name: str, start: int, stop: int) -> Rows:
        """Tokens [start, stop) of a text: [stop - start, heads, dim].

        Args:
            kind: "q", "k" or "v".
        """
        return self._text(kind, layer, name)[start:stop]

    def _text(self, kind: str, layer: int, name: str) -> Rows:
        key = kind, layer, name
        if key not in self._made:
            made = self._make(kind, layer, name)
            if name in self._parents:
                parent, length = self._parents[name]
                made[:length] = self._text(kind, layer, parent)[:length]
            self._made[key] = made
        return self._made[key]

    def _make(self, kind: str, layer: int, name: str) -> Rows:
        spec = self._spec.layers[layer]
        heads, dim = spec.num_kv_heads, spec.head_dim_v if kind == "v" else spec.head_dim
        if kind == "q":
            heads *= self._group
        rng = np.random.default_rng([zlib.crc32(f"{kind} {name}".encode()), layer])
        rows = rng.standard_normal((self._length, heads, dim), np.float32).astype(self._dtype)
        for sequence, token, head, which in self._nans:
            if (sequence, which) == (name, kind):
                rows[token, head] = np.nan
        return rows
