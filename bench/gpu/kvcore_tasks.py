"""kvcore on the GPU: caches that are filled, and the calls whose graphs are timed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

import kvcore
from bench.gpu.targets import Target, dtype_of
from kvcore import arrays
from kvcore.step import Step

FILL_TOKENS = 131_072
RANDOM_VALUES = 1 << 22


class CacheTask:
    """A filled cache of a target and one step behind it.

    Args:
        target: the case.
        num_layers: layers, which calls go over in turns.
        xp: the module of the backend's arrays.
    """

    def __init__(self, target: Target, num_layers: int, xp: Any) -> None:
        case = target.case
        self.target, self.num_layers, self._xp = target, num_layers, xp
        spec = case.spec(target.kv_format, num_layers)
        size = case.block_size
        blocks = sum(-(-n // size) + 1 for n in case.seq_lens)
        chunk = max(max(case.new), FILL_TOKENS // len(case.new))
        raw = [spec.raw_blocks_for(n, chunk) for n in case.seq_lens]
        self.cache = kvcore.KVCache(spec, blocks, sum(raw) or None, backend="cuda")
        self._sequences = [self.cache.sequence() for _ in case.new]
        self._rows: dict[tuple[int, ...], Any] = {}
        done = [0] * len(case.new)
        while any(d < s for d, s in zip(done, case.stored, strict=True)):
            # All sequences in turns, so that their blocks lie mixed.
            news = [min(chunk, s - d) for d, s in zip(done, case.stored, strict=True)]
            entries = [(q, n) for q, n in zip(self._sequences, news, strict=True) if n]
            with self.cache.step(entries) as step:
                self._append(step)
            done = [d + n for d, n in zip(done, news, strict=True)]

    @contextmanager
    def step(self) -> Iterator[Step]:
        """The case's step, undone in the end."""
        step = self.cache.step(list(zip(self._sequences, self.target.case.new, strict=True)))
        try:
            yield step
        finally:
            step.rollback()

    def attend(self, step: Step) -> None:
        """Attends once in every layer, of a step that `_append` was called for."""
        case = self.target.case
        q = self.rows(step.num_tokens, case.num_heads)
        out = self.rows(step.num_tokens, case.num_heads, 1)
        for layer in range(self.num_layers):
            step.attend(layer, q, out=out)

    def append(self, step: Step) -> None:
        """Appends once in every layer, each from rows of its own."""
        for layer in range(self.num_layers):
            k, v = (self.rows(step.num_tokens, self.target.case.num_kv_heads, 2 * layer + i)
                    for i in range(2))  # fmt: skip
            step.append(layer, k, v)

    def _append(self, step: Step) -> None:
        k, v = (self.rows(step.num_tokens, self.target.case.num_kv_heads, i) for i in range(2))
        for layer in range(self.num_layers):
            step.append(layer, k, v)

    prepare = _append

    def rows(self, num_tokens: int, num_heads: int, copy: int = 0) -> Any:
        """Random rows [T, H, D] on the device, the same memory for the same arguments."""
        shape = num_tokens, num_heads, self.target.case.head_dim
        key = (*shape, copy)
        if key not in self._rows:
            name = dtype_of(self.target)
            dtype = arrays.bfloat16() if name == "bfloat16" else np.dtype(name)
            self._rows[key] = random_array(self._xp, shape, dtype, copy)
        return self._rows[key]


def random_array(xp: Any, shape: tuple[int, ...], dtype: np.dtype, seed: int) -> Any:
    """An array of the device with normal numbers, some millions of them again and again: a device
    moves and multiplies zeros faster than these."""
    few = np.random.default_rng(seed).standard_normal(RANDOM_VALUES, np.float32)
    return xp.asarray(np.resize(few.astype(dtype), shape))
