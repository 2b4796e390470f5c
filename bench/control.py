"""What the books cost: decode steps, and the calls of one sequence, in C alone and from Python."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import kvcore
from bench.machine import Waits
from bench.measure import MIN_CLEAN_STEPS, WAITED_SHARE, Timing
from bench.probe import compile_probe

BATCH = 256
CONTEXTS = (2048, 32768, 131072)
BLOCK_SIZE = 64


@dataclass(frozen=True)
class Cost:
    """Microseconds of a call, the medians of `calls` undisturbed ones.

    Attributes:
        name: what is called.
        python_us: called from Python.
        c_us: the same work done by a C program, timed within it.
    """

    name: str
    python_us: float
    c_us: float
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
        probe = _Probe()
        return [
            *(
                cost
                for with_ids in (False, True)
                for context in CONTEXTS
                for cost in _batch_step(probe, context, with_ids, repeats)
            ),
            *_single_calls(probe, repeats),
        ]
    finally:
        kvcore.set_num_threads(threads, oversubscribe=True)


class _Probe:
    """The C program; each method gives the medians of two arrays of seconds, in microseconds."""

    def __init__(self) -> None:
        folder = kvcore.get_library_dir()
        origin = [f"-I{kvcore.get_include()}", f"-L{folder}", f"-Wl,-rpath,{folder}", "-lkvcore"]
        self._library = compile_probe(Path(__file__).with_name("control.c"), origin)

    def steps(self, context: int, with_ids: bool, repeats: int) -> tuple[float, float]:
        """Begin and commit."""
        return self._medians(self._library.control_steps, repeats, BATCH, context, int(with_ids))

    def calls(self, repeats: int) -> tuple[float, float]:
        """Append and attend."""
        return self._medians(self._library.control_calls, repeats)

    def _medians(self, function: Any, repeats: int, *arguments: int) -> tuple[float, float]:
        first, second = (ctypes.c_double * repeats)(), (ctypes.c_double * repeats)()
        status = function(*arguments, repeats, first, second)
        if status != 0:
            raise RuntimeError(f"bench/control.c ended with status {status} of kvcore.h")
        return statistics.median(first) * 1e6, statistics.median(second) * 1e6


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

    def cost(self, name: str, c_us: float) -> Cost:
        timings = self._timings[name]
        clean = [t.seconds for t in timings if t.waited < WAITED_SHARE * t.seconds]
        used = clean if len(clean) >= MIN_CLEAN_STEPS else [t.seconds for t in timings]
        median = statistics.median(used) * 1e6
        return Cost(name, median, c_us, len(used), len(timings) - len(clean))


def _batch_step(probe: _Probe, context: int, with_ids: bool, repeats: int) -> list[Cost]:
    """A decode step of many sequences, of which each step finds some at a new block."""
    cache, sequences = _long_texts(context, with_ids, repeats)
    new: Any = np.ones(1, np.int32) if with_ids else 1
    entries = [(sequence, new) for sequence in sequences]
    rows = np.zeros((BATCH, 1, 8), np.float32)
    what = f"{BATCH} sequences of {context}{', with token ids' if with_ids else ''}: "
    begin, commit = what + "begin", what + "commit"
    with Waits() as waits:
        clock = _Clock(waits)
        for turn in range(repeats + 1):
            # The first step copies the blocks that are shared.
            timer = clock if turn else _Clock(waits)
            step = timer.time(begin, cache.step, entries)
            step.append(0, rows, rows)
            timer.time(commit, step.commit)
        c_begin, c_commit = probe.steps(context, with_ids, repeats)
        return [clock.cost(begin, c_begin), clock.cost(commit, c_commit)]


def _long_texts(
    context: int, with_ids: bool, repeats: int
) -> tuple[kvcore.KVCache, list[kvcore.Sequence]]:
    """A batch that shares one text but for up to a block: what is stored does not matter here."""
    spec = kvcore.CacheSpec(1, 1, 8, k_format="fp16", v_format="fp16", block_size=BLOCK_SIZE)
    own = BATCH * (repeats // BLOCK_SIZE + 3)
    cache = kvcore.KVCache(spec, num_blocks=context // BLOCK_SIZE + 1 + own)
    text = cache.sequence()
    rows = np.zeros((context, 1, 8), np.float32)
    ids = np.arange(context, dtype=np.int32)
    with cache.step([(text, ids if with_ids else context)]) as step:
        step.append(0, rows, rows)
    others = [text.fork(context - i % BLOCK_SIZE) for i in range(1, BATCH)]
    return cache, [text, *others]


def _single_calls(probe: _Probe, repeats: int) -> list[Cost]:
    """The smallest shapes: what C does not take is the way through Python."""
    spec = kvcore.CacheSpec(1, 1, 16, k_format="fp32", v_format="fp32", block_size=BLOCK_SIZE)
    cache = kvcore.KVCache(spec, num_blocks=8)
    sequence = cache.sequence()
    row = np.ones((1, 1, 16), np.float32)
    append, attend = "append of 1 token, 1 head of 16", "attend of 1 token to 1, 1 head of 16"
    with Waits() as waits:
        clock = _Clock(waits)
        for _ in range(repeats):
            step = cache.step([(sequence, 1)])
            clock.time(append, step.append, 0, row, row)
            clock.time(attend, step.attend, 0, row)
            step.commit()
            sequence.truncate(0)
        c_append, c_attend = probe.calls(repeats)
        return [clock.cost(append, c_append), clock.cost(attend, c_attend)]
