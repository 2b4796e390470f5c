"""The scheduler under arbitrary arrivals, cancellations and shortages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvcore
from counting_model import VOCAB, CountingModel, continuation
from kvcore.errors import InvalidArgument, InvalidType
from kvcore.models.generator import Generator
from kvcore.models.scheduler import Request, Scheduler

BLOCK = 16

prompts = st.one_of(
    st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=70),
    # Prompts that begin alike share blocks.
    st.integers(1, 69).map(lambda n: ([7, 8, 9] * 23)[:n]),
)
arrivals = st.lists(
    st.tuples(prompts, st.integers(1, 30), st.integers(0, 6), st.integers(0, 12)),
    min_size=1,
    max_size=9,
)


@given(arrivals, st.integers(7, 20), st.integers(1, 5), st.integers(1, 80))
def test_every_request_gets_its_text(arrivals, num_blocks, max_batch, prefill_budget):
    """Each arrival: prompt, tokens, steps to wait before it, and 0 or the step that cancels it."""
    model = CountingModel()
    spec = model.cache_spec(BLOCK, "fp32", "fp32")
    cache = kvcore.KVCache(spec, num_blocks=num_blocks)
    done, cancelled, age = {}, set(), {}
    queue = list(arrivals)
    pause = queue[0][2]
    limit = 200 + 4 * sum(len(prompt) + count for prompt, count, *_ in arrivals)
    with Generator(model, cache, max_batch=max_batch, prefill_budget=prefill_budget) as generator:
        while queue or generator:
            limit -= 1
            assert limit > 0, "no progress"
            if queue and pause <= 0:
                prompt, count, _, _ = queue.pop(0)
                age[generator.add(prompt, max_tokens=count, ignore_eos=True)] = 0
                pause = queue[0][2] if queue else 0
            pause -= 1
            for event in generator.step():
                if event.completion:
                    done[event.index] = event.completion
            for index in age:
                age[index] += 1
                if age[index] == arrivals[index][3] and index not in done:
                    generator.cancel(index)
                    cancelled.add(index)
            assert len(generator.scheduler.running) <= max_batch
            waiting = [request.index for request in generator.scheduler.waiting]
            running = [request.index for request in generator.scheduler.running]
            assert running + waiting == sorted(running + waiting), "not by arrival"
            cache.check()
    assert set(done) | cancelled == set(range(len(arrivals)))
    for index, completion in done.items():
        prompt, count, *_ = arrivals[index]
        assert completion.tokens == continuation(prompt, count, eos=None)
    for lengths, _ in model.decoder.steps:
        assert sum(n for n in lengths if n > 1) <= prefill_budget
    assert cache.stats().in_use == cache.stats().num_sequences == 0


@pytest.fixture
def cache(make_cache):
    return make_cache(8)


def test_a_request_joins_only_where_its_known_tokens_fit(cache):
    scheduler = Scheduler(cache)
    for _ in range(3):
        scheduler.add(Request(list(range(1, 50)), max_length=60))  # 4 of 8 blocks each
    assert len(scheduler.schedule()) == 2
    assert len(scheduler.waiting) == 1
    scheduler.remove(scheduler.running[0])
    assert [work.tokens.size for work in scheduler.schedule()] == [49, 49]
    scheduler.clear()


def test_the_youngest_is_preempted_and_runs_again_before_later_ones(cache):
    scheduler = Scheduler(cache, max_batch=2)
    first, second, third = (Request([5] * 20, max_length=30) for _ in range(3))
    for request in (first, second, third):
        scheduler.add(request)
    scheduler.schedule()
    assert scheduler.preempt() is second
    assert list(scheduler.waiting) == [second, third] and scheduler.running == [first]
    assert second.sequence is None and second.num_preemptions == 1
    scheduler.schedule()
    assert scheduler.running == [first], "nobody joins before the others leave"
    scheduler.remove(first)
    scheduler.schedule()
    assert scheduler.running == [second, third]
    scheduler.clear()


def test_prompts_share_the_budget_in_order_of_arrival(cache):
    scheduler = Scheduler(cache, prefill_budget=50)
    for length in (30, 30, 5):
        scheduler.add(Request([3] * length, max_length=40))
    work = scheduler.schedule()
    assert [(w.tokens.size, w.wants_logits) for w in work] == [(30, True), (20, False)]
    assert all(w.tokens.dtype == np.int32 for w in work)
    scheduler.clear()
    assert not scheduler


@pytest.mark.parametrize("name", ["max_batch", "prefill_budget"])
def test_bad_numbers_are_named(name, cache):
    for value, error in ((0, InvalidArgument), (1.5, InvalidType), (True, InvalidType)):
        with pytest.raises(error, match=f"^{name}: expected"):
            Scheduler(cache, **{name: value})


def compute(scheduler):
    """Stores what the next step has; returns the blocks in use of each group meanwhile."""
    work = scheduler.schedule()
    with scheduler.cache.step([(w.sequence, w.tokens) for w in work]) as step:
        for layer in range(scheduler.cache.spec.num_layers):
            zeros = np.zeros((step.num_tokens, 1, 16), np.float32)
            step.append(layer, zeros, zeros)
        return [group.in_use for group in scheduler.cache.stats().groups]


def test_an_adopted_prefix_holds_less_than_a_text_of_its_own():
    """Of a group with slack a prefix has only what the next token reads, and grows from there."""
    groups = [kvcore.GroupSpec(BLOCK), kvcore.GroupSpec(BLOCK, retention=20, slack=96)]
    spec = kvcore.CacheSpec(2, 1, 16, groups=groups, layer_groups=[0, 1])
    cache = kvcore.KVCache(spec, num_blocks=[64, 11])
    scheduler = Scheduler(cache, prefill_budget=32)
    prompt = list(range(192))
    first, other = Request([*prompt, 1], max_length=200), Request([5] * 20, max_length=60)
    scheduler.add(first)
    while first.num_pending:
        compute(scheduler)
    scheduler.remove(first)
    scheduler.add(other)
    compute(scheduler)
    other.tokens.append(5)

    long = Request([*prompt, *[7] * 208], max_length=410)
    scheduler.add(long)
    assert [work.request for work in scheduler.schedule()] == [other]
    scheduler.remove(other)
    in_use = []
    while long.num_pending:
        in_use.append(compute(scheduler)[1])
    assert long.num_cached == len(prompt)
    assert max(in_use) + 2 > 11, "it would have fitted beside the other's two blocks"
    scheduler.clear()
