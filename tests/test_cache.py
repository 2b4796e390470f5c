"""The cache as a whole: its size, its accounts, its face."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcore
from c_api import CCache, StatusError
from strategies import specs
from support import (
    append_all,
    assert_balanced,
    assert_same_bits,
    grow,
    make_cache,
    random_q,
    snapshot,
    stored,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


class TestBytes:
    @settings(max_examples=100)
    @given(spec=specs(), num_blocks=st.lists(st.integers(1, 9), min_size=3, max_size=3))
    def test_the_spec_predicts_what_the_cache_takes(self, spec, num_blocks):
        num_blocks = num_blocks[: len(spec.groups)]
        cache = kvcore.KVCache(spec, num_blocks=num_blocks)
        assert cache.stats().bytes == spec.nbytes(num_blocks)
        # And that is what the arrays take: each layer's own, once.
        taken = {}
        for layer in range(spec.num_layers):
            for array in stored(cache, layer):
                taken[array.ctypes.data] = array.nbytes
        assert sum(taken.values()) == spec.nbytes(num_blocks)
        assert cache.num_blocks == tuple(num_blocks)

    @settings(max_examples=100)
    @given(spec=specs(), data=st.data())
    def test_memory_is_filled_and_not_exceeded(self, spec, data):
        span = max(g.block_size for g in spec.groups)
        least = spec.bytes_per_token * span
        memory = data.draw(st.integers(least, 5 * least))
        cache = kvcore.KVCache(spec, memory=memory)
        assert memory - least < cache.stats().bytes <= memory
        tokens = [n * g.block_size for n, g in zip(cache.num_blocks, spec.groups, strict=True)]
        assert len(set(tokens)) == 1

    def test_memory_as_people_write_it(self):
        spec = kvcore.CacheSpec(2, 2, 64, block_size=64, k_format="fp32", v_format="fp32")
        block = 2 * 2 * 2 * 64 * 64 * 4
        assert kvcore.KVCache(spec, memory="1MiB").num_blocks == (2**20 // block,)
        assert kvcore.KVCache(spec, memory="1.5 MB").num_blocks == (1_500_000 // block,)

    def test_memory_too_small_for_one_block(self):
        with pytest.raises(kvcore.InvalidArgument, match="memory: expected at least"):
            kvcore.KVCache(kvcore.CacheSpec(2, 2, 64), memory=1000)

    def test_more_memory_than_there_is(self):
        spec = kvcore.CacheSpec(100, 64, 1024, block_size=4096, k_format="fp32", v_format="fp32")
        with pytest.raises(MemoryError):
            kvcore.KVCache(spec, num_blocks=2**31 // 4096 - 1)

    def test_more_memory_than_slots_can_be_numbered(self):
        spec = kvcore.CacheSpec(1, 1, 8, block_size=16)
        assert spec.blocks_in(2**60) == ((2**31 - 1) // 16,)

    def test_storage_is_aligned(self):
        cache = make_cache(3, num_layers=3, num_kv_heads=1, head_dim=8)
        for layer in range(3):
            for array in stored(cache, layer):
                assert array.ctypes.data % 64 == 0

    def test_num_blocks_a_group(self):
        groups = {"num_layers": 2, "groups": [kvcore.GroupSpec(16)] * 2, "layer_groups": [0, 1]}
        assert make_cache(5, **groups).num_blocks == (5, 5)
        assert make_cache([5, 7], **groups).num_blocks == (5, 7)
        assert make_cache(iter((5, 7)), **groups).num_blocks == (5, 7)


class TestStats:
    def test_follow_a_sequences_life(self, rng):
        cache = make_cache(8, poisoned=False)
        a = cache.sequence()
        assert counts(cache) == (0, 0, 8)
        grow(cache, [(a, [*range(40)])], rng)
        assert counts(cache) == (3, 0, 5)
        b = a.fork(20)
        assert counts(cache) == (3, 0, 5)
        step = cache.step([(b, 30)])
        assert counts(cache) == (6, 0, 2) and cache.stats().open_steps == 1
        step.rollback()
        assert counts(cache) == (3, 0, 5) and cache.stats().open_steps == 0
        a.free()
        assert counts(cache) == (2, 0, 6)
        b.free()
        assert counts(cache) == (0, 2, 6)
        cache.drop_prefixes()
        assert counts(cache) == (0, 0, 8)

    def test_sums_over_groups(self, rng):
        cache = make_cache(
            [8, 3],
            num_layers=2,
            groups=[kvcore.GroupSpec(16), kvcore.GroupSpec(64)],
            layer_groups=[0, 1],
        )
        a = cache.sequence()
        grow(cache, [(a, 40)], rng)
        b = a.fork()
        grow(cache, [(b, 1)], rng)
        stats = cache.stats()
        assert [(g.total, g.in_use, g.free) for g in stats.groups] == [(8, 4, 4), (3, 2, 1)]
        assert (stats.total, stats.in_use, stats.cached, stats.free) == (11, 6, 0, 5)
        assert (stats.allocations, stats.copies, stats.evictions) == (6, 2, 0)
        assert stats.num_sequences == 2

    def test_are_a_snapshot(self, rng):
        cache = make_cache(8)
        before = cache.stats()
        grow(cache, [(a := cache.sequence(), 5)], rng)
        assert before.in_use == 0 and len(a) == 5
        with pytest.raises(dataclasses.FrozenInstanceError):
            before.bytes = 1


def counts(cache):
    stats = cache.stats()
    return stats.in_use, stats.cached, stats.free


class TestBlocks:
    @pytest.mark.parametrize("format", ["fp32", "fp16", "bf16"])
    def test_are_what_the_operations_on_arrays_take(self, rng, format):
        """Attention over a user's own block tables and the cache's blocks is the step's."""
        cache = make_cache(12, head_dim_v=24, k_format=format, v_format=format)
        sequences = [cache.sequence() for _ in range(3)]
        grow(cache, [(s, 10 + 20 * i) for i, s in enumerate(sequences)], rng)
        q = random_q(rng, 3, 4, 16)
        with cache.step([(s, 1) for s in sequences]) as step:
            append_all(step, rng)
            expected = step.attend(0, q)
            plan = step.plan()
            tables = (plan.block_tables, plan.seq_lens, plan.query_starts)
        out = kvcore.ops.paged_attention(q, *cache.blocks(0), *tables)
        assert_same_bits(out, expected)

    def test_are_views(self, rng):
        """Another sequence's blocks, copied by hand, are its contents."""
        cache = make_cache(8, num_layers=2)
        a, b = cache.sequence(), cache.sequence()
        grow(cache, [(a, 20), (b, 20)], rng)
        for layer in range(2):
            for array in cache.blocks(layer):
                array[b.blocks()] = array[a.blocks()]
            for copied, original in zip(b.read(layer), a.read(layer), strict=True):
                assert_same_bits(copied, original)

    def test_of_a_layer_that_reads_another(self):
        cache = make_cache(2, num_layers=3, kv_sources={2: 0})
        for view, source in zip(cache.blocks(2), cache.blocks(0), strict=True):
            assert view is source


def test_check_finds_books_that_do_not_balance():
    """A C program that writes where it must not: into the row of blocks that a plan points to."""
    cache = CCache(kvcore.CacheSpec(1, 1, 8, block_size=16), [8])
    a = cache.create()
    step = cache.begin([(a, 40)])
    row = cache.plan(step, 0).block_rows[0]
    cache.check()
    kept, row[1] = row[1], 7
    with pytest.raises(StatusError, match="CORRUPT"):
        cache.check()
    row[1] = kept
    cache.check()
    cache.rollback(step)
    cache.close()


def test_repr_tells_what_a_person_asks():
    cache = make_cache(8, num_layers=3, v_format="bf16", poisoned=False)
    a = cache.sequence()
    grow(cache, [(a, [*range(20)])], np.random.default_rng(0))
    text = repr(cache)
    for part in ("cpu", "3 layers", "fp32/bf16", "8 blocks of 16", "2 in use", "6 free"):
        assert part in text
    assert "1 sequences" in text or "1 sequence" in text


def test_attributes():
    spec = kvcore.CacheSpec(2, 2, 16)
    cache = kvcore.KVCache(spec, num_blocks=3)
    assert cache.spec is spec and cache.num_blocks == (3,) and cache.backend.name == "cpu"


def test_caches_are_apart(rng):
    one, two = make_cache(4), make_cache(4)
    a, b = one.sequence(), two.sequence()
    grow(one, [(a, [*range(20)])], rng)
    before = snapshot(two, [b])
    with pytest.raises(kvcore.ForeignSequence, match=r"entries\[1\]"):
        two.step([(b, 1), (a, 1)])
    assert snapshot(two, [b]) == before
    assert len(two.sequence([*range(20)])) == 0


def test_the_designs_example(rng):
    spec = kvcore.CacheSpec(
        num_layers=3, num_kv_heads=3, head_dim=64, block_size=64, k_format="bf16", v_format="bf16"
    )
    cache = kvcore.KVCache(spec, num_blocks=16, backend="cpu")
    a = cache.sequence()
    grow(cache, [(a, 9)], rng)
    b = a.fork()
    with cache.step([(a, 17), (b, 1)]) as step:
        for layer in range(spec.num_layers):
            k, v = (rng.standard_normal((18, 3, 64)).astype(np.float32) for _ in range(2))
            step.append(layer, k, v)
            out = step.attend(layer, rng.standard_normal((18, 9, 64)).astype(np.float32))
            assert out.shape == (18, 9, 64) and out.dtype == np.float32
    k, v = a.read(0)
    assert k.shape == v.shape == (26, 3, 64)
    b.truncate(5)
    assert len(b) == 5
    assert_same_bits(b.read(0)[0], k[:5])
    b.free()
    assert_balanced(cache)
    assert spec.bytes_per_token == 3 * 2 * 3 * 64 * 2
