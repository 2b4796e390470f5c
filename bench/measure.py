"""Timing several peers in turns, so that what the machine does meanwhile hits all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import cycle
from typing import NamedTuple

import numpy as np

from bench.machine import Pinning, Waits

#: A step counts as disturbed when its threads waited this share of it for a CPU.
WAITED_SHARE = 0.03
BURST_SECONDS = 0.04
MAX_BURST = 24
MIN_CLEAN_STEPS = 5
MIN_CLEAN_ROUNDS = 3

#: Some libraries' threads spin on for up to 0.1 s after a call, on CPUs that the next peer needs.
SETTLE_SECONDS, SETTLED_SHARE, MAX_SETTLE_SECONDS = 0.005, 0.1, 0.3


class Timing(NamedTuple):
    """Seconds that a step took, and that its threads, taken together, waited for a CPU."""

    seconds: float
    waited: float


class Cursor:
    """Walks round and round over the layers; tasks that share memory share a cursor."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self._layers: Iterator[int] = cycle(range(num_layers))

    def next(self) -> int:
        return next(self._layers)


class Task:
    """One peer at one case. `run` does one layer and is timed; `prepare` comes before it.

    Attributes:
        pinned: the task's threads, the caller included, keep to their CPUs.
    """

    pinned = True

    def prepare(self) -> None:
        """Moves on to the next layer, so that no run finds its data in the CPU's caches."""

    def run(self) -> None:
        raise NotImplementedError

    def time(self, waits: Waits) -> Timing:
        waited, start = waits.seconds(), time.perf_counter()
        self.run()
        seconds = time.perf_counter() - start
        return Timing(seconds, waits.seconds() - waited)

    def output(self) -> np.ndarray | None:
        """A layer's result as float32, to compare the peers; None when there is none."""
        return None

    def close(self) -> None:
        """Lets go of what the task holds open."""


@dataclass
class Samples:
    """A task's times in seconds.

    Attributes:
        clean: steps that had their CPUs to themselves.
        disturbed: the others.
        rounds: the median of each round's clean steps; NaN when there were none.
    """

    clean: list[float] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)

    @property
    def is_contended(self) -> bool:
        """Too few clean steps: the numbers then are those of all steps."""
        return len(self.clean) < MIN_CLEAN_STEPS

    @property
    def used(self) -> list[float]:
        return self.clean + self.disturbed if self.is_contended else self.clean

    @property
    def median(self) -> float:
        return statistics.median(self.used)

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.used, q))

    def add(self, timings: list[Timing]) -> None:
        clean = [t.seconds for t in timings if t.waited < WAITED_SHARE * t.seconds]
        self.clean += clean
        self.disturbed += [t.seconds for t in timings if t.waited >= WAITED_SHARE * t.seconds]
        self.rounds.append(statistics.median(clean) if clean else float("nan"))


def ratio(numerator: Samples, denominator: Samples) -> float:
    """The median over rounds of one task's time over another's in the same round.

    With too few rounds in which both have clean steps, it is the ratio of their 10th percentiles,
    which others' load moves least.
    """
    pairs = np.asarray(numerator.rounds) / np.asarray(denominator.rounds)
    pairs = pairs[np.isfinite(pairs)]
    if pairs.size < MIN_CLEAN_ROUNDS:
        return numerator.quantile(0.1) / denominator.quantile(0.1)
    return float(np.median(pairs))


def measure(
    tasks: Mapping[str, Task],
    pinning: Pinning,
    *,
    seconds: float = 1.0,
    min_rounds: int = 5,
    max_rounds: int = 60,
) -> dict[str, Samples]:
    """Runs every task in turns.

    A round gives each task a burst of steps. The first of several is not counted: threads and code
    have to come back. The round's order rotates.

    Args:
        pinning: places the threads that the tasks have started.
        seconds: time for each task; twice that when disturbed steps leave too few clean ones.
        min_rounds, max_rounds: bounds on the number of rounds.
    """
    names = list(tasks)
    bursts = {name: _warm_up(tasks[name], pinning) for name in names}
    samples = {name: Samples() for name in names}
    start = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        with Waits() as waits:
            for number in range(max_rounds):
                first = number % len(names)
                for name in names[first:] + names[:first]:
                    settle()
                    with _placed(tasks[name], pinning):
                        samples[name].add(_burst(tasks[name], bursts[name], waits))
                starved = any(sample.is_contended for sample in samples.values())
                budget = seconds * len(names) * (2 if starved else 1)
                if number + 1 >= min_rounds and time.perf_counter() - start > budget:
                    break
    finally:
        gc.enable()
    return samples


def settle() -> None:
    """Returns when this process's threads have come to rest, at most MAX_SETTLE_SECONDS later."""
    deadline = time.perf_counter() + MAX_SETTLE_SECONDS
    while time.perf_counter() < deadline:
        used = time.process_time()
        time.sleep(SETTLE_SECONDS)
        if time.process_time() - used < SETTLED_SHARE * SETTLE_SECONDS:
            return


def _warm_up(task: Task, pinning: Pinning) -> int:
    """Starts the task's threads; returns how many steps a burst takes."""
    settle()
    with _placed(task, pinning):
        for _ in range(2):
            task.prepare()
            task.run()
            if task.pinned:
                pinning.place_new_threads()
        task.prepare()
        start = time.perf_counter()
        task.run()
        once = time.perf_counter() - start
    return max(1, min(MAX_BURST, int(BURST_SECONDS / max(once, 1e-6))))


def _placed(task: Task, pinning: Pinning) -> AbstractContextManager[object]:
    return nullcontext() if task.pinned else pinning.lifted()


def _burst(task: Task, count: int, waits: Waits) -> list[Timing]:
    uncounted = 1 if count > 1 else 0
    timings = []
    for _ in range(uncounted + count):
        task.prepare()
        timings.append(task.time(waits))
    return timings[uncounted:]
