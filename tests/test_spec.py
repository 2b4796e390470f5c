"""CacheSpec: what it accepts, what it counts."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given

import kvcore
from kvcore import CacheSpec, GroupSpec, LayerSpec
from strategies import specs

ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}

REFUSALS = (kvcore.InvalidArgument, kvcore.InvalidType)


def test_defaults():
    spec = CacheSpec(2, 3, 64)
    assert spec.num_layers == 2 and spec.groups == (GroupSpec(64),)
    assert spec.layers == tuple(LayerSpec(3, 64, 64, "bf16", "bf16", 0, i) for i in range(2))


def test_one_value_a_layer():
    spec = CacheSpec(
        3,
        [1, 2, 4],
        [8, 16, 32],
        [16, 16, 8],
        groups=[GroupSpec(16), GroupSpec(4096)],
        layer_groups=[0, 1, 0],
        k_format="fp16",
        layer_formats={1: ("float32", "bfloat16")},
    )
    assert spec.layers == (
        LayerSpec(1, 8, 16, "fp16", "bf16", 0, 0),
        LayerSpec(2, 16, 16, "fp32", "bf16", 1, 1),
        LayerSpec(4, 32, 8, "fp16", "bf16", 0, 2),
    )
    assert spec.bytes_per_token == (8 + 16) * 2 + 2 * 16 * (4 + 2) + 4 * (32 + 8) * 2
    assert spec.block_nbytes(1) == 4096 * 2 * 16 * 6


@given(spec=specs())
def test_bytes_are_what_the_owned_rows_take(spec):
    tokens = [
        sum(
            x.num_kv_heads
            * (x.head_dim * ELEMENT_BYTES[x.k_format] + x.head_dim_v * ELEMENT_BYTES[x.v_format])
            for i, x in enumerate(spec.layers)
            if x.kv_source == i and x.group == g
        )
        for g in range(len(spec.groups))
    ]
    assert spec.bytes_per_token == sum(tokens)
    counts = range(3, 3 + len(spec.groups))
    expected = sum(
        t * g.block_size * n for t, g, n in zip(tokens, spec.groups, counts, strict=True)
    )
    assert spec.nbytes(list(counts)) == expected
    assert spec.nbytes(5) == spec.nbytes([5] * len(spec.groups))


def test_bytes_beyond_64_bits_are_counted():
    assert CacheSpec(10, 10**9, 1024).nbytes(2**50) == 10**10 * 2 * 1024 * 2 * 64 * 2**50


@given(spec=specs())
def test_a_spec_is_a_value(spec):
    again = pickle.loads(pickle.dumps(spec))
    assert again == spec and hash(again) == hash(spec) and repr(again) == repr(spec)
    assert again.nbytes(3) == spec.nbytes(3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.layers = ()


def test_specs_that_differ():
    base = CacheSpec(2, 2, 16)
    for other in (
        CacheSpec(3, 2, 16),
        CacheSpec(2, 1, 16),
        CacheSpec(2, 2, 24),
        CacheSpec(2, 2, 16, 24),
        CacheSpec(2, 2, 16, block_size=32),
        CacheSpec(2, 2, 16, k_format="fp16"),
        CacheSpec(2, 2, 16, kv_sources={1: 0}),
    ):
        assert other != base


def test_numbers_may_come_from_numpy():
    spec = CacheSpec(np.int64(2), np.array([1, 2]).tolist(), np.int32(16), block_size=np.int64(16))
    assert spec == CacheSpec(2, [1, 2], 16, block_size=16)
    assert type(spec.num_layers) is int and type(spec.layers[0].head_dim) is int


@pytest.mark.parametrize("alias", ["float16", "half", "fp16"])
def test_format_aliases_are_the_same_spec(alias):
    assert CacheSpec(1, 1, 8, k_format=alias) == CacheSpec(1, 1, 8, k_format="fp16")


BAD = [
    ("num_layers", {"num_layers": 0}),
    ("num_layers", {"num_layers": -1}),
    ("num_layers", {"num_layers": 1.0}),
    ("num_layers", {"num_layers": True}),
    ("num_layers", {"num_layers": None}),
    ("num_kv_heads", {"num_kv_heads": 0}),
    ("num_kv_heads", {"num_kv_heads": [2]}),
    ("num_kv_heads", {"num_kv_heads": [2, 0]}),
    ("num_kv_heads", {"num_kv_heads": "22"}),
    ("head_dim", {"head_dim": 0}),
    ("head_dim", {"head_dim": 4}),
    ("head_dim", {"head_dim": 60}),
    ("head_dim", {"head_dim": 1032}),
    ("head_dim", {"head_dim": [16, 17]}),
    ("head_dim", {"head_dim": 16.0}),
    ("head_dim_v", {"head_dim_v": 20}),
    ("head_dim_v", {"head_dim_v": [16]}),
    ("block_size", {"block_size": 8}),
    ("block_size", {"block_size": 48}),
    ("block_size", {"block_size": 8192}),
    ("block_size", {"block_size": "64"}),
    ("k_format", {"k_format": "fp7"}),
    ("k_format", {"k_format": None}),
    ("v_format", {"v_format": "FP32"}),
    ("v_format", {"v_format": ["fp32"]}),
    ("layer_formats", {"layer_formats": {2: ("fp32", "fp32")}}),
    ("layer_formats", {"layer_formats": {0: "fp32"}}),
    ("layer_formats", {"layer_formats": {0: ("fp32",)}}),
    ("layer_formats", {"layer_formats": {0: ("fp32", "fp7")}}),
    ("layer_formats", {"layer_formats": {"0": ("fp32", "fp32")}}),
    ("layer_formats", {"layer_formats": {0: None}}),
    ("layer_formats", {"layer_formats": [("fp32", "fp32")]}),
    ("layer_groups", {"groups": [GroupSpec(16), GroupSpec(32)]}),
    ("layer_groups", {"layer_groups": [0]}),
    ("layer_groups", {"layer_groups": [0, 1]}),
    ("layer_groups", {"layer_groups": [0, -1]}),
    ("layer_groups", {"layer_groups": 0}),
    ("groups", {"groups": [GroupSpec(16), GroupSpec(32)], "layer_groups": [0, 0]}),
    ("groups", {"groups": []}),
    ("groups", {"groups": [16]}),
    ("groups", {"groups": 16}),
    ("groups", {"num_layers": 17, "groups": [GroupSpec(16)] * 17, "layer_groups": range(17)}),
    ("kv_sources", {"kv_sources": {0: 1}}),
    ("kv_sources", {"kv_sources": {2: 0}}),
    ("kv_sources", {"kv_sources": {1: -1}}),
    ("kv_sources", {"kv_sources": {1: "0"}}),
    ("kv_sources", {"kv_sources": [0]}),
    ("kv_sources", {"kv_sources": {1: 0}, "head_dim": [16, 24]}),
    ("kv_sources", {"kv_sources": {1: 0}, "num_kv_heads": [1, 2]}),
    ("kv_sources", {"num_layers": 3, "kv_sources": {1: 0, 2: 1}}),
    (
        "kv_sources",
        {
            "kv_sources": {1: 0},
            "num_layers": 3,
            "groups": [GroupSpec(16)] * 2,
            "layer_groups": [0, 1, 1],
        },
    ),
]


@pytest.mark.parametrize(("argument", "changes"), BAD, ids=lambda x: str(x)[:60])
def test_what_is_refused(argument, changes):
    arguments = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, **changes}
    with pytest.raises(REFUSALS, match=f"^{argument}: "):
        CacheSpec(**arguments)


@pytest.mark.parametrize("size", [0, 8, 17, 48, 8192, -16, 16.0, None])
def test_block_sizes_that_are_refused(size):
    with pytest.raises(
        (kvcore.InvalidArgument, kvcore.InvalidType), match=r"^block_size: expected"
    ):
        GroupSpec(size)


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_block_sizes(size):
    cache = kvcore.KVCache(CacheSpec(1, 1, 8, block_size=size), num_blocks=2)
    a = cache.sequence()
    rows = np.ones((size + 1, 1, 8), np.float32)
    with cache.step([(a, size + 1)]) as step:
        step.append(0, rows, rows)
    assert a.blocks().tolist() == [0, 1]


@pytest.mark.parametrize("num_blocks", [0, -1, 1.5, "4", [4, 4], [], None, [0], ["4"]])
def test_block_counts_that_are_refused(num_blocks):
    with pytest.raises(
        (kvcore.InvalidArgument, kvcore.InvalidType), match=r"^num_blocks: expected"
    ):
        CacheSpec(1, 1, 8).nbytes(num_blocks)
