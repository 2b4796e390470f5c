"""CacheSpec with quantized formats: what it accepts, and the blocks, bytes and bits it predicts."""

from __future__ import annotations

import pickle

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvcore
from kvcore import CacheSpec, GroupSpec
from kvcore.formats import FORMATS
from mark_backend import marked

ROW = [name for name, format in FORMATS.items() if format.kind == "row"]
KEYS = [*FORMATS]
VALUES = [name for name, format in FORMATS.items() if format.kind != "channel"]
SCALES = {"key_scales": np.ones((1, 2, 64)), "value_scales": np.ones((1, 2, 64))}


def spec_of(k_format, v_format, **options):
    return CacheSpec(1, 2, 64, k_format=k_format, v_format=v_format, **{**SCALES, **options})


class TestRefusals:
    @pytest.mark.parametrize(
        ("argument", "options"),
        [
            ("raw_first", {"raw_first": -1}),
            ("raw_first", {"raw_first": 33}),
            ("raw_first", {"raw_first": 4.0}),
            ("raw_last", {"raw_last": 31}),
            ("raw_last", {"raw_last": -32}),
            ("raw_last", {"raw_last": 4128}),
            ("raw_last", {"raw_last": None}),
            ("v_format", {"v_format": "chan4"}),
            ("v_format", {"layer_formats": {0: ("chan4", "chan2")}}),
            ("block_size", {"k_format": "chan4", "block_size": 16}),
            ("block_size", {"k_format": "chan2", "groups": [GroupSpec(16)]}),
            ("k_format", {"v_in_k": 32, "v_format": "rot8"}),
            ("head_dim", {"head_dim": 72}),
            ("head_dim", {"k_format": "rot6", "head_dim": 96}),
            ("head_dim", {"k_format": "chan4", "head_dim": 80}),
            ("head_dim_v", {"v_format": "rot4", "head_dim_v": 80}),
            ("saturate", {"saturate": 1}),
            ("key_bias", {"key_bias": 0.5}),
            ("key_bias", {"key_bias": "bias"}),
            ("key_bias", {"key_bias": np.zeros((2, 2, 64))}),
            (r"key_bias\[0\]", {"key_bias": np.zeros((1, 2, 32))}),
            (r"key_bias\[0\]", {"key_bias": np.full((1, 2, 64), np.nan)}),
            (r"key_bias\[0\]", {"key_bias": np.full((1, 2, 64), 3.4e38)}),
            (r"key_bias\[0\]", {"key_bias": [[["a"] * 64] * 2]}),
            ("key_scales", {"k_format": "int8_static"}),
            ("value_scales", {"v_format": "int8_static"}),
            (r"key_scales\[0\]", {"k_format": "int8_static", "key_scales": np.zeros((1, 2, 64))}),
            (r"key_scales\[0\]", {"k_format": "int8_static", "key_scales": [np.ones((2, 32))]}),
            (r"value_scales\[0\]", {"v_format": "int8_static", "value_scales": [[[np.inf] * 64]]}),
        ],
        ids=lambda x: str(x)[:40],
    )
    def test_arguments(self, argument, options):
        arguments = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 64, "k_format": "rot8"}
        refusals = (kvcore.InvalidArgument, kvcore.InvalidType)
        with pytest.raises(refusals, match=f"^{argument}: "):
            CacheSpec(**{**arguments, **options})

    def test_groups_and_raw_pools_beyond_the_most(self):
        options = {"groups": [GroupSpec(64)] * 9, "layer_groups": range(9)}
        with pytest.raises(
            kvcore.InvalidArgument, match=r"^groups: expected at most 16 .* 9 and 9"
        ):
            CacheSpec(9, 1, 64, k_format="rot8", **options)
        CacheSpec(9, 1, 64, k_format="rot8", raw_first=0, raw_last=0, **options)


class TestConstants:
    def test_a_bias_is_rounded_to_bfloat16(self):
        rng = np.random.default_rng(0)
        bias = rng.standard_normal((3, 2, 64)) * 10.0 ** rng.integers(-40, 30, (3, 2, 64))
        spec = CacheSpec(
            3, 2, 64, k_format="rot4", layer_formats={1: ("bf16", "rot4")}, key_bias=bias
        )
        for layer in (0, 2):
            held = spec.layer_bias(layer)
            expected = bias[layer].astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(held, expected)
            assert held.dtype == np.float32 and not held.flags.writeable
        assert spec.layer_bias(1) is None  # its keys are not quantized

    def test_scales_belong_to_int8_static(self):
        k_scales = [None, np.full((2, 64), 3e-41)]
        spec = CacheSpec(
            2,
            2,
            64,
            32,
            k_format="int8",
            layer_formats={1: ("int8_static", "int8_static")},
            key_scales=k_scales,
            value_scales=np.full((2, 2, 32), 0.5),
        )
        assert spec.layer_scales(0) == (None, None)
        k, v = spec.layer_scales(1)
        np.testing.assert_array_equal(k, np.float32(3e-41))
        np.testing.assert_array_equal(v, np.full((2, 32), 0.5, np.float32))

    def test_a_reading_layer_has_its_sources(self):
        bias = np.stack([np.full((1, 64), 1.0), np.full((1, 64), 2.0)])
        spec = CacheSpec(2, 1, 64, k_format="rot8", kv_sources={1: 0}, key_bias=bias)
        np.testing.assert_array_equal(spec.layer_bias(1), 1)

    def test_a_spec_stays_a_value(self):
        bias = np.random.default_rng(0).standard_normal((1, 2, 64))
        spec, same = (spec_of("rot4", "int8_static", key_bias=bias.copy()) for _ in range(2))
        assert spec == same and hash(spec) == hash(same)
        again = pickle.loads(pickle.dumps(spec))
        assert again == spec and hash(again) == hash(spec) and repr(again) == repr(spec)
        assert "Channels([2, 64]" in repr(spec) and len(repr(spec)) < 1000
        bias[0, 1, 5] = 7
        assert spec_of("rot4", "int8_static", key_bias=bias) != spec
        assert spec_of("rot4", "int8_static") != spec

    def test_raw_rows_are_part_of_it_where_there_are_any(self):
        assert spec_of("rot4", "rot4", raw_last=64) != spec_of("rot4", "rot4")
        assert spec_of("bf16", "fp16", raw_last=64, saturate=True) == spec_of("bf16", "fp16")
        spec = spec_of("bf16", "fp16")
        assert (spec.raw_first, spec.raw_last, spec.saturate) == (0, 0, False)


#: Bits of an element at D 64 and 128, and the length from which a sequence is smaller than bf16's.
BITS = [
    ("rot8", "rot8", 8.25, 8.125),
    ("rot6", "rot6", 6.25, 6.125),
    ("rot6", "rot4", 5.25, 5.125),
    ("chan4", "rot4", 4.625, 4.5625),
    ("rot4", "rot4", 4.25, 4.125),
    ("chan4", "rot3", 4.125, 4.0625),
    ("rot3", "rot3", 3.25, 3.125),
    ("chan2", "rot2", 2.625, 2.5625),
    ("int8", "int8", 8.25, 8.125),
    ("int4", "int4", 5.0, 5.0),
    ("fp8_e4m3", "fp8_e4m3", 8.25, 8.125),
    ("int8_static", "int8_static", 8.0, 8.0),
]


class TestSizes:
    @pytest.mark.parametrize(("k_format", "v_format", "bits_64", "bits_128"), BITS)
    def test_bits(self, k_format, v_format, bits_64, bits_128):
        for dim, bits in ((64, bits_64), (128, bits_128)):
            scales = {name: np.ones((2, 3, dim)) for name in SCALES}
            spec = CacheSpec(2, 3, dim, k_format=k_format, v_format=v_format, **scales)
            assert spec.bits_per_element() == bits
            assert spec.bytes_per_token == 2 * 3 * 2 * dim * bits / 8
            # 64 raw rows of the first 4 and the last 32 to 63, in whole blocks.
            assert spec.bits_per_element(32_768) == bits + 64 * 16 / 32_768
            assert spec.bits_per_element(1024) == bits + 64 * 16 / 1024
            assert spec.bits_per_element(1000) == bits + 96 * 16 / 1000

    def test_bits_without_raw_rows(self):
        spec = spec_of("rot8", "rot8", raw_first=0, raw_last=0)
        assert spec.bits_per_element(1) == spec.bits_per_element() == 8.25
        assert spec.raw_bytes_per_token() == spec.raw_blocks_for(1000) == 0

    @given(
        k_format=st.sampled_from(KEYS),
        v_format=st.sampled_from(VALUES),
        block_size=st.sampled_from([32, 64, 512]),
        retention=st.sampled_from([None, None, 20, 300]),
        raw_first=st.sampled_from([0, 4, 32]),
        raw_last=st.sampled_from([0, 32, 96]),
    )
    def test_break_even(self, k_format, v_format, block_size, retention, raw_first, raw_last):
        groups = [GroupSpec(block_size, retention)]
        spec = spec_of(k_format, v_format, groups=groups, raw_first=raw_first, raw_last=raw_last)
        bf16 = spec_of("bf16", "bf16", groups=groups)
        saved = [bf16.sequence_nbytes(n) - spec.sequence_nbytes(n) for n in range(1, 3000)]
        length = spec.break_even_length()
        if length is None:
            assert min(saved[1500:]) < 0 or max(saved[1500:]) <= 0
            return
        assert saved[length - 1] > 0 and min(saved[length - 1 :]) >= 0
        assert not any(
            value > 0 and min(saved[n:]) >= 0 for n, value in enumerate(saved[: length - 1])
        )

    def test_break_even_of_the_pairs(self):
        lengths = {
            pair: spec_of(*pair).break_even_length()
            for pair in [("rot8", "rot8"), ("rot4", "rot4"), ("chan2", "rot2"), ("bf16", "bf16")]
        }
        assert lengths == {
            ("rot8", "rot8"): 191,
            ("rot4", "rot4"): 127,
            ("chan2", "rot2"): 65,
            ("bf16", "bf16"): None,
        }

    @given(
        raw_first=st.sampled_from([0, 4]),
        raw_last=st.sampled_from([0, 32, 64]),
        slack=st.sampled_from([0, 0, 10]),
        counts=st.lists(st.integers(1, 100), min_size=1, max_size=6),
    )
    def test_a_sequence_takes_what_is_said(self, raw_first, raw_last, slack, counts):
        spec = spec_of(
            "chan4",
            "rot4",
            groups=[GroupSpec(64, None, slack)],
            raw_first=raw_first,
            raw_last=raw_last,
        )
        cache = marked(spec, 20)
        a, peak = cache.sequence(), 0
        for count in counts:
            with cache.step([(a, count)]) as step:
                peak = max(peak, cache.stats().groups[1].in_use)
                step.append(0, range(count), None)
            held = [group.in_use for group in cache.stats().groups]
            sizes = zip(held, (spec.block_nbytes(p) for p in range(2)), strict=True)
            assert spec.sequence_nbytes(len(a)) == sum(n * size for n, size in sizes)
        assert peak <= spec.raw_blocks_for(len(a), max(counts))


@pytest.mark.parametrize("raw", [(4, 32), (0, 0), (0, 96)])
@pytest.mark.parametrize("v_format", ["rot4", "bf16", "int8_static"])
@pytest.mark.parametrize("k_format", KEYS)
def test_what_is_predicted_is_allocated(k_format, v_format, raw):
    scales = {name: np.ones((3, 2, 64)) for name in SCALES}
    spec = CacheSpec(
        3,
        2,
        64,
        groups=[GroupSpec(64), GroupSpec(32, 100)],
        layer_groups=[0, 1, 0],
        k_format=k_format,
        v_format=v_format,
        layer_formats={0: ("bf16", "fp32")},
        raw_first=raw[0],
        raw_last=raw[1],
        **scales,
    )
    cache = kvcore.KVCache(spec, [7, 5])
    assert cache.stats().bytes == spec.nbytes([7, 5])
    if spec.raw_groups:
        cache = kvcore.KVCache(spec, 6, 9)
        assert cache.stats().bytes == spec.nbytes(6, 9)
    cache = kvcore.KVCache(spec, memory=700_000)
    assert cache.stats().bytes == spec.nbytes(cache.num_blocks, cache.num_raw_blocks or None)
    assert cache.stats().bytes <= 700_000


class TestRawBlocks:
    def test_by_default(self):
        spec = spec_of("rot4", "rot4")
        # A sequence of 1,024 tokens holds 3 raw blocks, and a step of 2,048 takes 64 more.
        assert spec.raw_blocks_for(1024) == 3
        assert marked(spec, 1600).num_raw_blocks == (100 * 3 + 64,)
        assert marked(spec, 1601).num_raw_blocks == (101 * 3 + 64,)
        assert marked(spec, 1600, sequence_length=100_000).num_raw_blocks == (2 * 3 + 64,)
        assert marked(spec, 1600, sequence_length=64).num_raw_blocks == (1600 * 2,)
        # No more than if every token were read raw.
        assert marked(spec, 20).num_raw_blocks == (40,)
        small = spec_of("rot4", "rot4", block_size=16)
        assert marked(small, 20).num_raw_blocks == (20,)

    def test_given(self):
        groups = [GroupSpec(64), GroupSpec(32)]
        scales = {name: np.ones((2, 2, 64)) for name in SCALES}
        spec = CacheSpec(2, 2, 64, groups=groups, layer_groups=[0, 1], k_format="rot4", **scales)
        assert marked(spec, 8, 5).num_raw_blocks == (5, 5)
        assert marked(spec, 8, [5, 6]).num_raw_blocks == (5, 6)
        for bad in (0, -1, 1.5, [5], [5, 0], "55"):
            with pytest.raises(
                (kvcore.InvalidArgument, kvcore.InvalidType), match=r"^num_raw_blocks: expected"
            ):
                marked(spec, 8, bad)
        with pytest.raises(kvcore.InvalidArgument, match=r"^num_raw_blocks: .* slots are int32"):
            marked(spec, 8, 2**26)

    def test_none_to_give(self):
        spec = spec_of("bf16", "bf16")
        with pytest.raises(kvcore.InvalidArgument, match=r"^num_raw_blocks: expected None"):
            marked(spec, 8, 4)
        with pytest.raises(kvcore.InvalidArgument, match=r"^sequence_length: expected None"):
            marked(spec, 8, sequence_length=4)

    def test_bytes(self):
        spec = spec_of("chan4", "bf16")
        assert spec.bytes_per_token == 2 * (64 * 5 // 8 + 64 * 2)
        assert spec.raw_bytes_per_token() == 2 * 64 * 2
        assert spec.nbytes(10, 3) == 10 * 64 * 336 + 3 * 32 * 256
        assert spec.nbytes(10) == spec.nbytes(10, 20)

    @pytest.mark.parametrize("sequence_length", [None, 100, 5000])
    @pytest.mark.parametrize("num_raw_blocks", [None, 50])
    @pytest.mark.parametrize("memory", [1_000_000, 3_333_333, 50_000_000])
    def test_memory_is_filled_and_not_exceeded(self, memory, num_raw_blocks, sequence_length):
        spec = spec_of("rot4", "rot4")
        options = {"memory": memory, "sequence_length": sequence_length}
        cache = marked(spec, None, num_raw_blocks, **options)
        assert spec.nbytes(cache.num_blocks, cache.num_raw_blocks) <= memory
        more = cache.num_blocks[0] + 1
        raw = spec.raw_blocks_per_group(more, num_raw_blocks, sequence_length)
        assert spec.nbytes(more, raw) > memory

    def test_too_little_memory(self):
        with pytest.raises(kvcore.InvalidArgument, match=r"^memory: expected at least 41472 bytes"):
            marked(spec_of("rot4", "rot4"), memory=41_471)
        assert marked(spec_of("rot4", "rot4"), memory=41_472).num_blocks == (1,)
