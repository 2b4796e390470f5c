"""Work shared among threads: every part once, and none still running afterwards."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvcore
from kvcore.models import parallel


@pytest.fixture(autouse=True)
def restore_threads():
    yield
    kvcore.set_num_threads(0)


@given(count=st.integers(1, 5000), smallest=st.integers(1, 600), threads=st.integers(1, 8))
def test_cut_covers_everything_in_order(count, smallest, threads):
    kvcore.set_num_threads(threads, oversubscribe=True)
    parts = parallel.cut(count, smallest)
    covered = [i for part in parts for i in range(part.start, part.stop)]
    assert covered == list(range(count))
    assert 1 <= len(parts) <= threads
    assert len(parts) == 1 or min(part.stop - part.start for part in parts) >= smallest


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_part_is_done_once(threads):
    kvcore.set_num_threads(threads, oversubscribe=True)
    done = np.zeros(100, int)
    names = set()

    def work(part):
        names.add(threading.current_thread().name)
        done[part] += 1

    for _ in range(20):
        parallel.for_each(work, parallel.cut(100, 10))
    assert (done == 20).all()
    assert threading.current_thread().name in names


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_waits_for_the_others(failing):
    kvcore.set_num_threads(2, oversubscribe=True)
    parts = parallel.cut(2, 1)
    finished = []

    def work(part):
        if part.start == failing:
            raise ValueError(f"part {failing}")
        time.sleep(0.05)
        finished.append(part.start)

    with pytest.raises(ValueError, match=f"part {failing}"):
        parallel.for_each(work, parts)
    assert finished == [1 - failing]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of threads, from 3.12 on
def test_works_in_a_fork():
    kvcore.set_num_threads(2, oversubscribe=True)
    parallel.for_each(lambda part: None, parallel.cut(2, 1))
    pid = os.fork()
    if pid == 0:
        done = []
        parallel.for_each(lambda part: done.append(part.start), parallel.cut(2, 1))
        os._exit(0 if sorted(done) == [0, 1] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_blas_gets_its_threads_back():
    threadpoolctl = pytest.importorskip("threadpoolctl")

    def counts():
        return [
            library["num_threads"]
            for library in threadpoolctl.threadpool_info()
            if library["user_api"] == "blas"
        ]

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        assert 2 in counts()  # else nothing would be taken away
        before = counts()
        with parallel.one_blas_thread():
            assert set(counts()) == {1}
        assert counts() == before
