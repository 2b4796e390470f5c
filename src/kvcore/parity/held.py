"""What sequences hold by docs/formats.md and the rules of raw rows, without a cache."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcore.backend import get_backend
from kvcore.formats import GROUP_TOKENS, Format, get_format
from kvcore.spec import CacheSpec

Rows = NDArray[np.float32]


class HeldSide:
    """K or V of one sequence and layer.

    Attributes:
        raw: what was appended, float32 [n, H, D], as bfloat16 keeps it.
        encoded: what the format makes of it; NaN where a group is not full.
    """

    def __init__(
        self,
        spec: CacheSpec,
        format: Format,
        num_heads: int,
        head_dim: int,
        scales: Rows | None,
        bias: Rows | None,
    ) -> None:
        self._format = format
        self._first, self._last = spec.raw_first, spec.raw_last
        self._keeps_raw = bool(spec.raw_groups) and format.is_quantized
        self._scales, self._bias = scales, bias
        self.raw = self.encoded = np.empty((0, num_heads, head_dim), np.float32)

    def append(self, rows: NDArray[Any]) -> None:
        start = len(self.raw)
        new = rows.astype(np.float32)
        encoded = np.full_like(new, np.nan)
        if self._format.kind != "channel":
            encoded = self._through_format(new)
        self.raw = np.concatenate([self.raw, _as_bf16(new)])
        self.encoded = np.concatenate([self.encoded, encoded])
        if self._format.kind == "channel":
            self._seal(start // GROUP_TOKENS * GROUP_TOKENS)

    def _seal(self, start: int) -> None:
        """Encodes the full groups from `start` on."""
        stop = len(self.raw) // GROUP_TOKENS * GROUP_TOKENS
        if start >= stop:
            return
        rows = self.raw[start:stop].copy()
        if start == 0 and self._first < GROUP_TOKENS:
            rows[: self._first] = rows[self._first]
        self.encoded[start:stop] = self._through_format(rows)

    def truncate(self, length: int) -> None:
        """Drops rows; raw ones that were released come back from the encoded ones."""
        if self._keeps_raw:
            kept_from = _group_start(len(self.raw) - max(self._last, 1) + 1)
            needed_from = _group_start(length - max(self._last, 1) + 1)
            pinned = GROUP_TOKENS if self._first else 0
            lost = np.arange(max(needed_from, pinned), min(kept_from, length))
            self.raw[lost] = _as_bf16(self.encoded[lost])
        self.raw, self.encoded = self.raw[:length].copy(), self.encoded[:length].copy()

    def raw_start(self, token: int) -> int:
        """The first of the last tokens that token `token` reads raw."""
        return max(0, _group_start(token + 1) - self._last)

    def seen(self, token: int) -> Rows:
        """All rows as token `token` reads them; it may be the one after the last."""
        if not self._keeps_raw:
            return self.encoded
        length, start = len(self.raw), self.raw_start(token)
        if self._format.kind == "channel":
            # A group is raw until the token that fills it is there.
            start = min(start, _group_start(length))
        tokens = np.arange(length)
        is_raw = (tokens < self._first) | (tokens >= start)
        rows: Rows = np.where(is_raw[:, None, None], self.raw, self.encoded)
        return rows

    def _through_format(self, rows: Rows) -> Rows:
        """Encoded and decoded; whole groups for channel formats. By the CPU's own codec."""
        codec, name = get_backend("cpu"), self._format.name
        heads = np.ascontiguousarray(rows.swapaxes(0, 1))
        decoded: Rows = np.empty_like(heads)
        for head, x in enumerate(heads):
            scales = None if self._scales is None else self._scales[head]
            bias = None if self._bias is None else self._bias[head]
            code = codec.quantize(x, name, scales, bias)
            decoded[head] = codec.dequantize(code, name, scales, bias)
        rows = decoded.swapaxes(0, 1)
        return rows


class Held:
    """A sequence: K and V of each layer that owns storage; V is None where it lies in K."""

    def __init__(self, spec: CacheSpec) -> None:
        self._spec = spec
        self.length = 0
        self.sides: dict[int, tuple[HeldSide, HeldSide | None]] = {}
        for i, layer in enumerate(spec.layers):
            if layer.kv_source != i:
                continue
            heads, (k_scales, v_scales) = layer.num_kv_heads, spec.layer_scales(i)
            k = HeldSide(spec, get_format(layer.k_format), heads, layer.head_dim, k_scales,
                         spec.layer_bias(i))  # fmt: skip
            v = None
            if not layer.v_in_k:
                v = HeldSide(spec, get_format(layer.v_format), heads, layer.head_dim_v, v_scales,
                             None)  # fmt: skip
            self.sides[i] = k, v

    def copy(self) -> Held:
        return deepcopy(self)

    def append(self, layer: int, k: NDArray[Any], v: NDArray[Any] | None) -> None:
        for side, rows in zip(self.sides[layer], (k, v), strict=True):
            if side is not None:
                assert rows is not None
                side.append(rows)

    def truncate(self, length: int) -> None:
        self.length = length
        for sides in self.sides.values():
            for side in sides:
                if side is not None:
                    side.truncate(length)

    def seen(self, layer: int, token: int) -> tuple[Rows, Rows]:
        """K and V of a layer as token `token` reads them."""
        spec = self._spec.layers[layer]
        k_side, v_side = self.sides[spec.kv_source]
        k = k_side.seen(token)
        return k, k[..., : spec.v_in_k] if v_side is None else v_side.seen(token)

    def readers(self, layer: int, first: int, stop: int) -> list[tuple[int, int]]:
        """Tokens [first, stop) as runs [a, b) that read every row alike."""
        sides = [side for side in self.sides[self._spec.layers[layer].kv_source] if side]
        starts = [tuple(side.raw_start(t) for side in sides) for t in range(first, stop)]
        if not self._spec.raw_groups:
            return [(first, stop)]
        cuts = [first + i for i in range(1, len(starts)) if starts[i] != starts[i - 1]]
        return list(zip([first, *cuts], [*cuts, stop], strict=True))


def _group_start(token: int) -> int:
    return max(token, 0) // GROUP_TOKENS * GROUP_TOKENS


def _as_bf16(rows: Rows) -> Rows:
    codec = get_backend("cpu")
    decoded: Rows = codec.dequantize(codec.quantize(rows, "bf16", None, None), "bf16", None, None)
    return decoded
