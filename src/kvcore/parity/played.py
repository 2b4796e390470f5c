"""A trace played on a backend: what attend gave, what is read, and the bytes that lie there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcore.cache import KVCache
from kvcore.parity.layouts import from_layout, to_layout
from kvcore.parity.options import Entry, for_step
from kvcore.parity.subject import Subject
from kvcore.parity.texts import Texts
from kvcore.parity.trace import Step, Trace, play
from kvcore.sequence import Sequence
from kvcore.spec import CacheSpec


@dataclass(frozen=True)
class Setting:
    """What is the same in every trace of a case.

    Attributes:
        spec: the cache.
        num_blocks: blocks of each group.
        group: query heads of a KV head.
        options: names of attend's options.
        layout: of q, k, v and out.
        exact: as `Step.attend` has it.
    """

    spec: CacheSpec
    num_blocks: int
    group: int
    options: tuple[str, ...]
    layout: str
    exact: bool


@dataclass(frozen=True)
class Attended:
    """What one call of attend gave.

    Attributes:
        layer: the layer.
        entries: the step's sequences.
        out: [T, Hq, Dv].
        lse: [T, Hq].
    """

    layer: int
    entries: list[Entry]
    out: NDArray[Any]
    lse: NDArray[np.float32]

    def parts(self) -> list[tuple[Entry, NDArray[Any], NDArray[np.float32]]]:
        """Each sequence's rows."""
        cuts = np.cumsum([entry.stop - entry.first for entry in self.entries])[:-1]
        return list(
            zip(self.entries, np.split(self.out, cuts), np.split(self.lse, cuts), strict=True)
        )


@dataclass
class Played:
    """What came of a trace.

    Attributes:
        attended: each attend, in order.
        reads: {(sequence, layer): (K, V)} in the end.
        blocks: the bytes of every layer's K and V, in blocks that nobody owns too.
    """

    attended: list[Attended] = field(default_factory=list)
    reads: dict[tuple[str, int], tuple[NDArray[Any], NDArray[Any]]] = field(default_factory=dict)
    blocks: list[bytes] = field(default_factory=list)


def play_on(
    subject: Subject, setting: Setting, trace: Trace, texts: Texts, *, attends: bool = True
) -> Played:
    """Plays a trace on a backend; without `attends`, stores alone."""
    with subject.active():
        player = _Cache(subject, setting, texts, attends)
        play(trace, player, texts)
        return player.finish()


class _Cache:
    """Plays a trace over a cache."""

    def __init__(self, subject: Subject, setting: Setting, texts: Texts, attends: bool) -> None:
        self._subject, self._setting, self._texts = subject, setting, texts
        self._attends = attends
        self._cache: KVCache = subject.cache(setting.spec, setting.num_blocks)
        self._sequences: dict[str, Sequence] = {}
        self._played = Played()

    def finish(self) -> Played:
        self._cache.check()
        host, spec = self._subject.host, self._setting.spec
        for name, sequence in self._sequences.items():
            for layer in range(spec.num_layers):
                k, v = sequence.read(layer)
                self._played.reads[name, layer] = host(k), host(v)
        for layer in range(spec.num_layers):
            self._played.blocks += [host(x).tobytes() for x in self._cache.blocks(layer)]
        return self._played

    def begin(self, name: str) -> None:
        self._sequences[name] = self._cache.sequence()

    def fork(self, parent: str, child: str, length: int) -> None:
        self._sequences[child] = self._sequences[parent].fork(length)

    def truncate(self, name: str, length: int) -> None:
        self._sequences[name].truncate(length)

    def free(self, name: str) -> None:
        self._sequences.pop(name).free()

    def step(self, action: Step, texts: list[str]) -> None:
        sequences = [self._sequences[name] for name, _ in action.news]
        entries = [
            Entry(text, len(sequence), len(sequence) + count)
            for text, sequence, (_, count) in zip(texts, sequences, action.news, strict=True)
        ]
        counts = [count for _, count in action.news]
        layout, spec = self._setting.layout, self._setting.spec
        step = self._cache.step(list(zip(sequences, counts, strict=True)))
        with step:
            for layer, form in enumerate(spec.layers):
                if form.kv_source == layer:
                    k = self._rows("k", layer, entries, counts)
                    v = None if form.v_in_k else self._rows("v", layer, entries, counts)
                    step.append(layer, k, v, layout=layout)
                if action.attends and self._attends:
                    q = self._rows("q", layer, entries, counts)
                    given = for_step(self._setting.options, entries, self._num_heads(layer))
                    out, lse = step.attend(
                        layer, q, layout=layout, return_lse=True, exact=self._setting.exact, **given
                    )
                    rows = from_layout(self._subject.host(out), layout, counts)
                    lses = self._subject.host(lse)
                    self._played.attended.append(Attended(layer, entries, rows, lses))
            if not action.commits:
                step.rollback()

    def _num_heads(self, layer: int) -> int:
        return self._setting.spec.layers[layer].num_kv_heads * self._setting.group

    def _rows(self, kind: str, layer: int, entries: list[Entry], counts: list[int]) -> Any:
        parts = [self._texts.rows(kind, layer, e.text, e.first, e.stop) for e in entries]
        rows = to_layout(np.concatenate(parts), self._setting.layout, counts)
        return self._subject.array(rows)
