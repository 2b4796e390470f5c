"""Caches whose V is the first elements of K, stored once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcore
from attention_oracle import assert_close, attention
from strategies import FORMATS, LAYOUTS, block_sizes, cuts, seeds
from support import (
    FORMAT_DTYPES,
    assert_balanced,
    assert_same_bits,
    from_layout,
    make_cache,
    poison,
    random_kv,
    random_q,
    stored,
    to_layout,
)

HEADS, DIM, DIM_V = 128, 576, 512  # DeepSeek-V2 and V3: every query head reads the one latent
SOME_HEADS = [*range(0, HEADS, 9), HEADS - 1]  # the oracle is slow


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def latent_cache(num_blocks=8, format="bf16", **spec):
    shape = {"num_kv_heads": 1, "head_dim": DIM, "v_in_k": DIM_V, "block_size": 64}
    return make_cache(num_blocks, **{**shape, "k_format": format, "v_format": format, **spec})


def random_k(rng, num_tokens, layer):
    return random_kv(rng, num_tokens, layer)[0]


def grow(cache, entries, rng):
    """One step of random K; the K of each entry."""
    with cache.step(entries) as step:
        k = random_k(rng, step.num_tokens, cache.spec.layers[0])
        step.append(0, k, None)
        starts = step.query_starts
    return np.split(k, starts[1:-1])


class TestSpec:
    def test_one_number_or_one_a_layer(self):
        spec = kvcore.CacheSpec(3, 1, [64, 32, 64], v_in_k=[48, None, 0], k_format="fp16")
        assert [(x.head_dim_v, x.v_in_k) for x in spec.layers] == [(48, 48), (32, 0), (64, 0)]
        assert [x.v_format for x in spec.layers] == ["fp16", "bf16", "bf16"]
        assert spec.bytes_per_token == 2 * (64 + 32 + 32 + 64 + 64)
        assert spec != kvcore.CacheSpec(3, 1, [64, 32, 64], [48, 32, 64], k_format="fp16")

    def test_deepseek_v3_takes_70272_bytes_a_token(self):
        spec = kvcore.CacheSpec(61, 1, DIM, v_in_k=DIM_V)
        assert spec.bytes_per_token == 70_272
        assert spec.nbytes(10) == 10 * 64 * 70_272

    def test_storage_has_what_the_spec_says(self):
        cache = latent_cache(3, num_layers=2)
        assert cache.stats().bytes == cache.spec.nbytes(3) == 3 * 64 * DIM * 2 * 2
        k, v = stored(cache, 1)
        assert np.shares_memory(k, v) and v.shape == (*k.shape[:3], DIM_V)

    @pytest.mark.parametrize(
        ("argument", "changes"),
        [
            ("v_in_k", {"v_in_k": 20}),
            ("v_in_k", {"v_in_k": -8}),
            ("v_in_k", {"v_in_k": 72}),
            ("v_in_k", {"v_in_k": 8.0}),
            ("v_in_k", {"v_in_k": True}),
            ("v_in_k", {"v_in_k": [8]}),
            ("v_in_k", {"v_in_k": [72, 8]}),
            ("head_dim", {"head_dim": [64, "a"]}),
            ("head_dim_v", {"head_dim_v": 64}),
            ("v_format", {"v_format": "fp32"}),
            ("v_format", {"layer_formats": {1: ("fp32", "bf16")}}),
            ("kv_sources", {"v_in_k": [48, 0], "head_dim_v": 48, "kv_sources": {1: 0}}),
        ],
    )
    def test_what_is_refused(self, argument, changes):
        arguments = {"num_layers": 2, "num_kv_heads": 1, "head_dim": 64, "v_in_k": 48, **changes}
        with pytest.raises((kvcore.InvalidArgument, kvcore.InvalidType), match=f"^{argument}: "):
            kvcore.CacheSpec(**arguments)


class TestAttention:
    @pytest.mark.parametrize("format", FORMATS)
    def test_latent_of_128_heads(self, format, rng):
        """A chunk of a prompt, then decoding, over a poisoned cache."""
        cache = latent_cache(16, format)
        a, b = cache.sequence(), cache.sequence()
        texts = {a: grow(cache, [(a, 260)], rng), b: []}
        for entries in ([(a, 5), (b, 20)], [(b, 1), (a, 1)]):
            with cache.step(entries) as step:
                k = random_k(rng, step.num_tokens, cache.spec.layers[0])
                q = random_q(rng, step.num_tokens, HEADS, DIM)
                step.append(0, k, None)
                out, lse = step.attend(0, q, return_lse=True)
            assert out.shape == (len(q), HEADS, DIM_V)
            for s, (sequence, _) in enumerate(entries):
                rows = slice(step.query_starts[s], step.query_starts[s + 1])
                texts[sequence].append(k[rows])
                held = np.concatenate(texts[sequence]).astype(FORMAT_DTYPES[format])
                reference = attention(q[rows, SOME_HEADS], held, held[..., :DIM_V])
                assert_close(out[rows, SOME_HEADS], lse[rows, SOME_HEADS], reference)

    @settings(max_examples=40)
    @given(data=st.data())
    def test_has_the_bits_of_v_stored_apart(self, data):
        """Any shape, chunking and layout: as if V had been appended as well."""
        rng = np.random.default_rng(data.draw(seeds))
        head_dim = 8 * data.draw(st.integers(1, 24))
        v_in_k = 8 * data.draw(st.integers(1, head_dim // 8))
        length, layout = data.draw(st.integers(1, 600)), data.draw(st.sampled_from(LAYOUTS))
        heads, format = data.draw(st.integers(1, 3)), data.draw(st.sampled_from(FORMATS))
        shape = {
            "num_kv_heads": heads,
            "head_dim": head_dim,
            "block_size": data.draw(block_sizes),
            "k_format": format,
            "v_format": format,
        }
        caches = [
            make_cache(40, **shape, v_in_k=v_in_k),
            make_cache(40, **shape, head_dim_v=v_in_k),
        ]
        sequences = [cache.sequence() for cache in caches]
        options = {"window": data.draw(st.sampled_from([None, 1, 40])), "return_lse": True}
        for count in data.draw(cuts(length)):
            k = random_k(rng, count, caches[0].spec.layers[0])
            q = random_q(rng, count, 2 * heads, head_dim)
            results = []
            for cache, sequence in zip(caches, sequences, strict=True):
                with cache.step([(sequence, count)]) as step:
                    rows = to_layout(k, layout, step.query_starts)
                    v = None if cache is caches[0] else rows[..., :v_in_k]
                    step.append(0, rows, v, layout=layout)
                    out, lse = step.attend(
                        0, to_layout(q, layout, step.query_starts), layout=layout, **options
                    )
                    results.append((from_layout(out, layout, step.query_starts), lse))
            for actual, expected in zip(*results, strict=True):
                assert_same_bits(actual, expected)
        for actual, expected in zip(*(s.read(0) for s in sequences), strict=True):
            assert_same_bits(actual, expected)

    def test_a_layer_that_reads_another(self, rng):
        cache = latent_cache(2, num_layers=2, kv_sources={1: 0})
        with cache.step([(cache.sequence(), 20)]) as step:
            step.append(0, random_k(rng, 20, cache.spec.layers[0]), None)
            q = random_q(rng, 20, 4, DIM)
            assert_same_bits(step.attend(1, q), step.attend(0, q))


class TestSequences:
    def test_read_gives_a_view(self, rng):
        cache = latent_cache(format="fp32")
        a = cache.sequence()
        (k,) = grow(cache, [(a, 70)], rng)
        held_k, held_v = a.read(0)
        assert_same_bits(held_k, k)
        assert_same_bits(held_v, k[..., :DIM_V])
        assert np.shares_memory(held_k, held_v)

    def test_fork_and_copy_on_write(self, rng):
        cache = latent_cache(format="fp32", num_kv_heads=2, head_dim=24, v_in_k=16)
        a = cache.sequence()
        (k,) = grow(cache, [(a, 70)], rng)
        b = a.fork(67)
        news = grow(cache, [(a, 3), (b, 2)], rng)
        assert cache.stats().copies == 2  # both write into what they share
        poison(cache, [a, b])
        for sequence, kept, new in ((a, 70, news[0]), (b, 67, news[1])):
            expected = np.concatenate([k[:kept], new])
            for held, rows in zip(sequence.read(0), (expected, expected[..., :16]), strict=True):
                assert_same_bits(held, rows)
        b.truncate(1)
        assert_same_bits(b.read(0)[1], k[:1, :, :16])
        assert_balanced(cache)

    def test_prefix_hits(self, rng):
        cache = latent_cache(format="fp32")
        tokens = list(range(100))
        a = cache.sequence(tokens)
        (k,) = grow(cache, [(a, tokens)], rng)
        a.free()
        b = cache.sequence(tokens)
        assert len(b) == 64
        assert_same_bits(b.read(0)[0], k[:64])

    def test_rollback(self, rng):
        cache = latent_cache()
        a = cache.sequence()
        grow(cache, [(a, 10)], rng)
        before = a.read(0)[0]
        with pytest.raises(ZeroDivisionError), cache.step([(a, 100)]) as step:
            step.append(0, random_k(rng, 100, cache.spec.layers[0]), None)
            raise ZeroDivisionError
        assert_same_bits(a.read(0)[0], before)
        assert_balanced(cache)


class TestArguments:
    def test_v_must_be_none(self, rng):
        cache = latent_cache(num_layers=2, v_in_k=[DIM_V, 0])
        a = cache.sequence()
        step = cache.step([(a, 4)])
        k = random_k(rng, 4, cache.spec.layers[0])
        with pytest.raises(kvcore.InvalidArgument, match=r"^v: expected None, as V of layer 0"):
            step.append(0, k, k[..., :DIM_V])
        with pytest.raises(kvcore.InvalidType, match=r"^v: expected an array"):
            step.append(1, k, None)
        assert np.isnan(stored(cache, 0)[0].astype("f4")).all()
        assert np.isnan(stored(cache, 1)[0].astype("f4")).all()
        step.append(0, k, None)
        step.append(1, k, k)
        step.commit()


class TestOps:
    @pytest.mark.parametrize("layout", ["HND", "NHD"])
    @pytest.mark.parametrize("format", FORMATS)
    def test_a_view_of_k_is_not_copied(self, layout, format, rng):
        shape = (5, 1, 16, DIM) if layout == "HND" else (5, 16, 1, DIM)
        blocks = np.full(shape, np.nan, FORMAT_DTYPES[format])
        k = rng.standard_normal((20, 1, DIM)).astype("f4")
        table = np.array([[3, 1]], np.int32)
        slots = table[0][np.arange(20) // 16] * 16 + np.arange(20) % 16
        kvcore.ops.append_kv(k, None, blocks, None, slots, layout=layout)
        q = random_q(rng, 2, HEADS, DIM)
        out, lse = kvcore.ops.paged_attention(
            q, blocks, blocks[..., :DIM_V], table, [20], [0, 2], layout=layout, return_lse=True
        )
        held = k.astype(FORMAT_DTYPES[format])
        assert_close(out, lse, attention(q, held, held[..., :DIM_V]))
        flat = np.arange(5 * 16)
        written = np.isin(flat, slots)
        rows = blocks.transpose(0, 2, 1, 3) if layout == "HND" else blocks
        assert np.array_equal(np.isnan(rows.reshape(80, DIM).astype("f4")).any(1), ~written)

    def test_over_plain_arrays(self, rng):
        k = rng.standard_normal((30, 1, DIM)).astype("f4")
        q = random_q(rng, 3, 4, DIM)
        out, lse = kvcore.ops.attention(q, k, k[..., :DIM_V], return_lse=True)
        assert_close(out, lse, attention(q, k, k[..., :DIM_V]))

    @pytest.mark.parametrize("missing", ["v", "v_blocks"])
    def test_v_and_its_blocks_go_together(self, missing):
        blocks, rows = np.zeros((2, 1, 16, 16), "f4"), np.zeros((1, 1, 16), "f4")
        v, v_blocks = (None, blocks) if missing == "v" else (rows, None)
        with pytest.raises(kvcore.InvalidType, match=f"^{missing}: expected an array"):
            kvcore.ops.append_kv(rows, v, blocks, v_blocks, [3])
        assert not blocks.any()
