"""Ctrl-C at any moment leaves the cache consistent and nothing in use."""

from __future__ import annotations

import gc
import random
import signal
import threading
import time

import pytest

from counting_model import continuation
from kvcore.models.generation import generate, stream
from kvcore.models.generator import Generator

PROMPTS = [[1 + i, 2, 3] * (4 * i + 1) for i in range(6)]


@pytest.mark.parametrize("stage", ["begin", "append", "end"])
@pytest.mark.parametrize("countdown", [1, 2, 9, 20])
@pytest.mark.parametrize("num_blocks", [6, 40])
def test_from_inside_the_model(stage, countdown, num_blocks, model, make_cache):
    cache = make_cache(num_blocks)
    left = countdown

    def interrupt(where):
        nonlocal left
        left -= where == stage
        if left == 0:
            raise KeyboardInterrupt

    model.decoder.on_forward = interrupt
    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS, max_tokens=20, ignore_eos=True, cache=cache)
    cache.check()
    stats = cache.stats()
    assert stats.in_use == 0 and stats.cached + stats.free == num_blocks

    # What the interrupted call left in the cache as prefixes is right: the texts are.
    model.decoder.on_forward = lambda where: None
    done = generate(model, PROMPTS, max_tokens=20, ignore_eos=True, cache=cache)
    assert [c.tokens for c in done] == [continuation(p, 20, eos=None) for p in PROMPTS]


def test_a_generator_resumes_after_an_interrupt(model, make_cache):
    cache = make_cache(8)
    rng = random.Random(5)

    def interrupt(where):
        if rng.random() < 0.05:
            raise KeyboardInterrupt

    model.decoder.on_forward = interrupt
    done, interrupts = {}, 0
    with Generator(model, cache) as generator:
        for prompt in PROMPTS:
            generator.add(prompt, max_tokens=20, ignore_eos=True)
        while generator:
            try:
                for event in generator.step():
                    if event.completion:
                        done[event.index] = event.completion.tokens
            except KeyboardInterrupt:
                interrupts += 1
                cache.check()
                assert cache.stats().in_use == 0
    assert interrupts > 5
    assert done == {i: continuation(p, 20, eos=None) for i, p in enumerate(PROMPTS)}


def test_from_the_reader_of_a_stream(model, make_cache):
    cache = make_cache(20)
    with pytest.raises(KeyboardInterrupt):
        for count, _ in enumerate(stream(model, PROMPTS, max_tokens=20, cache=cache)):
            if count == 17:
                raise KeyboardInterrupt
    assert cache.stats().in_use == 0


def test_a_stream_that_is_dropped_frees_its_blocks(model, make_cache):
    cache = make_cache(20)
    events = stream(model, PROMPTS, max_tokens=20, ignore_eos=True, cache=cache)
    assert cache.stats().num_sequences == 0
    next(events)
    assert cache.stats().in_use > 0
    events.close()
    assert cache.stats().in_use == 0


@pytest.fixture
def no_garbage_collection():
    """A signal that comes while other tests' garbage is freed is lost: callbacks cannot raise."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
@pytest.mark.usefixtures("no_garbage_collection")
def test_a_real_signal_at_random_moments(model, make_cache):
    assert threading.current_thread() is threading.main_thread()
    cache = make_cache(12)
    rng = random.Random(11)

    def raise_interrupt(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, raise_interrupt)
    interrupts = 0
    deadline = time.monotonic() + 3
    try:
        while time.monotonic() < deadline:
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.0005, 0.02))
                generate(model, PROMPTS, max_tokens=40, ignore_eos=True, cache=cache)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupts += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            cache.check()
            assert cache.stats().in_use == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupts > 20
