"""What the books cost: opening and committing steps, and the way from Python to the kernels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import kvcore
from bench.machine import Waits
from bench.measure import MIN_CLEAN_STEPS, WAITED_SHARE, Timing

BATCH = 256
CONTEXT = 2048


@dataclass(frozen=True)
class Cost:
    """Microseconds of one call, the median of `calls` undisturbed ones."""

    name: str
    us: float
    calls: int
    disturbed: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(repeats: int = 300) -> list[Cost]:
    """All costs, with one thread: nothing here is large enough to share.

    Args:
        repeats: calls of each kind.
    """
    threads = kvcore.get_num_threads()
    kvcore.set_num_threads(1)
    try:
        return [*_batch_step(repeats), *_single_calls(repeats)]
    finally:
        kvcore.set_num_threads(threads)


class _Clock:
    """Collects the timings of named calls."""

    def __init__(self, waits: Waits) -> None:
        self._waits = waits
        self._timings: dict[str, list[Timing]] = {}

    def time(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """What function(*arguments) returns."""
        waited, start = self._waits.seconds(), time.perf_counter()
        result = function(*arguments)
        seconds = time.perf_counter() - start
        timing = Timing(seconds, self._waits.seconds() - waited)
        self._timings.setdefault(name, []).append(timing)
        return result

    def costs(self) -> list[Cost]:
        return [_cost(name, timings) for name, timings in self._timings.items()]


def _cost(name: str, timings: list[Timing]) -> Cost:
    clean = [t.seconds for t in timings if t.waited < WAITED_SHARE * t.seconds]
    used = clean if len(clean) >= MIN_CLEAN_STEPS else [t.seconds for t in timings]
    return Cost(name, statistics.median(used) * 1e6, len(used), len(timings) - len(clean))


def _batch_step(repeats: int) -> list[Cost]:
    """A decode step of many sequences, of which each call finds some at a new block."""
    spec = kvcore.CacheSpec(1, 1, 8, k_format="fp16", v_format="fp16")
    block_size = spec.groups[0].block_size
    columns = -(-(CONTEXT + 2 * repeats) // block_size)
    cache = kvcore.KVCache(spec, num_blocks=BATCH * columns)
    rows = np.zeros((BATCH * CONTEXT, 1, 8), np.float32)
    sequences = [cache.sequence() for _ in range(BATCH)]
    stored = [(sequence, CONTEXT - i % block_size) for i, sequence in enumerate(sequences)]
    with cache.step(stored) as step:
        step.append(0, rows[: step.num_tokens], rows[: step.num_tokens])
    counts = [(sequence, 1) for sequence in sequences]
    token_ids = [(sequence, np.ones(1, np.int32)) for sequence in sequences]
    one = rows[:BATCH]
    with Waits() as waits:
        clock = _Clock(waits)
        for entries, suffix in ((counts, ""), (token_ids, ", with token ids")):
            what = f"step of {BATCH} sequences of {CONTEXT}{suffix}"
            for _ in range(repeats):
                step = clock.time(f"{what}: begin", cache.step, entries)
                step.append(0, one, one)
                clock.time(f"{what}: commit", step.commit)
        return clock.costs()


def _single_calls(repeats: int) -> list[Cost]:
    """The smallest shapes: what is left is the way through Python."""
    spec = kvcore.CacheSpec(1, 1, 16, k_format="fp32", v_format="fp32")
    cache = kvcore.KVCache(spec, num_blocks=8)
    sequence = cache.sequence()
    row = np.ones((1, 1, 16), np.float32)
    with Waits() as waits:
        clock = _Clock(waits)
        for _ in range(repeats):
            step = clock.time("step of 1 sequence: begin", cache.step, [(sequence, 1)])
            clock.time("append of 1 token, 1 head of 16", step.append, 0, row, row)
            clock.time("attend of 1 token to 1, 1 head of 16", step.attend, 0, row)
            clock.time("step of 1 sequence: commit", step.commit)
            sequence.truncate(0)
        return clock.costs()
