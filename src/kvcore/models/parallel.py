"""Arithmetic on many rows, shared among threads, with NumPy's BLAS kept to one thread in each.

BLAS's own threads go on spinning after a product, on the cores that attention needs next, and what
is not a product would run on one core.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from functools import cache
from itertools import pairwise
from typing import Any

from kvcore.errors import MissingExtra
from kvcore.machine import get_num_threads

# From this many rows on all work is shared; below, hand-overs cost more than they save.
MANY_ROWS = 256


def cut(count: int, smallest: int) -> list[slice]:
    """[0, count) as slices of equal size: one for each thread, but each of at least `smallest`."""
    parts = max(1, min(get_num_threads(), count // smallest))
    bounds = [count * i // parts for i in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def for_each(work: Callable[[slice], None], parts: Sequence[slice]) -> None:
    """work(part) for every part: the first in this thread, the others beside it.

    Returns or raises when all are done, so that none still writes afterwards.
    """
    if len(parts) == 1:
        work(parts[0])
        return
    executor = _executor(os.getpid(), len(parts) - 1)
    others = [executor.submit(work, part) for part in parts[1:]]
    try:
        work(parts[0])
    finally:
        wait(others)
    for other in others:
        other.result()


def one_blas_thread() -> AbstractContextManager[Any]:
    """Keeps BLAS, in the whole process, to the thread that calls it."""
    manager: AbstractContextManager[Any] = _blas().limit(limits=1, user_api="blas")
    return manager


@cache
def _executor(pid: int, num_threads: int) -> ThreadPoolExecutor:
    # By process, because a fork has none of its parent's threads.
    return ThreadPoolExecutor(num_threads, thread_name_prefix="kvcore-models")


@cache
def _blas() -> Any:
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        raise MissingExtra(
            'the decoder needs threadpoolctl: pip install "kvcore[models]"'
        ) from None
    return ThreadpoolController()
