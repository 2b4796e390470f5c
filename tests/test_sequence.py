"""Sequences: length, forks, truncation, the end of their life."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcore
from c_api import CCache, StatusError
from strategies import FORMATS, seeds
from support import (
    FORMAT_DTYPES,
    assert_balanced,
    assert_same_bits,
    grow,
    make_cache,
    poison,
    random_kv,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def cache():
    return make_cache(32)


def test_an_empty_sequence(cache):
    a = cache.sequence()
    assert len(a) == 0 and a.blocks().tolist() == [] and bool(a)
    k, v = a.read(0)
    assert k.shape == v.shape == (0, 2, 16) and k.dtype == v.dtype == np.float32
    assert cache.stats().in_use == 0


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=25)
@given(seed=seeds, news=st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_read_gives_what_was_stored(format, seed, news):
    rng = np.random.default_rng(seed)
    cache = make_cache(32, num_layers=2, head_dim_v=40, k_format=format, v_format="fp32")
    a = cache.sequence()
    texts = [[], []]
    for n in news:
        with cache.step([(a, n)]) as step:
            for layer in range(2):
                texts[layer].append(random_kv(rng, n, cache.spec.layers[layer]))
                step.append(layer, *texts[layer][-1])
    for layer in range(2):
        k, v = (np.concatenate(x) for x in zip(*texts[layer], strict=True))
        held_k, held_v = a.read(layer)
        assert_same_bits(held_k, k.astype(FORMAT_DTYPES[format]).astype(np.float32))
        assert_same_bits(held_v, v)


def test_read_gives_a_copy(cache, rng):
    a = cache.sequence()
    grow(cache, [(a, 5)], rng)
    k, _ = a.read(0)
    k[:] = 7
    assert not (a.read(0)[0] == 7).any()


class TestFork:
    @pytest.mark.parametrize("length", [None, 0, 1, 15, 16, 17, 32, 49, 50])
    def test_shares_blocks_and_goes_its_own_way(self, cache, rng, length):
        a = cache.sequence()
        grow(cache, [(a, 50)], rng)
        text = a.read(0)
        b = a.fork() if length is None else a.fork(length)
        n = 50 if length is None else length
        assert len(b) == n and cache.stats().in_use == 4
        assert b.blocks().tolist() == a.blocks()[: -(-n // 16)].tolist()
        grow(cache, [(b, 20), (a, 1)], rng)
        a_text, b_text = a.read(0), b.read(0)
        for x, y, old in zip(a_text, b_text, text, strict=True):
            assert_same_bits(x[:50], old)
            assert_same_bits(y[:n], old[:n])
        # What one writes, the other does not see.
        a.free()
        poison(cache, [b])
        for held, expected in zip(b.read(0), b_text, strict=True):
            assert_same_bits(held, expected)
        assert_balanced(cache)

    def test_outlives_its_parent(self, cache, rng):
        a = cache.sequence()
        grow(cache, [(a, 40)], rng)
        text = a.read(0)
        b = a.fork(33)
        a.free()
        assert cache.stats().in_use == 3
        for held, expected in zip(b.read(0), text, strict=True):
            assert_same_bits(held, expected[:33])

    def test_a_tree_of_forks(self, cache, rng):
        root = cache.sequence()
        grow(cache, [(root, 20)], rng)
        leaves = [root.fork() for _ in range(4)]
        leaves += [leaf.fork(18) for leaf in leaves]
        assert cache.stats().in_use == 2
        grow(cache, [(leaf, 1 + i) for i, leaf in enumerate(leaves)], rng)
        texts = [leaf.read(0) for leaf in leaves]
        prefix = root.read(0)[0]
        for i, (k, _) in enumerate(texts):
            assert_same_bits(k[:18], prefix[:18])
            assert len(k) == (20 if i < 4 else 18) + 1 + i
        assert cache.stats().copies == 8
        for leaf in leaves:
            leaf.free()
        assert cache.stats().in_use == 2

    def test_costs_no_copy_until_written(self, cache, rng):
        a = cache.sequence()
        grow(cache, [(a, 20)], rng)
        for _ in range(10):
            a.fork().free()
        assert cache.stats().copies == 0 and cache.stats().allocations == 2


class TestTruncate:
    @pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 48, 49, 50])
    def test_keeps_the_beginning(self, cache, rng, length):
        a = cache.sequence()
        grow(cache, [(a, 50)], rng)
        text = a.read(0)
        a.truncate(length)
        assert len(a) == length and cache.stats().in_use == -(-length // 16)
        poison(cache, [a])
        grow(cache, [(a, 30)], rng)
        for held, old in zip(a.read(0), text, strict=True):
            assert_same_bits(held[:length], old[:length])
            assert np.isfinite(held).all()

    def test_does_not_touch_forks(self, cache, rng):
        a = cache.sequence()
        grow(cache, [(a, 50)], rng)
        b = a.fork()
        text = b.read(0)
        a.truncate(5)
        grow(cache, [(a, 50)], rng)
        for held, expected in zip(b.read(0), text, strict=True):
            assert_same_bits(held, expected)


class TestEnd:
    def test_free_gives_the_blocks_back(self, cache, rng):
        a = cache.sequence()
        grow(cache, [(a, 50)], rng)
        a.free()
        assert cache.stats().in_use == 0 and cache.stats().num_sequences == 0
        assert a.is_freed and repr(a) == "Sequence(freed)"

    def test_nothing_works_after_free(self, cache):
        a, b = cache.sequence(), cache.sequence()
        a.free()
        c = cache.sequence()  # may take a's place in the core
        for call in (
            a.free,
            a.fork,
            a.blocks,
            lambda: len(a),
            lambda: a.truncate(0),
            lambda: a.read(0),
            lambda: cache.step([(b, 1), (a, 1)]),
        ):
            with pytest.raises(kvcore.SequenceFreed):
                call()
        assert len(b) == len(c) == 0 and cache.stats().num_sequences == 2
        cache.step([(b, 1), (c, 1)]).rollback()

    def test_dropping_it_gives_the_blocks_back(self, cache, rng):
        a = cache.sequence()
        grow(cache, [(a, 50)], rng)
        b = a.fork()
        del a
        assert cache.stats().num_sequences == 1 and cache.stats().in_use == 4
        del b
        assert cache.stats().num_sequences == 0 and cache.stats().in_use == 0

    def test_dropped_blocks_are_there_for_the_next_step(self, rng):
        cache = make_cache(2)
        for _ in range(5):
            a = cache.sequence()
            grow(cache, [(a, 32)], rng)
            del a

    def test_it_keeps_its_cache_alive(self, rng):
        cache = make_cache(4)
        a = cache.sequence()
        grow(cache, [(a, 5)], rng)
        alive = weakref.ref(cache)
        del cache
        gc.collect()
        assert len(a) == 5 and a.read(0)[0].shape == (5, 2, 16)
        assert a.cache is alive()
        del a
        gc.collect()
        assert alive() is None

    def test_a_cycle_with_its_cache_is_collected(self):
        cache = make_cache(4)
        cache.pinned = cache.sequence()
        alive = weakref.ref(cache)
        del cache
        gc.collect()
        assert alive() is None

    def test_a_c_programs_handles_are_never_taken_for_later_ones(self):
        """A place in the core is used again and again; an old handle stays stale."""
        spec = kvcore.CacheSpec(1, 1, 8)
        cache, other = CCache(spec, [4]), CCache(spec, [4])
        old, foreign = cache.create(), other.create()
        cache.free(old)
        for _ in range(1000):
            new = cache.create()
            assert new not in (0, old)
            cache.free(new)
        new = cache.create()
        for call in (cache.free, cache.length, lambda handle: cache.fork(handle, -1)):
            for handle, status in (
                (old, "STALE_SEQUENCE"),
                (foreign, "FOREIGN_SEQUENCE"),
                (0, "FOREIGN_SEQUENCE"),
            ):
                with pytest.raises(StatusError, match=status):
                    call(handle)
        assert cache.length(new) == other.length(foreign) == 0
        cache.check()
        cache.close()
        other.close()


def test_repr(cache, rng):
    a = cache.sequence()
    grow(cache, [(a, 17)], rng)
    assert repr(a) == "Sequence(17 tokens, 2 blocks)"
