"""What a trace must give: the exact attention of its steps, and what its sequences then hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcore.parity import oracle
from kvcore.parity.held import Held
from kvcore.parity.options import Entry, for_oracle
from kvcore.parity.texts import Texts
from kvcore.parity.trace import Step, Trace, play
from kvcore.spec import CacheSpec


@dataclass
class Expected:
    """What a trace must give.

    Attributes:
        attended: for each attend, in order, one exact result a sequence.
        reads: {(sequence, layer): (K, V)} as `Sequence.read` gives them in the end.
    """

    attended: list[list[oracle.Reference]] = field(default_factory=list)
    reads: dict[tuple[str, int], tuple[NDArray[Any], NDArray[Any]]] = field(default_factory=dict)


def expect(
    spec: CacheSpec, trace: Trace, texts: Texts, group: int, options: tuple[str, ...]
) -> Expected:
    """Works out a trace in float64.

    Args:
        group: query heads of a KV head.
        options: names of attend's options.
    """
    player = _Model(spec, texts, group, options)
    with _one_blas_thread():
        play(trace, player, texts)
        return player.finish()


class _Model:
    """Plays a trace over rows that are kept as they are."""

    def __init__(self, spec: CacheSpec, texts: Texts, group: int, options: tuple[str, ...]) -> None:
        self._spec, self._texts, self._group, self._options = spec, texts, group, options
        self._held: dict[str, Held] = {}
        self._expected = Expected()

    def finish(self) -> Expected:
        for name, held in self._held.items():
            for layer in range(self._spec.num_layers):
                self._expected.reads[name, layer] = held.seen(layer, held.length)
        return self._expected

    def begin(self, name: str) -> None:
        self._held[name] = Held(self._spec)

    def fork(self, parent: str, child: str, length: int) -> None:
        self._held[child] = self._held[parent].copy()
        self.truncate(child, length)

    def truncate(self, name: str, length: int) -> None:
        if length < self._held[name].length:
            self._held[name].truncate(length)

    def free(self, name: str) -> None:
        del self._held[name]

    def step(self, action: Step, texts: list[str]) -> None:
        held = [self._held[name] for name, _ in action.news]
        if not action.commits:
            held = [one.copy() for one in held]
        entries = [
            Entry(text, one.length, one.length + count)
            for one, text, (_, count) in zip(held, texts, action.news, strict=True)
        ]
        for one, entry in zip(held, entries, strict=True):
            for layer in one.sides:
                k, v = (
                    self._texts.rows(kind, layer, entry.text, entry.first, entry.stop)
                    for kind in "kv"
                )
                one.append(layer, k, v)
            one.length = entry.stop
        if action.attends:
            for layer in range(self._spec.num_layers):
                self._expected.attended.append(
                    [
                        self._attend(layer, one, entry)
                        for one, entry in zip(held, entries, strict=True)
                    ]
                )

    def _attend(self, layer: int, held: Held, entry: Entry) -> oracle.Reference:
        q = self._texts.rows("q", layer, entry.text, entry.first, entry.stop)
        sight, scoring = for_oracle(self._options, entry, q.shape[1])
        visible, distance = oracle.visible_tokens(
            entry.first, entry.stop - entry.first, entry.stop, **sight
        )
        parts = []
        for start, stop in held.readers(layer, entry.first, entry.stop):
            rows = slice(start - entry.first, stop - entry.first)
            k, v = held.seen(layer, start)
            parts.append(oracle.attention(q[rows], k, v, visible[rows], distance[rows], **scoring))
        return oracle.Reference.concatenate(parts)


@contextlib.contextmanager
def _one_blas_thread() -> Iterator[None]:
    """Many small products are slower on many threads; where it can be told, one has to do."""
    blas = _blas()
    if blas is None:
        yield
        return
    with blas.limit(limits=1, user_api="blas"):
        yield


@cache
def _blas() -> Any | None:
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    return ThreadpoolController()


def same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether two arrays are equal byte for byte, NaN and the sign of zero included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    x, y = (np.ascontiguousarray(array).view(np.uint8) for array in (a, b))
    return bool(np.array_equal(x, y))
