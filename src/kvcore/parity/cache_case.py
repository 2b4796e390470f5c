"""Cases over a cache: a trace, what it must give, and other traces that must give the same bits."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from kvcore.formats import get_format
from kvcore.parity.expected import Expected, expect, same_bits
from kvcore.parity.found import Found
from kvcore.parity.played import Played, Setting, play_on
from kvcore.parity.subject import REFERENCE, Subject
from kvcore.parity.texts import Texts
from kvcore.parity.tolerances import excess, tolerance
from kvcore.parity.trace import Lengths, Trace, play
from kvcore.spec import CacheSpec

#: The shape of a cache where a case says nothing else.
SPEC = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 64, "block_size": 32}


@dataclass(frozen=True, eq=False)
class CacheCase:
    """A trace of a cache.

    Attributes:
        name: "topic/what".
        trace: what happens.
        spec: arguments of CacheSpec, over `SPEC`. int8_static gets scales of its own.
        group: query heads of a KV head.
        dtype: of q, k and v.
        options: names of attend's options.
        layout: of q, k, v and out.
        exact: as `Step.attend` has it.
        same: other traces; where they compute the same token of the same text, its bits are due.
        nans: (sequence, token, KV head, "k" or "v") of rows that are NaN.
    """

    name: str
    trace: Trace
    spec: dict[str, Any] = field(default_factory=dict)
    group: int = 2
    dtype: str = "float32"
    options: tuple[str, ...] = ()
    layout: str = "NHD"
    exact: bool = False
    same: tuple[Trace, ...] = ()
    nans: tuple[tuple[str, int, int, str], ...] = ()

    def run(self, subject: Subject) -> Found:
        """Plays the case twice on a backend and compares."""
        first = play_on(subject, self._setting, self.trace, self._texts)
        again = play_on(subject, self._setting, self.trace, self._texts)
        messages = self._compare_reads(first)
        worst = self._worst(subject, first)
        if not worst <= 1:
            messages.append(f"error {worst:.3g} times what is allowed")
        same_again = _same_played(first, again)
        if not same_again:
            messages.append("other bits the second time")
        same_bytes = first.blocks == self._reference.blocks
        if not same_bytes:
            messages.append("other bytes in the blocks than the CPU's")
        for i, trace in enumerate(self.same):
            other = play_on(subject, self._setting, trace, self._texts)
            if not _same_tokens(first, other):
                same_again = False
                messages.append(f"other bits for the same tokens in trace {i}")
        return Found(worst, same_again, same_bytes, "; ".join(messages))

    # ---- what is the same for every backend

    @cached_property
    def _lengths(self) -> Lengths:
        lengths = Lengths()
        for trace in (self.trace, *self.same):
            play(trace, lengths, lengths)
        return lengths

    @cached_property
    def _setting(self) -> Setting:
        spec = CacheSpec(**{**SPEC, **_scales(self.spec), **self.spec})
        size = min(group.block_size for group in spec.groups)
        num_blocks = self._lengths.count * (-(-self._lengths.most // size) + 1)
        return Setting(spec, num_blocks, self.group, self.options, self.layout, self.exact)

    @cached_property
    def _texts(self) -> Texts:
        return Texts(self._setting.spec, self.group, self.dtype, self._lengths.most, self.nans)

    @cached_property
    def _expected(self) -> Expected:
        return expect(self._setting.spec, self.trace, self._texts, self.group, self.options)

    @cached_property
    def _reference(self) -> Played:
        return play_on(REFERENCE, self._setting, self.trace, self._texts, attends=False)

    # ---- comparisons

    def _worst(self, subject: Subject, played: Played) -> float:
        worst = 0.0
        for call, references in zip(played.attended, self._expected.attended, strict=True):
            layers = self._setting.spec.layers
            layer = layers[layers[call.layer].kv_source]
            for (entry, out, lse), reference in zip(call.parts(), references, strict=True):
                num_new = entry.stop - entry.first
                with subject.active():
                    allowed = tolerance(subject, layer, num_new, self.group, self.exact)
                worst = max(worst, excess(out, lse, reference, allowed))
        return worst

    def _compare_reads(self, played: Played) -> list[str]:
        wrong = []
        for (name, layer), pair in self._expected.reads.items():
            got = played.reads[name, layer]
            for which, rows, expected in zip("KV", got, pair, strict=True):
                # What a retention released is not read.
                if not same_bits(rows, expected[len(expected) - len(rows) :]):
                    wrong.append(f"{which} of sequence {name}, layer {layer}, read back otherwise")
        return wrong


def _same_played(a: Played, b: Played) -> bool:
    outs = all(
        same_bits(x.out, y.out) and same_bits(x.lse, y.lse)
        for x, y in zip(a.attended, b.attended, strict=True)
    )
    return outs and a.blocks == b.blocks


def _same_tokens(a: Played, b: Played) -> bool:
    """Whether tokens that both computed have the same bits; they share some, or it is False."""
    known = _by_token(a)
    other = _by_token(b)
    shared = known.keys() & other.keys()
    return bool(shared) and all(known[key] == other[key] for key in shared)


def _by_token(played: Played) -> dict[tuple[int, str, int], tuple[bytes, bytes]]:
    found = {}
    for call in played.attended:
        for entry, out, lse in call.parts():
            for i, token in enumerate(range(entry.first, entry.stop)):
                found[call.layer, entry.text, token] = out[i].tobytes(), lse[i].tobytes()
    return found


def _scales(spec: dict[str, Any]) -> dict[str, Any]:
    """Scales for the sides that are int8_static."""
    shape = {**SPEC, **spec}
    rng = np.random.default_rng(0)
    size = shape["num_layers"], shape["num_kv_heads"], shape["head_dim"]
    formats = {"key_scales": spec.get("k_format"), "value_scales": spec.get("v_format")}
    return {
        argument: rng.uniform(0.01, 0.05, size).astype(np.float32)
        for argument, name in formats.items()
        if name is not None and get_format(name).name == "int8_static"
    }
