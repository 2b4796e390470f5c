"""The thread pool, the choice of ISA and what depends on the process's environment."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from core.library import ISAS, OK, RANGE, UNSUPPORTED, lib, machine, names

HERE = Path(__file__).parent


def run_python(code: str, **environment: str) -> str:
    """Runs a program that has the library as `lib`; a hang fails."""
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, **environment, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", f"from core.library import *\n{code}"],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


WORK = """
x = np.ones((4, 512), np.float32); w = np.ones((2048, 512), np.float32)
y = np.zeros((4, 2048), np.float32)
def work():
    y[:] = 0
    assert lib.kv_linear(x.ctypes.data, 512, w.ctypes.data, 512, None, y.ctypes.data, 2048,
                         4, 2048, 512) == 0
    assert (y == 512).all()
"""


def test_thread_counts() -> None:
    default = lib.kv_get_num_threads()
    assert 1 <= default <= len(os.sched_getaffinity(0))
    for count in (1, 5, 256):
        assert lib.kv_set_num_threads(count, 0) == OK
        assert lib.kv_get_num_threads() <= len(os.sched_getaffinity(0))
        assert lib.kv_set_num_threads(count, 1) == OK
        assert lib.kv_get_num_threads() == count
    for count in (-1, 257):
        for oversubscribe in (0, 1):
            assert lib.kv_set_num_threads(count, oversubscribe) == RANGE
    assert lib.kv_get_num_threads() == 256
    assert lib.kv_set_num_threads(0, 0) == OK
    assert lib.kv_get_num_threads() == default


@pytest.mark.parametrize(("value", "count"), [("1", 1), ("100000", None), ("0", None), ("x", None)])
def test_environment_lowers_the_default(value: str, count: int | None) -> None:
    expected = count or int(run_python("print(lib.kv_get_num_threads())", KVCORE_NUM_THREADS=""))
    assert run_python("print(lib.kv_get_num_threads())", KVCORE_NUM_THREADS=value) == str(expected)


def test_affinity_is_the_default_and_the_limit() -> None:
    code = """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
for oversubscribe in (0, 1):
    print(lib.kv_get_num_threads())
    lib.kv_set_num_threads(5, oversubscribe)
print(lib.kv_get_num_threads())
"""
    assert run_python(code, KVCORE_NUM_THREADS="").split() == ["1", "1", "5"]


def test_isas_and_features() -> None:
    assert ISAS[-1] == "scalar"
    assert lib.kv_get_isa().decode() in ISAS
    features = names(lib.kv_cpu_features())
    assert len(set(features)) == len(features)
    assert ("avx512" in ISAS) <= ("avx512f" in features)
    assert lib.kv_set_isa(b"sse9") == UNSUPPORTED
    for isa in ISAS:
        with machine(isa):
            assert lib.kv_get_isa().decode() == isa
        assert run_python("print(lib.kv_get_isa().decode())", KVCORE_ISA=isa) == isa


def test_unknown_isa_is_an_error_not_a_fallback() -> None:
    code = (
        WORK
        + """
x8 = x[0, :8].copy()
assert lib.kv_get_isa() == b"none" and ISAS
assert lib.kv_linear(x.ctypes.data, 512, w.ctypes.data, 512, None, y.ctypes.data, 2048,
                     4, 2048, 512) == UNSUPPORTED
assert lib.kv_quantize(x8.ctypes.data, 0, 1, 1, 8, None, y.ctypes.data) == UNSUPPORTED
assert not y.any()
assert lib.kv_set_isa(b"scalar") == OK
work()
"""
    )
    path = os.environ.get("KVCORE_TEST_LIBRARY") or run_python(
        "import kvcore; print(next(Path(kvcore.get_library_dir()).glob('libkvcore.*')))"
    )
    run_python(code, KVCORE_ISA="sse9", KVCORE_TEST_LIBRARY=path)


def test_two_callers_at_once() -> None:
    w = np.random.default_rng(0).standard_normal((3000, 300), np.float32)
    x = np.ones((3, 300), np.float32)
    results: list[bytes] = []

    def call() -> None:
        for _ in range(50):
            y = np.empty((3, 3000), np.float32)
            lib.kv_linear(
                x.ctypes.data, 300, w.ctypes.data, 300, None, y.ctypes.data, 3000, 3, 3000, 300
            )
            results.append(y.tobytes())

    with machine(lib.kv_get_isa().decode(), 4):
        threads = [threading.Thread(target=call) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 150 and len(set(results)) == 1


def seconds_of_linear(x: np.ndarray, w: np.ndarray) -> float:
    y = np.empty((len(x), len(w)), np.float32)
    inputs, outputs = w.shape[1], w.shape[0]
    start = time.perf_counter()
    lib.kv_linear(
        x.ctypes.data, inputs, w.ctypes.data, inputs, None, y.ctypes.data, outputs,
        len(x), outputs, inputs,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    assert (y == inputs).all()
    return seconds


def test_a_busy_pool_keeps_nobody_waiting() -> None:
    """While one caller has the pool for a long call, another's short ones run at once."""
    long = np.ones((400, 2048), np.float32), np.ones((4096, 2048), np.float32)
    short = np.ones((4, 512), np.float32), np.ones((2048, 512), np.float32)

    def longest_beside_a_long_one() -> float:
        holder = threading.Thread(target=seconds_of_linear, args=long)
        holder.start()
        longest = 0.0
        while holder.is_alive():
            longest = max(longest, seconds_of_linear(*short))
        return longest

    with machine(lib.kv_get_isa().decode(), 2):
        alone = min(seconds_of_linear(*long) for _ in range(2))
        # One that waited would take about as long as the other, every time; one that did not is
        # now and then held up by the system.
        assert any(longest_beside_a_long_one() < alone / 2 for _ in range(5))


def test_fork_and_exit() -> None:
    code = (
        WORK
        + """
lib.kv_set_num_threads(4, 1)
work()
for _ in range(20):
    child = os.fork()
    if child == 0:
        work(); work()
        os._exit(0)
    work()
    assert os.waitpid(child, 0)[1] == 0
print("done")
"""
    )
    assert run_python("import warnings; warnings.simplefilter('ignore')\n" + code) == "done"


def test_thread_count_changes_between_calls() -> None:
    code = (
        WORK
        + """
for count in (1, 8, 2, 16, 3, 1, 64):
    lib.kv_set_num_threads(count, 1)
    for _ in range(5):
        work()
print("done")
"""
    )
    assert run_python(code) == "done"
