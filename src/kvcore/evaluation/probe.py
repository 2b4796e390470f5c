"""Runs a model over all caches side by side, against one in float32."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from kvcore import checks
from kvcore.errors import InvalidArgument
from kvcore.evaluation.calibration import Calibration
from kvcore.evaluation.cases import Case
from kvcore.evaluation.metrics import Reference
from kvcore.evaluation.results import Evaluation
from kvcore.evaluation.subject import Subject, summarize
from kvcore.evaluation.texts import Text, encode_text, packaged_texts
from kvcore.evaluation.witness import Witness

if TYPE_CHECKING:
    from kvcore.models import Model
    from kvcore.step import Step

Tokens = NDArray[np.int32]

REFERENCE = Case("fp32", "fp32")
# Tokens that are decoded to time them: the first ones warm up.
_TIMED, _WARM_UP = 13, 3
_RECALL_PASSAGES = 2


def evaluate(
    model: Model,
    cases: Sequence[Case],
    texts: Sequence[Text] | None = None,
    *,
    length: int = 1024,
    chunk: int = 512,
    recall_length: int = 512,
    block_size: int = 64,
    calibration: Calibration | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """What each case costs in accuracy, over real text that the model does not write itself.

    Every token attends through the cache of the case, and its logits are compared with those over a
    float32 cache. Beside that the queries, keys and values of the float32 run go through attention
    over each cache, which tells the errors of single layers.

    Args:
        model: from `kvcore.models.load`.
        cases: what to compare.
        texts: excerpts that come with kvcore when left out.
        length: tokens of each text. The model's context must have room for a few more.
        chunk: tokens of one step, at most. Steps of fewer than 16 take the path of decoding, whose
            arithmetic may differ; otherwise results depend on it by float32's rounding only.
        recall_length: tokens of the texts that are shown twice in random order, in two passages; 0
            leaves this test out.
        block_size: as in `CacheSpec`.
        calibration: for cases that need one.
        seed: of that order.
        progress: called with the number of tokens done, and of all.

    Raises:
        InvalidArgument: naming the argument.
    """
    checks.integer(chunk, "chunk", 1)
    room = model.config.max_context - _TIMED
    checks.integer(length, "length", 2, room)
    checks.integer(recall_length, "recall_length", 0, room // 2)
    chosen = packaged_texts() if texts is None else list(texts)
    names = [text.name for text in chosen]
    if not names or len(set(names)) < len(names):
        raise InvalidArgument(f"texts: expected at least one, with different names, got {names}")
    passages = {text.name: encode_text(model, text, length) for text in chosen}
    repeated = _recall_passages(np.concatenate(list(passages.values())), recall_length, seed)
    longest = max(length, 2 * recall_length) + _TIMED
    runs = [*repeated.items(), *passages.items()]
    with model.device.active():
        probe = _Probe(model, cases, longest, chunk, block_size, calibration)
        probe.track(progress, sum(len(tokens) for _, tokens in runs))
        for name, tokens in runs:
            probe.run(name, tokens, witness=name in passages)
        probe.time_decoding(tokens)
    results = [
        summarize(subject, probe.reference, list(passages), list(repeated), length)
        for subject in probe.subjects
    ]
    return Evaluation(
        model=model.source,
        length=length,
        chunk=chunk,
        recall_length=recall_length,
        device=model.device.describe(),
        reference=results[0],
        results=tuple(results[1:]),
    )


class _Probe:
    """The caches, and the runs over them.

    Attributes:
        subjects: the reference, then the cases.
    """

    def __init__(
        self,
        model: Model,
        cases: Sequence[Case],
        num_tokens: int,
        chunk: int,
        block_size: int,
        calibration: Calibration | None,
    ) -> None:
        self._model = model
        self._chunk = chunk
        specs = [(case, case.spec(model, block_size, calibration)) for case in (REFERENCE, *cases)]
        self.subjects = [
            Subject(case, spec, model.device, num_tokens, chunk) for case, spec in specs
        ]
        self.reference, *self._tested = self.subjects
        self._progress: Callable[[int, int], None] = lambda done, total: None
        self._done = self._total = 0

    def track(self, progress: Callable[[int, int], None], num_tokens: int) -> None:
        """Reports to `progress` from now on; `num_tokens` tokens will run over every cache."""
        self._progress, self._total = progress, num_tokens * len(self.subjects)

    def run(self, passage: str, tokens: Tokens, *, witness: bool) -> None:
        """Runs a passage over every cache.

        Args:
            witness: whether attention over each cache is compared with the reference's, too.
        """
        for subject in self.subjects:
            subject.restart()
        targets = np.append(tokens[1:], tokens[:1])  # the last one stands for what nobody knows
        for start in range(0, len(tokens), self._chunk):
            part = slice(start, start + self._chunk)
            logits = self._run_reference(tokens[part], witness)
            reference = Reference(logits, targets[part])
            self.reference.record(passage, reference.compare(logits))
            self._advance(len(logits))
            for subject in self._tested:
                logits = self._forward(subject, tokens[part], "all")
                subject.record(passage, reference.compare(logits))
                self._advance(len(logits))

    def time_decoding(self, tokens: Tokens) -> None:
        """Decodes some tokens behind the last passage, the caches taking turns."""
        for i in range(_TIMED):
            for subject in self.subjects:
                begin = time.perf_counter()
                self._forward(subject, tokens[i : i + 1], "last")
                if i >= _WARM_UP:
                    subject.seconds.append(time.perf_counter() - begin)

    def _run_reference(self, tokens: Tokens, witness: bool) -> Any:
        if not witness:
            return self._forward(self.reference, tokens, "all")
        with ExitStack() as stack:

            def begin(subject: Subject, sequence: Any) -> Step:
                return stack.enter_context(subject.cache.step([(sequence, len(tokens))]))

            step = begin(self.reference, self.reference.own)
            others = [begin(subject, subject.shadow) for subject in self._tested]
            watched = Witness(step, others, [subject.errors for subject in self._tested])
            return self._logits(cast("Step", watched), tokens, "all")

    def _forward(self, subject: Subject, tokens: Tokens, logits: str) -> Any:
        with subject.cache.step([(subject.own, len(tokens))]) as step:
            return self._logits(step, tokens, logits)

    def _logits(self, step: Step, tokens: Tokens, logits: str) -> Any:
        model = self._model
        return model.device.get(model.decoder.forward(step, tokens, logits=logits))

    def _advance(self, count: int) -> None:
        self._done += count
        self._progress(self._done, self._total)


def _recall_passages(tokens: Tokens, count: int, seed: int) -> dict[str, Tokens]:
    """Passages of `count` random ones of `tokens`, twice: of tokens that the model knows well.

    They differ from one another where there are enough, so that each has one way to go on.
    """
    if not count:
        return {}
    pool = np.unique(tokens)
    random = np.random.default_rng(seed)
    return {
        f"recall-{i}": np.tile(random.choice(pool, count, replace=len(pool) < count), 2)
        for i in range(_RECALL_PASSAGES)
    }
