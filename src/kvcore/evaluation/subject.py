"""A cache under test: its sequences, and what is collected about it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvcore.evaluation.cases import Case
from kvcore.evaluation.metrics import Comparison, join, perplexity, relative_change
from kvcore.evaluation.results import LONG, Recall, Result, Sizes, TextResult
from kvcore.evaluation.witness import OutputErrors

if TYPE_CHECKING:
    from kvcore.models import Device
    from kvcore.spec import CacheSpec


class Subject:
    """One case at work.

    Args:
        case: what it is.
        spec: of its cache.
        device: where that lies.
        num_tokens: the longest text, what is decoded behind it included.
        chunk: the most tokens of one step.

    Attributes:
        own: a sequence for the run over this cache.
        shadow: a sequence for q, k and v of the reference's run.
        errors: of the outputs of attention over `shadow`.
        seconds: of each decoded token.
    """

    def __init__(
        self, case: Case, spec: CacheSpec, device: Device, num_tokens: int, chunk: int
    ) -> None:
        self.case = case
        blocks = [2 * group.blocks_for(num_tokens, chunk) for group in spec.groups]
        self.cache = device.make_cache(spec, num_blocks=blocks)
        self.own = self.cache.sequence()
        self.shadow = self.cache.sequence()
        self.errors = OutputErrors(spec.num_layers, device.get)
        self.seconds: list[float] = []
        self._passages: dict[str, list[Comparison]] = defaultdict(list)

    def restart(self) -> None:
        """Forgets the tokens of both sequences."""
        self.own.truncate(0)
        self.shadow.truncate(0)

    def record(self, passage: str, comparison: Comparison) -> None:
        """Takes the next positions of a passage."""
        self._passages[passage].append(comparison)

    def passage(self, name: str) -> Comparison:
        """All positions of a passage."""
        return join(self._passages[name])


def summarize(
    subject: Subject, reference: Subject, texts: Sequence[str], recall: Sequence[str], length: int
) -> Result:
    """The result of a subject after all passages.

    Args:
        reference: the float32 cache.
        texts, recall: the names of the passages.
        length: tokens of each text.
    """
    passages = {name: subject.passage(name) for name in texts}
    nll = _targeted_nll(passages.values())
    reference_nll = _targeted_nll(map(reference.passage, texts))
    change, change_error = relative_change(nll, reference_nll)
    positions = join(passages.values())
    return Result(
        case=subject.case,
        sizes=sizes_of(subject.cache.spec, length),
        texts={name: _text_result(passage) for name, passage in passages.items()},
        perplexity=perplexity(nll),
        perplexity_change=change,
        perplexity_change_error=change_error,
        kl=float(positions.kl.mean()),
        agreement=100 * float(positions.agrees.mean()),
        recall=_recall(subject, reference, recall) if recall else None,
        error_mean=tuple(subject.errors.mean.tolist()),
        error_largest=tuple(subject.errors.largest.tolist()),
        tokens_per_second=1 / float(np.median(subject.seconds)),
    )


def sizes_of(spec: CacheSpec, length: int) -> Sizes:
    """What a sequence takes in a cache of `spec`, among others at `length` tokens."""
    return Sizes(
        bits_per_element=spec.bits_per_element(),
        bits_at_length=spec.bits_per_element(length),
        bits_at_32k=spec.bits_per_element(LONG),
        bytes_per_token=spec.bytes_per_token,
        break_even_length=spec.break_even_length(),
    )


def _text_result(passage: Comparison) -> TextResult:
    return TextResult(
        perplexity=perplexity(_targeted_nll([passage])),
        kl=float(passage.kl.mean()),
        agreement=100 * float(passage.agrees.mean()),
    )


def _recall(subject: Subject, reference: Subject, names: Sequence[str]) -> Recall:
    """Positions that predict a token of the second copy."""

    def second(subject: Subject, field: str) -> NDArray[Any]:
        parts = [getattr(subject.passage(name), field) for name in names]
        return np.concatenate([part[len(part) // 2 - 1 : -1] for part in parts])

    nll = float(second(subject, "nll").mean())
    return Recall(
        nll=nll,
        extra=nll - float(second(reference, "nll").mean()),
        hits=100 * float(second(subject, "hits").mean()),
    )


def _targeted_nll(passages: Iterable[Comparison]) -> NDArray[np.float64]:
    """The nll of all positions but each passage's last, whose target nobody knows."""
    return np.concatenate([passage.nll[:-1] for passage in passages])
