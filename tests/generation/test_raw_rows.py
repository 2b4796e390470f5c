"""Generation over quantized caches, whose raw rows lie in pools of their own."""

from __future__ import annotations

import numpy as np
import pytest

import kvcore
from kvcore.errors import OutOfBlocks
from kvcore.models import Model
from kvcore.models.generation import blocks_for, generate
from kvcore.models.scheduler import Scheduler
from tiny_families import FAMILIES, tiny_config


@pytest.fixture(scope="module")
def model():
    changes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "max_context": 512}
    return Model.random(tiny_config(**{**FAMILIES["gemma2"], **changes}), seed=9)


def make_cache(model, num_blocks, num_raw_blocks, **options):
    spec = model.cache_spec(32, "rot8", "rot8", **options)
    return kvcore.KVCache(spec, num_blocks, num_raw_blocks)


def prompts_of(*lengths):
    rng = np.random.default_rng(3)
    return [rng.integers(0, 50, length).tolist() for length in lengths]


def test_a_small_raw_pool_bounds_the_chunks(model):
    """6 blocks: the first, and of five others 98 new tokens wherever they begin."""
    ample, small = make_cache(model, 40, 40), make_cache(model, 40, 6)
    scheduler = Scheduler(small, prefill_budget=512)
    assert scheduler.prefill_budget == 98
    assert Scheduler(ample, prefill_budget=512).prefill_budget == 512
    prompts = prompts_of(333)
    done = [
        generate(model, prompts, max_tokens=40, cache=cache, prefill_budget=98)[0]
        for cache in (ample, small)
    ]
    assert done[0].tokens == done[1].tokens and len(done[1].tokens) == 40
    assert done[1].num_preemptions == 0
    assert all(group.in_use == 0 for group in small.stats().groups)
    small.check()


def test_too_few_raw_blocks_only_take_longer(model):
    cache = make_cache(model, 60, 8)
    prompts = prompts_of(20, 10, 130, 15, 12)
    done = generate(model, prompts, max_tokens=60, cache=cache, max_batch=4, prefill_budget=32)
    assert [len(completion.tokens) for completion in done] == [60] * 5
    assert sum(completion.num_preemptions for completion in done) > 0
    cache.check()
    assert cache.stats().in_use == 0


def test_a_raw_pool_that_holds_no_text(model):
    cache = make_cache(model, 60, 2)
    with pytest.raises(OutOfBlocks, match=r"^raw rows of group 0: 3 blocks needed, 2 available"):
        generate(model, prompts_of(100), max_tokens=4, cache=cache)


def test_a_cache_made_for_the_texts_is_enough(model):
    spec = model.cache_spec(32, "rot8", "rot8")
    prompts = prompts_of(160, 133, 147)
    counts = blocks_for(spec, [len(prompt) + 20 for prompt in prompts], 3, 64)
    cache = kvcore.KVCache(spec, counts[:2], counts[2:])
    done = generate(model, prompts, max_tokens=20, cache=cache, max_batch=3, prefill_budget=64)
    assert not any(completion.num_preemptions for completion in done)
    # And so is the one that generation makes for itself.
    options = {"k_format": "rot8", "v_format": "rot8", "block_size": 32}
    again = generate(model, prompts, max_tokens=20, max_batch=3, prefill_budget=64, **options)
    assert [c.tokens for c in again] == [c.tokens for c in done]


def test_a_cached_prefix_brings_its_raw_rows(model):
    cache = make_cache(model, 20, 20)
    prompt = prompts_of(150)[0]
    done = [
        generate(model, [prompt], max_tokens=9, cache=cache, prefill_budget=150)[0]
        for _ in range(2)
    ]
    assert [completion.num_cached for completion in done] == [0, 128]
    assert done[0].tokens == done[1].tokens
