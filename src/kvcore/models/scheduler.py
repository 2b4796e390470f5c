"""Continuous batching: which tokens of which requests go into the next step.

Requests join and leave between steps. Every running request that has its prompt behind it gets one
token a step; prompts are cut into chunks under a token budget and ride along. When the cache runs
out of blocks, the youngest running request gives its blocks back and is computed again later. The
oldest always advances, so every request that fits the cache alone comes to its end.

The scheduler knows tokens, sequences and blocks, but neither models nor text.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from .. import checks
from ..cache import KVCache
from ..errors import InvalidArgument, OutOfBlocks, SequenceBusy
from ..sequence import Sequence
from ..spec import MAX_SLOTS, RawPool


@dataclass(eq=False)
class Request:
    """One text in the making.

    Attributes:
        tokens: the prompt and what was generated so far; some of it is stored in `sequence`.
        num_prompt: how many of them are the prompt.
        max_length: the text ends when `tokens` is this long.
        salt: only texts of the same salt share cached prefixes.
        sequence: the cache's part of the text; None while the request waits.
        num_cached: prompt tokens that were adopted from the cache when the request first ran.
        num_preemptions: how often it gave its blocks back.
    """

    tokens: list[int]
    max_length: int
    salt: str | None = None
    sequence: Sequence | None = None
    num_cached: int | None = None
    num_preemptions: int = 0
    num_prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)

    @property
    def num_pending(self) -> int:
        """Tokens that are known but not stored."""
        return len(self.tokens) - (0 if self.sequence is None else len(self.sequence))

    @property
    def decoding(self) -> bool:
        """Whether only the newest generated token is to be computed."""
        return len(self.tokens) > self.num_prompt and self.num_pending == 1


RequestT = TypeVar("RequestT", bound=Request)


@dataclass(frozen=True)
class Work(Generic[RequestT]):
    """A request's part in a step."""

    request: RequestT
    sequence: Sequence
    tokens: NDArray[np.int32]
    wants_logits: bool  # nothing is pending after these tokens: the next one can be chosen


class Scheduler(Generic[RequestT]):
    """Decides what each step computes, over one cache.

    Args:
        cache: may hold sequences of others as well; theirs are never touched.
        max_batch: requests that run at once, at most.
        prefill_budget: prompt tokens in one step, at most. Less keeps the others' tokens coming
            evenly; more gets through long prompts sooner. Lowered to what the cache's pools of raw
            rows take in one step.
    """

    def __init__(self, cache: KVCache, *, max_batch: int = 16, prefill_budget: int = 512) -> None:
        self.cache = cache
        self.max_batch = checks.integer(max_batch, "max_batch", 1)
        budget = checks.integer(prefill_budget, "prefill_budget", 1)
        self.prefill_budget = max(1, min(budget, _most_new(cache)))
        # Both by arrival, and all that run arrived before all that wait.
        self.running: list[RequestT] = []
        self.waiting: deque[RequestT] = deque()
        self._try_admission = True

    def __bool__(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: RequestT) -> None:
        """Queues a request.

        Raises:
            InvalidArgument: the whole cache is smaller than the prompt.
            OutOfBlocks: the whole cache is smaller than the text may become.
        """
        # The last token is chosen but never stored.
        num_stored = max(request.num_prompt, request.max_length - 1)
        pools = zip(self.cache.spec.pools, self.cache.stats().groups, strict=True)
        for number, (pool, stats) in enumerate(pools):
            if pool.retention is None and request.num_prompt > stats.total * pool.block_size:
                raise InvalidArgument(
                    f"prompt: expected at most {stats.total * pool.block_size} tokens, which is "
                    f"all that the cache holds, got {request.num_prompt}"
                )
            needed = pool.blocks_for(num_stored, self.prefill_budget)
            if needed > stats.total:
                raw_of = pool.group if isinstance(pool, RawPool) else None
                raise OutOfBlocks(number, needed, stats.total, raw_of)
        self.waiting.append(request)

    def schedule(self) -> list[Work[RequestT]]:
        """What the next step computes; empty when there is nothing to do."""
        budget = self.prefill_budget
        batch = []
        for request in self.running:
            if request.decoding:
                batch.append(_work(request, 1))
            elif budget:
                batch.append(_work(request, budget))
                budget -= batch[-1].tokens.size
        while budget and self._admit():
            batch.append(_work(self.running[-1], budget))
            budget -= batch[-1].tokens.size
        return batch

    def preempt(self) -> RequestT:
        """Takes the blocks of the youngest running request; it runs again when there is room."""
        request = self._requeue_youngest()
        request.num_preemptions += 1
        # What it gave back is for the others: nobody joins before one of them leaves.
        self._try_admission = False
        return request

    def suspend(self) -> None:
        """Takes the blocks of all running requests; they run again with the next step."""
        while self.running:
            self._requeue_youngest()

    def remove(self, request: RequestT) -> None:
        """Frees a request that came to its end or is not wanted any more."""
        self._release(request)
        queue = self.running if request in self.running else self.waiting
        queue.remove(request)
        self._try_admission = True

    def clear(self) -> None:
        """Frees every request."""
        for request in (*self.running, *self.waiting):
            self._release(request)
        self.running.clear()
        self.waiting.clear()

    def _requeue_youngest(self) -> RequestT:
        request = self.running[-1]
        self._release(request)
        # It waits already if Ctrl-C fell into the middle of a move from one queue to the other.
        if not (self.waiting and self.waiting[0] is request):
            self.waiting.appendleft(request)
        self.running.pop()
        return request

    def _release(self, request: Request) -> None:
        # Ctrl-C can fall between any two lines. Taken out first, the sequence is freed in any case:
        # here, or when it is dropped.
        sequence, request.sequence = request.sequence, None
        if sequence is not None:
            # Busy is what a step leaves that was interrupted before its `with` began.
            with suppress(SequenceBusy):
                sequence.free()

    def _admit(self) -> bool:
        """Moves the oldest waiting request to the running ones, if there is room for it."""
        if not self.waiting or len(self.running) >= self.max_batch:
            return False
        if self.running and not self._try_admission:
            return False
        request = self.waiting[0]
        request.sequence = self.cache.sequence(
            np.asarray(request.tokens, np.int32), salt=request.salt
        )
        if self.running and not self._fits(request):
            self._release(request)
            self._try_admission = False
            return False
        if request.num_cached is None:
            request.num_cached = len(request.sequence)
        self.running.append(request)
        self.waiting.popleft()
        return True

    def _fits(self, request: RequestT) -> bool:
        """Whether there are blocks for every known token of `request` and those that run."""
        requests = (*self.running, request)
        for number, stats in enumerate(self.cache.stats().groups):
            needed = sum(_blocks_to_come(r, number, self.prefill_budget) for r in requests)
            if needed > stats.free + stats.cached:
                return False
        return True


def _work(request: RequestT, limit: int) -> Work[RequestT]:
    assert request.sequence is not None
    start = len(request.sequence)
    stop = min(start + limit, len(request.tokens))
    tokens = np.asarray(request.tokens[start:stop], np.int32)
    return Work(request, request.sequence, tokens, wants_logits=stop == len(request.tokens))


def _most_new(cache: KVCache) -> int:
    """The most tokens that one sequence may get in a step, for the cache's pools of raw rows."""
    counts = zip(cache.spec.pools, cache.stats().groups, strict=True)
    raw = [pool.most_new(stats.total) for pool, stats in counts if isinstance(pool, RawPool)]
    return min(raw, default=MAX_SLOTS)


def _blocks_to_come(request: Request, number: int, prefill_budget: int) -> int:
    """Blocks of a pool that a request may need, for its known tokens, beyond those it holds."""
    sequence, total = request.sequence, len(request.tokens)
    assert sequence is not None
    pool, blocks = sequence.cache.spec.pools[number], sequence.blocks(number)
    # Not pool.blocks_held: of an adopted prefix a group with slack holds less than of a text's own.
    held = int(np.count_nonzero(blocks >= 0))
    to_come = pool.blocks_for(total, max(1, min(prefill_budget, request.num_pending))) - held
    if not isinstance(pool, RawPool):
        to_come = min(to_come, -(-total // pool.block_size) - len(blocks))
    return max(0, to_come)
