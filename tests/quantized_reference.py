"""What a sequence of a quantized cache holds, by DESIGN's rules, out of ops.quantize alone."""

from __future__ import annotations

import numpy as np

from kvcore import ops
from kvcore.formats import get_format
from support import BFLOAT16

GROUP = 32


def decoded(rows, name, **channels):
    """Rows [n, H, D] as the format gives them back; whole groups for channel formats."""
    heads = np.ascontiguousarray(np.asarray(rows, np.float32).swapaxes(0, 1))
    parts = [
        ops.dequantize(
            ops.quantize(x, name, **{n: c[h] for n, c in channels.items()}),
            name,
            **{n: c[h] for n, c in channels.items()},
        )
        for h, x in enumerate(heads)
    ]
    return np.stack(parts).reshape(heads.shape).swapaxes(0, 1)


def bf16(rows):
    return np.asarray(rows, np.float32).astype(BFLOAT16).astype(np.float32)


class Side:
    """K or V of one sequence and layer."""

    def __init__(self, name, raw_first, raw_last, keeps_raw, **channels):
        self.name, self.format, self.channels = name, get_format(name), channels
        self.raw_first, self.raw_last = raw_first, raw_last
        self.keeps_raw = keeps_raw and self.format.is_quantized
        self.raw = self.encoded = None

    def fork(self):
        other = Side(self.name, self.raw_first, self.raw_last, self.keeps_raw, **self.channels)
        other.raw, other.encoded = self.raw.copy(), self.encoded.copy()
        return other

    def __len__(self):
        return 0 if self.raw is None else len(self.raw)

    def append(self, rows):
        rows, start = np.asarray(rows, np.float32), len(self)
        encoded = np.full_like(rows, np.nan)
        if not self.format.is_quantized:
            encoded = rows.astype(BFLOAT16).astype(np.float32) if self.name == "bf16" else rows
        elif self.format.kind == "row":
            encoded = decoded(rows, self.name, **self.channels)
        if self.raw is None:
            self.raw, self.encoded = bf16(rows), encoded
        else:
            self.raw = np.concatenate([self.raw, bf16(rows)])
            self.encoded = np.concatenate([self.encoded, encoded])
        if self.format.kind == "channel":
            first, stop = start // GROUP * GROUP, len(self) // GROUP * GROUP
            if stop > first:
                rows = self.raw[first:stop].copy()
                if first == 0 and self.raw_first < GROUP:
                    rows[: self.raw_first] = rows[self.raw_first]
                sealed = decoded(rows, self.name, **self.channels)
                self.encoded[first:stop] = sealed

    def raw_start(self, position):
        return max(0, (position + 1) // GROUP * GROUP - self.raw_last)

    def truncate(self, length):
        """Raw rows that were released come back from the encoded ones."""
        before = len(self)
        lost = max(0, before - max(self.raw_last, 1) + 1) // GROUP * GROUP
        if self.keeps_raw:
            pinned = GROUP if self.raw_first else 0
            first = max(length - max(self.raw_last, 1) + 1, 0) // GROUP * GROUP
            rows = np.arange(max(first, pinned), min(lost, length))
            self.raw[rows] = bf16(self.encoded[rows])
        self.raw, self.encoded = self.raw[:length], self.encoded[:length]

    def seen(self, position, length):
        """All rows up to `length` as the query stored at `position` reads them."""
        rows = self.encoded[:length].copy()
        if self.keeps_raw:
            raw, start = np.arange(length), self.raw_start(position)
            if self.format.kind == "channel" and start > length:
                start = length // GROUP * GROUP  # sealed with the next token
            raw = raw[(raw < self.raw_first) | (raw >= start)]
            rows[raw] = self.raw[raw]
        return rows
