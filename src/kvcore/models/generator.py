"""A model at work on a cache: prompts in, tokens out as they come."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cache import KVCache
from ..errors import InvalidArgument, InvalidType, ModelFileError, OutOfBlocks
from .completion import Completion, FinishReason, Metrics, TokenEvent
from .prompts import Prompt, encode_prompt, text_length
from .sampling import Sampler, SamplingParams, sample_batch
from .scheduler import Request, Scheduler, Work
from .stopping import Stop, StopMatcher, StopRules

if TYPE_CHECKING:
    from . import Model
    from .tokenizer import TokenStream


@dataclass(eq=False, kw_only=True)
class TextRequest(Request):
    """A request and the making of its text."""

    index: int
    sampler: Sampler
    stop_tokens: frozenset[int]
    matcher: StopMatcher
    characters: TokenStream | None
    pieces: list[str] = field(default_factory=list)

    def accept(self, token: int) -> TokenEvent:
        """Takes the next token."""
        self.tokens.append(token)
        reason: FinishReason | None = None
        if token in self.stop_tokens:
            reason = "stop"
        elif len(self.tokens) >= self.max_length:
            reason = "length"
        text = ""
        if self.characters is not None:
            if reason != "stop":
                text = self.matcher.push(self.characters.push(token))
            if reason and not self.matcher.stopped:
                text += self.matcher.push(self.characters.flush())
            if self.matcher.stopped:
                reason = "stop"
            elif reason:
                text += self.matcher.finish()
        self.pieces.append(text)
        completion = self._completion(reason) if reason else None
        return TokenEvent(self.index, token, text, completion)

    def _completion(self, reason: FinishReason) -> Completion:
        return Completion(
            index=self.index,
            prompt_tokens=self.tokens[: self.num_prompt],
            tokens=self.tokens[self.num_prompt :],
            text="".join(self.pieces),
            finish_reason=reason,
            num_cached=self.num_cached or 0,
            num_preemptions=self.num_preemptions,
        )


class Generator:
    """A model at work on a cache: add prompts at any time, step until all texts are finished.

    ```python
    with Generator(model, cache) as generator:
        generator.add("Once upon a time", max_tokens=20)
        while generator:
            for event in generator.step():
                print(event.text, end="")
    ```

    Args:
        model: from `kvcore.models.load`.
        cache: a cache of the model's shape on its device, see `model.cache_spec` and
            `model.device.make_cache`. Others may use it as well.
        max_batch: texts that advance together, at most. Up to 16, a decode step's matrix products
            give each text the bits that it would get alone.
        prefill_budget: prompt tokens in one step, at most.

    Raises:
        InvalidArgument: the cache is not of the model's shape or not on its device, or a number is
            below 1.
    """

    def __init__(
        self, model: Model, cache: KVCache, *, max_batch: int = 16, prefill_budget: int = 512
    ) -> None:
        _check_cache(model, cache)
        self.model = model
        self.cache = cache
        self.metrics = Metrics()
        self.scheduler: Scheduler[TextRequest] = Scheduler(
            cache, max_batch=max_batch, prefill_budget=prefill_budget
        )
        self._num_added = 0

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __bool__(self) -> bool:
        """Whether there is work left."""
        return bool(self.scheduler)

    def add(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = 256,
        sampling: SamplingParams | None = None,
        stop: Stop = None,
        ignore_eos: bool = False,
        salt: str | None = None,
    ) -> int:
        """Queues a prompt.

        Args:
            prompt: text, token ids, or chat messages ({"role": ..., "content": ...}).
            max_tokens: tokens to generate, at most; None for as many as the model's context holds,
                which ends a text in any case.
            sampling: how to choose tokens; None is greedy.
            stop: strings and token ids that end the text, beside the model's end tokens.
            ignore_eos: go on after the model's end tokens.
            salt: share cached prefixes only with requests of the same salt.

        Returns:
            The index that the prompt's events carry.

        Raises:
            InvalidArgument, InvalidType: an argument is not as described, the prompt is empty, has
                ids outside the vocabulary, or does not fit the context or the cache.
            OutOfBlocks: the whole cache is too small for a text of max_tokens.
            ModelFileError: the prompt is text and the model has no tokenizer.
        """
        sampling = SamplingParams() if sampling is None else sampling
        if not isinstance(sampling, SamplingParams):
            raise InvalidType(f"sampling: expected SamplingParams, got {type(sampling).__name__}")
        rules = StopRules.parse(stop, self.model.config.vocab_size)
        tokens = encode_prompt(self.model, prompt)
        request = TextRequest(
            tokens=tokens,
            max_length=text_length(self.model, len(tokens), max_tokens),
            salt=salt,
            index=self._num_added,
            sampler=Sampler(sampling, tokens),
            stop_tokens=rules.tokens if ignore_eos else rules.tokens | self.model.eos_ids,
            matcher=StopMatcher(rules.strings),
            characters=_token_stream(self.model, needed=bool(rules.strings)),
        )
        self.scheduler.add(request)
        self._num_added += 1
        return request.index

    def step(self) -> list[TokenEvent]:
        """Runs the model once over what the scheduler chose; returns the tokens that it gave.

        The list is empty while prompts are still being read. When anything is raised, Ctrl-C
        included, the step is rolled back, no request holds blocks, and each waits with the tokens
        it has: a later call resumes, `close` ends them.

        Raises:
            OutOfBlocks: others hold so many of the cache's blocks that not one request can go on.
        """
        start = time.perf_counter()
        try:
            with self.model.device.active():
                batch = self._schedule_and_run()
            events = []
            for work, token in batch:
                if token is not None:
                    events.append(work.request.accept(token))
                    if events[-1].completion is not None:
                        self.scheduler.remove(work.request)
        except BaseException:
            self.scheduler.suspend()
            raise
        if batch:
            decodes = all(work.tokens.size == 1 and work.wants_logits for work, _ in batch)
            phase = self.metrics.decode if decodes else self.metrics.prefill
            phase.tokens += sum(work.tokens.size for work, _ in batch)
            phase.seconds += time.perf_counter() - start
            self.metrics.steps += 1
        return events

    def cancel(self, index: int) -> None:
        """Drops an unfinished request and frees its blocks.

        Raises:
            InvalidArgument: no unfinished request has this index.
        """
        for request in (*self.scheduler.running, *self.scheduler.waiting):
            if request.index == index:
                self.scheduler.remove(request)
                return
        raise InvalidArgument(f"index: expected that of an unfinished request, got {index!r}")

    def close(self) -> None:
        """Drops every unfinished request and frees its blocks."""
        self.scheduler.clear()

    def _schedule_and_run(self) -> list[tuple[Work[TextRequest], int | None]]:
        """One step: its work, and the token that each request got, if it was to get one."""
        while batch := self.scheduler.schedule():
            try:
                step = self.cache.step([(work.sequence, work.tokens) for work in batch])
            except OutOfBlocks:
                if len(self.scheduler.running) == 1:
                    raise
                self.scheduler.preempt()
                self.metrics.preemptions += 1
                continue
            with step:
                tokens = np.concatenate([work.tokens for work in batch])
                rows = [row for row, work in enumerate(batch) if work.wants_logits]
                logits = self.model.decoder.forward(step, tokens, logits="last" if rows else "none")
                chosen = self._choose(batch, rows, logits) if rows else {}
            return [(work, chosen.get(row)) for row, work in enumerate(batch)]
        return []

    def _choose(
        self, batch: list[Work[TextRequest]], rows: list[int], logits: Any
    ) -> dict[int, int]:
        """The next token of these rows of a step's logits."""
        device = self.model.device
        if len(rows) < len(batch):
            logits = logits[device.put(np.asarray(rows))]
        samplers = [batch[row].request.sampler for row in rows]
        return dict(zip(rows, sample_batch(logits, samplers, device.get), strict=True))


def _token_stream(model: Model, needed: bool) -> TokenStream | None:
    """The model's incremental decoder; a model without a tokenizer takes and gives ids alone."""
    try:
        return model.tokenizer.stream()
    except ModelFileError:
        if needed:
            raise
        return None


def _check_cache(model: Model, cache: KVCache) -> None:
    model.device.check(cache, "cache")
    have = [(layer.num_kv_heads, layer.head_dim, layer.head_dim_v) for layer in cache.spec.layers]
    spec = model.cache_spec()
    want = [(layer.num_kv_heads, layer.head_dim, layer.head_dim_v) for layer in spec.layers]
    if have != want:
        raise InvalidArgument(
            f"cache: expected {len(want)} layers of (num_kv_heads, head_dim, head_dim_v) "
            f"{want[0]}, as the model has, got {len(have)} layers of {have[0]}"
        )
    for index, (layer, wanted) in enumerate(zip(cache.spec.layers, spec.layers, strict=True)):
        kept = cache.spec.groups[layer.group].retention
        window = spec.groups[wanted.group].retention
        if kept is not None and (window is None or window > kept):
            raise InvalidArgument(
                f"cache: expected layer {index} to keep "
                f"{'all' if window is None else f'the last {window}'} tokens, got {kept}"
            )
