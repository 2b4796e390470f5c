"""Generation with models whose layers form several groups, some of which let old tokens go."""

from __future__ import annotations

import numpy as np
import pytest

import kvcore
from kvcore.errors import InvalidArgument, OutOfBlocks, TokensReleased
from kvcore.models import Model
from kvcore.models.generation import blocks_for, generate
from kvcore.models.generator import Generator
from kvcore.models.scheduler import Request, Scheduler
from tiny_families import FAMILIES, tiny_config

BLOCK = 16
WINDOW = 19  # of the tiny families


def tiny_model(family):
    return Model.random(tiny_config(**FAMILIES[family]), seed=9)


@pytest.fixture(scope="module")
def model():
    return tiny_model("gemma2")


def make_cache(model, num_blocks, **options):
    return kvcore.KVCache(model.cache_spec(BLOCK, "fp32", "fp32", **options), num_blocks=num_blocks)


def greedy(model, prompt, count):
    """The most likely tokens, everything computed again for each."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model.decoder.forward_full(tokens, logits="last").argmax()))
    return tokens[len(prompt) :]


def prompts_of(*lengths):
    rng = np.random.default_rng(3)
    return [rng.integers(0, 50, length).tolist() for length in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_those_of_recomputation(family):
    model = tiny_model(family)
    prompts = prompts_of(37, 5, 70)
    options = {"block_size": BLOCK, "k_format": "fp32", "v_format": "fp32"}
    done = generate(model, prompts, max_tokens=12, max_batch=2, prefill_budget=23, **options)
    for prompt, completion in zip(prompts, done, strict=True):
        assert completion.tokens == greedy(model, prompt, 12)


def test_a_windowed_group_keeps_what_its_layers_see(model):
    cache = make_cache(model, [8, 4])
    with Generator(model, cache, prefill_budget=10) as generator:
        generator.add(prompts_of(60)[0], max_tokens=40)
        peaks = [0, 0]
        while generator:
            generator.step()
            groups = cache.stats().groups
            peaks = [max(peak, group.in_use) for peak, group in zip(peaks, groups, strict=True)]
    everything, windowed = cache.spec.groups
    assert peaks[0] == everything.blocks_for(99) == 7
    assert peaks[1] <= windowed.blocks_for(99, 10) == 3
    assert cache.stats().groups[0].released == 0 < cache.stats().groups[1].released
    cache.check()


def test_a_cache_made_for_the_texts_is_enough(model):
    spec = model.cache_spec(BLOCK, "fp32", "fp32")
    prompts = prompts_of(60, 33, 47)
    num_blocks = blocks_for(spec, [len(prompt) + 20 for prompt in prompts], 3, 16)
    cache = kvcore.KVCache(spec, num_blocks=num_blocks)
    done = generate(model, prompts, max_tokens=20, cache=cache, max_batch=3, prefill_budget=16)
    assert not any(completion.num_preemptions for completion in done)
    # 5 + 4 + 5 blocks of all tokens, and for each text (18 + 16 + 14) // 16 + 1 of the window's.
    assert num_blocks == [14, 12]


@pytest.mark.parametrize("num_blocks", [[9, 12], [20, 4], [9, 4]])
def test_too_few_blocks_in_any_group_only_take_longer(model, num_blocks):
    cache = make_cache(model, num_blocks)
    prompts = prompts_of(16, 30, 31, 20)
    done = generate(model, prompts, max_tokens=50, cache=cache, max_batch=4, prefill_budget=16)
    assert sum(completion.num_preemptions for completion in done) > 0
    for prompt, completion in zip(prompts, done, strict=True):
        assert completion.tokens == greedy(model, prompt, 50)
    cache.check()
    assert cache.stats().in_use == 0


def test_a_cached_prefix_is_found_in_every_group(model):
    cache = make_cache(model, [16, 16])
    prompt = prompts_of(70)[0]
    first, second = (
        generate(model, [prompt], max_tokens=9, cache=cache, prefill_budget=70)[0] for _ in range(2)
    )
    assert (first.num_cached, second.num_cached) == (0, 64)
    assert first.tokens == second.tokens == greedy(model, prompt, 9)


def test_a_request_joins_only_where_every_group_has_room(model):
    for num_blocks, admitted in (([20, 6], 2), ([20, 5], 1), ([5, 20], 1)):
        scheduler = Scheduler(make_cache(model, num_blocks), prefill_budget=100)
        for prompt in prompts_of(40, 40):
            scheduler.add(Request(prompt, max_length=50))
        # Each takes 3 blocks of either group.
        assert [work.tokens.size for work in scheduler.schedule()] == [40] * admitted
        assert len(scheduler.waiting) == 2 - admitted
        scheduler.clear()


def test_a_text_that_never_fits_a_group_is_refused(model):
    scheduler = Scheduler(make_cache(model, [20, 2]), prefill_budget=16)
    with pytest.raises(OutOfBlocks, match="group 1"):
        scheduler.add(Request(prompts_of(40)[0], max_length=50))
    scheduler = Scheduler(make_cache(model, [2, 20]))
    with pytest.raises(InvalidArgument, match=r"^prompt: expected at most 32 tokens"):
        scheduler.add(Request(prompts_of(40)[0], max_length=50))
    assert not scheduler


def test_a_cache_that_keeps_too_little_is_refused(model):
    shape = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 16}
    owners = [layer.group for layer in model.cache_spec().layers]
    for groups, message in (
        ([kvcore.GroupSpec(BLOCK), kvcore.GroupSpec(BLOCK, WINDOW - 1)], "layer 0.*19.*18"),
        ([kvcore.GroupSpec(BLOCK, 64), kvcore.GroupSpec(BLOCK, WINDOW)], "layer 1.*all.*64"),
    ):
        spec = kvcore.CacheSpec(**shape, groups=groups, layer_groups=owners)
        with pytest.raises(InvalidArgument, match=f"cache.*{message}"):
            Generator(model, kvcore.KVCache(spec, num_blocks=8))
    all_kept = kvcore.CacheSpec(**shape, groups=[kvcore.GroupSpec(BLOCK)] * 2, layer_groups=owners)
    Generator(model, kvcore.KVCache(all_kept, num_blocks=8)).close()


def test_slack_is_for_texts_that_go_back(model):
    tokens = prompts_of(90)[0]
    for slack, goes_back in ((0, False), (12, True)):
        cache = make_cache(model, 8, slack=slack)
        sequence = cache.sequence()
        for start in (0, 80):
            with cache.step([(sequence, tokens[start : start + 80])]) as step:
                model.decoder.forward(step, tokens[start : start + 80])
        if not goes_back:
            with pytest.raises(TokensReleased):
                sequence.truncate(78)
            continue
        sequence.truncate(78)
        with cache.step([(sequence, 12)]) as step:
            again = model.decoder.forward(step, tokens[78:])
        expected = model.decoder.forward_full(tokens, logits="last")
        np.testing.assert_allclose(again, expected, rtol=1e-4, atol=1e-4)
