"""Threads inside and around the core: the same bits, no dead ends, sound after fork."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import kvcore
from support import (
    append_all,
    assert_balanced,
    assert_same_bits,
    grow,
    machine,
    make_cache,
    random_kv,
    random_q,
)

LONG = 60  # seconds; what runs longer hangs


def run_threads(functions):
    """Runs them at once; raises what one of them raised, or when one does not end."""
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(f,), daemon=True) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def decode(seed, steps=20):
    """A batch that grows in a cache of its own; every output of it."""
    rng = np.random.default_rng(seed)
    cache = make_cache(80, head_dim=32)
    sequences = [cache.sequence() for _ in range(4)]
    grow(cache, [(s, 100 + 60 * i) for i, s in enumerate(sequences)], rng)
    outs = []
    for _ in range(steps):
        with cache.step([(s, 1) for s in sequences]) as step:
            append_all(step, rng)
            outs.append(step.attend(0, random_q(rng, 4, 8, 32)))
    assert_balanced(cache)
    return np.concatenate(outs)


@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_python_threads_on_their_own_caches(num_threads):
    """They share the core's pool: one has it, the others run alone; the bits are the same."""
    with machine(num_threads=1):
        expected = [decode(seed) for seed in range(4)]
    results = {}
    with machine(num_threads=num_threads):
        run_threads(
            [lambda seed=seed: results.__setitem__(seed, decode(seed)) for seed in range(4)]
        )
    for seed, wanted in enumerate(expected):
        assert_same_bits(results[seed], wanted)


def test_python_threads_on_one_cache():
    """Disjoint sequences of one cache: steps overlap, books balance, contents are right."""
    cache = make_cache(200)
    barrier = threading.Barrier(4)

    def work(seed):
        rng = np.random.default_rng(seed)
        barrier.wait()
        for _ in range(60):
            a = cache.sequence()
            texts = []
            for n in rng.integers(1, 40, 3):
                with cache.step([(a, int(n))]) as step:
                    rows = random_kv(rng, int(n), cache.spec.layers[0])
                    step.append(0, *rows)
                    step.attend(0, random_q(rng, int(n), 2, 16))
                texts.append(rows)
            b = a.fork(int(rng.integers(0, len(a))))
            grow(cache, [(b, 5)], rng)
            k, v = (np.concatenate(x) for x in zip(*texts, strict=True))
            held_k, held_v = a.read(0)
            assert_same_bits(held_k, k)
            assert_same_bits(held_v, v)
            a.free()
            if rng.random() < 0.5:
                b.free()

    run_threads([lambda seed=seed: work(seed) for seed in range(4)])
    assert_balanced(cache)
    assert cache.stats().in_use == 0 and cache.stats().num_sequences == 0


def test_the_number_may_change_while_others_work():
    with machine(num_threads=2):
        expected = decode(0)
        stop = threading.Event()
        results = []

        def change():
            n = 0
            while not stop.is_set():
                n = n % 6 + 1
                kvcore.set_num_threads(n, oversubscribe=True)

        def work():
            try:
                results.extend(decode(0) for _ in range(3))
            finally:
                stop.set()

        run_threads([change, work])
    for result in results:
        assert_same_bits(result, expected)


def test_the_gil_is_released_while_the_core_works():
    """Another thread gets on while one attends to a long text."""
    rng = np.random.default_rng(0)
    cache = make_cache(20, block_size=1024, head_dim=128, num_kv_heads=4)
    a = cache.sequence()
    grow(cache, [(a, 6000)], rng)
    q = random_q(rng, 800, 8, 128)
    counted = {"during": 0, "inside": False}

    def count():
        while not counted["inside"]:
            pass
        while counted["inside"]:
            counted["during"] += 1

    def attend():
        with machine(num_threads=1), cache.step([(a, 800)]) as step:
            append_all(step, rng)
            counted["inside"] = True
            step.attend(0, q)
            counted["inside"] = False

    run_threads([count, attend])
    # With the lock held it could count only in the moments around the call.
    assert counted["during"] > 100_000


def test_inside_anothers_pool():
    """Work that a pool of threads shares out calls operations that share out theirs."""
    with machine(num_threads=1):
        expected = [decode(seed, steps=5) for seed in range(6)]
    with machine(num_threads=3), ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda seed: decode(seed, steps=5), range(6), timeout=LONG))
    for result, wanted in zip(results, expected, strict=True):
        assert_same_bits(result, wanted)


def test_get_and_set():
    usable = kvcore.get_num_threads()  # as KVCORE_NUM_THREADS is not set
    try:
        for n in (1, 3, 256):
            kvcore.set_num_threads(n, oversubscribe=True)
            assert kvcore.get_num_threads() == n
            kvcore.set_num_threads(n)
            assert kvcore.get_num_threads() == min(n, usable)
        kvcore.set_num_threads(0)
        assert kvcore.get_num_threads() == usable <= os.cpu_count()
    finally:
        kvcore.set_num_threads(0)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_no_more_threads_than_the_process_may_use():
    code = """
    import os
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import kvcore
    for more in ({}, {"oversubscribe": True}):
        kvcore.set_num_threads(5, **more)
        print(kvcore.get_num_threads())
    """
    assert run_python(code).split() == ["1", "5"]


def run_python(code, **environment):
    """Runs a program that must end by itself, and well."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


PROGRAM = """
    import os, sys
    import numpy as np
    import kvcore

    spec = kvcore.CacheSpec(1, 2, 64, k_format="fp32", v_format="fp32")
    cache = kvcore.KVCache(spec, num_blocks=40)
    a = cache.sequence()
    rng = np.random.default_rng(0)

    def attend(n):
        k, v = (rng.standard_normal((n, 2, 64)).astype(np.float32) for _ in range(2))
        with cache.step([(a, n)]) as step:
            step.append(0, k, v)
            return step.attend(0, np.repeat(k, 2, axis=1))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("busy", [False, True])
def test_a_forked_child_goes_on(busy):
    """Its pool is empty and not locked, even when another thread had it in the parent."""
    code = (
        PROGRAM
        + """
    import threading
    kvcore.set_num_threads(4, oversubscribe=True)
    attend(500)
    stop = threading.Event()
    other = kvcore.KVCache(spec, num_blocks=40)

    def work():
        b = other.sequence()
        k = np.ones((600, 2, 64), np.float32)
        while not stop.is_set():
            with other.step([(b, 600)]) as step:
                step.append(0, k, k)
                step.attend(0, k)
            b.truncate(0)

    thread = threading.Thread(target=work)
    if BUSY:
        thread.start()
    state = rng.bit_generator.state
    for _ in range(10):
        child = os.fork()
        if child == 0:
            out = attend(300)
            cache.check()
            os._exit(0 if np.isfinite(out).all() and len(a) == 800 else 1)
        _, status = os.waitpid(child, 0)
        assert status == 0, status
    stop.set()
    if BUSY:
        thread.join()
    rng.bit_generator.state = state
    assert np.isfinite(attend(300)).all()
    """
    )
    run_python(code.replace("BUSY", str(busy)))


@pytest.mark.parametrize("ending", ["", "os._exit(0)", "sys.exit(0)"])
def test_a_program_ends(ending):
    """With workers asleep, a step open and sequences alive."""
    code = f"""
    kvcore.set_num_threads(4, oversubscribe=True)
    attend(500)
    step = cache.step([(a, 5)])
    b = cache.sequence()
    {ending}
    """
    run_python(PROGRAM + code)


def test_the_environment_sets_threads_and_isa():
    show = "\nimport kvcore\nprint(kvcore.get_num_threads(), kvcore.get_isa())"
    assert run_python(show, KVCORE_NUM_THREADS="1", KVCORE_ISA="scalar").split() == ["1", "scalar"]
    default = run_python(show).split()
    assert run_python(show, KVCORE_NUM_THREADS="100000").split()[0] == default[0]
    assert default[1] == kvcore.available_isas()[0]


def test_an_isa_that_is_not_there_is_an_error():
    done = subprocess.run(
        [sys.executable, "-c", "import kvcore"],
        env={**os.environ, "KVCORE_ISA": "mmx"},
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    assert done.returncode != 0 and "KVCORE_ISA" in done.stderr and "mmx" in done.stderr
