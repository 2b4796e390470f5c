"""What is measured: attention and append over given batches, and what each must read or compute."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

import kvcore
from bench.formats import RAW_FIRST, RAW_LAST, is_quantized, k_and_v
from kvcore.formats import GROUP_TOKENS, Format, get_format

KINDS = ("decode", "prefill", "append")
DEFAULT_BLOCK_SIZE = 64


@dataclass(frozen=True)
class Case:
    """One call on one layer.

    Attributes:
        kind: "decode" (limited by reading the cache), "prefill" (limited by arithmetic) or
            "append" (limited by writing the cache).
        stored: tokens that each sequence has in the cache before the step.
        new: new tokens of each sequence.
        num_heads, num_kv_heads, head_dim: Hq, H and D.
        block_size: B of kvcore's cache.
        shared: tokens at the start of every sequence that are the same, and that kvcore holds
            once. For kind "decode".
    """

    name: str
    kind: str
    stored: tuple[int, ...]
    new: tuple[int, ...]
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    block_size: int = DEFAULT_BLOCK_SIZE
    shared: int = 0

    @property
    def seq_lens(self) -> tuple[int, ...]:
        return tuple(s + n for s, n in zip(self.stored, self.new, strict=True))

    @property
    def num_tokens(self) -> int:
        return sum(self.new)

    @property
    def query_starts(self) -> list[int]:
        return [0, *np.cumsum(self.new).tolist()]

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.head_dim)

    def spec(
        self, kv_format: str, num_layers: int = 1, data: Data | None = None
    ) -> kvcore.CacheSpec:
        """Layers alike. int8_static takes its scales from `data`."""
        k_format, v_format = k_and_v(kv_format)
        options: dict[str, Any] = {}
        if is_quantized(kv_format):
            options = {"raw_first": RAW_FIRST, "raw_last": RAW_LAST}
        for side, name in ((k_format, "key_scales"), (v_format, "value_scales")):
            if side.name == "int8_static" and data is not None:
                scales = _channel_scales(data.k if name == "key_scales" else data.v)
                options[name] = np.broadcast_to(scales, (num_layers, *scales.shape))
        return kvcore.CacheSpec(
            num_layers=num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            block_size=self.block_size,
            k_format=k_format.name,
            v_format=v_format.name,
            **options,
        )

    def kv_bytes(self, kv_format: str) -> int:
        """Bytes of K and V that the call must read, or for an append write, raw rows included."""
        return sum(self.stored_bytes(kv_format)) + self.raw_bytes(kv_format)

    def stored_bytes(self, kv_format: str) -> tuple[int, int]:
        """The part of kv_bytes that is K's and V's in their formats, metadata included."""
        k, v = (
            self.touched_rows(side)[0] * self.num_kv_heads * side.row_nbytes(self.head_dim)
            for side in k_and_v(kv_format)
        )
        return k, v

    def raw_bytes(self, kv_format: str) -> int:
        """The part of kv_bytes that is rows of quantized K and V in bf16."""
        rows = sum(self.touched_rows(side)[1] for side in k_and_v(kv_format))
        return rows * self.num_kv_heads * get_format("bf16").row_nbytes(self.head_dim)

    def row_bytes(self, kv_format: str) -> int:
        """Bytes of a token's K and V in their formats."""
        sides = k_and_v(kv_format)
        return self.num_kv_heads * sum(side.row_nbytes(self.head_dim) for side in sides)

    @property
    def touched_tokens(self) -> int:
        """Tokens of which the call must read, or for an append write, K and V; shared ones once."""
        if self.kind == "append":
            return self.num_tokens
        return sum(self.seq_lens) - self.shared * (len(self.seq_lens) - 1)

    def touched_rows(self, side: Format) -> tuple[int, int]:
        """Of those tokens: how many in K's or V's own format, and how many raw.

        A prefill's first rows read raw what later ones read encoded: it touches both.
        """
        if not side.is_quantized:
            return self.touched_tokens, 0
        pairs = list(zip(self.stored, self.seq_lens, strict=True))
        if self.kind == "append":
            if side.kind == "row":
                return self.num_tokens, self.num_tokens
            return sum(_whole_groups(n) - _whole_groups(s) for s, n in pairs), self.num_tokens
        encoded, raw = [], []
        for stored, seq_len in pairs:
            tokens = np.arange(seq_len)
            encoded.append((tokens >= RAW_FIRST) & (tokens < _whole_groups(seq_len) - RAW_LAST))
            raw.append((tokens < RAW_FIRST) | (tokens >= _whole_groups(stored + 1) - RAW_LAST))
        return self._once(encoded), self._once(raw)

    def _once(self, marks: list[np.ndarray]) -> int:
        """Marked tokens of all sequences, shared ones once."""
        own = sum(int(mark[self.shared :].sum()) for mark in marks)
        return own + int(np.any([mark[: self.shared] for mark in marks], axis=0).sum())

    @property
    def appended_rows(self) -> int:
        """Rows of K and V that the step adds."""
        return 2 * self.num_tokens * self.num_kv_heads

    @property
    def flops(self) -> int:
        """4 for each head, dim and visible (query, key) pair: one fma for q.k and one for p.v."""
        if self.kind == "append":
            return 0
        pairs = sum(n * s + n * (n + 1) // 2 for s, n in zip(self.stored, self.new, strict=True))
        return 4 * pairs * self.num_heads * self.head_dim

    @property
    def description(self) -> str:
        heads = f"{self.num_heads}/{self.num_kv_heads} heads of {self.head_dim}"
        if self.block_size != DEFAULT_BLOCK_SIZE:
            heads += f", blocks of {self.block_size}"
        lengths, count = _span(self.seq_lens), len(self.new)
        if self.kind == "append":
            return (
                f"append {_span(self.new)} new to each of {count} x {_span(self.stored)}, {heads}"
            )
        if self.kind == "decode":
            sharing = f", {self.shared} tokens shared" if self.shared else ""
            return f"decode, batch {count}, contexts {lengths}{sharing}, {heads}"
        return f"prefill, {_span(self.new)} new on {_span(self.stored)} stored, {heads}"


def _whole_groups(num_tokens: int) -> int:
    """Tokens in whole groups, which are encoded; what is raw begins and ends with groups."""
    return num_tokens // GROUP_TOKENS * GROUP_TOKENS


def _channel_scales(rows: list[np.ndarray]) -> np.ndarray:
    """int8's step for the largest magnitude of each head and channel [H, D]."""
    peak: np.ndarray = np.max([np.abs(part).max(axis=0) for part in rows], axis=0)
    return peak / 127


def _span(values: tuple[int, ...]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def decode(name: str, seq_lens: list[int], **sizes: int) -> Case:
    """One new token for each sequence; `seq_lens` count it."""
    return Case(name, "decode", tuple(n - 1 for n in seq_lens), (1,) * len(seq_lens), **sizes)


def _append(name: str, num_sequences: int, stored: int, num_new: int) -> Case:
    return Case(name, "append", (stored,) * num_sequences, (num_new,) * num_sequences)


_RAGGED = np.random.default_rng(20).integers(256, 4097, 16).tolist()

CASES = {
    case.name: case
    for case in (
        decode("decode-4k", [4096]),
        decode("decode-32k", [32768]),
        decode("decode-ragged", _RAGGED),
        decode("decode-mha", [2048] * 8, num_kv_heads=32),
        decode("decode-mha-1024", [2048] * 8, num_kv_heads=32, block_size=1024),
        decode("decode-gqa8", [32768], num_kv_heads=4),
        decode("decode-smollm2", [2048] * 8, num_heads=9, num_kv_heads=3, head_dim=64),
        decode("decode-shared", [4097] * 8, shared=4096),
        decode("decode-shared-mha", [4097] * 8, shared=4096, num_kv_heads=32),
        Case("prefill-2k", "prefill", (0,), (2048,)),
        Case("prefill-chunk", "prefill", (8192,), (512,)),
        _append("append-1", 1, 63, 1),
        _append("append-16x1", 16, 63, 1),
        _append("append-128", 1, 128, 128),
        _append("append-2k", 1, 0, 2048),
    )
}


def expand(names: Iterable[str]) -> list[str]:
    """Names of cases; the name of a kind stands for all its cases."""
    return [
        case.name for name in names for case in CASES.values() if name in (case.name, case.kind)
    ]


@dataclass(frozen=True)
class Data:
    """Random contents in float32.

    Attributes:
        q: [T, Hq, D], the new tokens of all sequences one after the other.
        k, v: for each sequence [seq_len, H, D], the new tokens last.
    """

    q: np.ndarray
    k: list[np.ndarray]
    v: list[np.ndarray]

    @classmethod
    def random(cls, case: Case, seed: int = 0) -> Data:
        rng = np.random.default_rng(seed)

        def normal(tokens: int, heads: int) -> np.ndarray:
            return rng.standard_normal((tokens, heads, case.head_dim), np.float32)

        def rows() -> list[np.ndarray]:
            prefix = normal(case.shared, case.num_kv_heads)
            own = (normal(n - case.shared, case.num_kv_heads) for n in case.seq_lens)
            return [np.concatenate([prefix, part]) if case.shared else part for part in own]

        return cls(q=normal(case.num_tokens, case.num_heads), k=rows(), v=rows())

    def new(self, case: Case) -> tuple[np.ndarray, np.ndarray]:
        """K and V of the new tokens, [T, H, D]."""
        return (
            np.concatenate([rows[-n:] for rows, n in zip(self.k, case.new, strict=True)]),
            np.concatenate([rows[-n:] for rows, n in zip(self.v, case.new, strict=True)]),
        )
