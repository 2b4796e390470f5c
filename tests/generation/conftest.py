"""A model with known answers, and caches whose books are checked after every test."""

from __future__ import annotations

import numpy as np
import pytest

import kvcore
from counting_model import VOCAB, CountingModel


@pytest.fixture
def model():
    return CountingModel()


@pytest.fixture
def make_cache(model):
    """Makes caches, and checks at the end that their books balance and nothing is left in use."""
    caches = []

    def make(num_blocks, block_size=16):
        spec = model.cache_spec(block_size, "fp32", "fp32")
        caches.append(kvcore.KVCache(spec, num_blocks=num_blocks))
        return caches[-1]

    yield make
    for cache in caches:
        cache.check()
        assert cache.stats().in_use == 0
        assert cache.stats().num_sequences == 0


@pytest.fixture
def draw_prompts():
    def draw(count, low, high, seed=0):
        rng = np.random.default_rng(seed)
        return [rng.integers(1, VOCAB, rng.integers(low, high)).tolist() for _ in range(count)]

    return draw
