"""Bytes of the planner against hand arithmetic and against what caches allocate."""

from __future__ import annotations

from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcore
from kvcore import CacheSpec, GroupSpec, KVCache
from kvcore.formats import FORMATS
from kvcore.planner import (
    activation_bytes,
    blocks_for,
    get_model,
    growth,
    layer_bytes,
    memory,
    score_memory,
)
from mark_backend import MarkBackend

GIB = 1 << 30


@pytest.mark.parametrize(
    ("name", "k_format", "nbytes"),
    [
        ("llama-2-7b", "fp16", 524_288),
        ("llama-3-8b", "bf16", 131_072),
        ("deepseek-v3", "bf16", 61 * 576 * 2),
        ("llama-3-8b", "rot8", 32 * 2 * 8 * (128 + 2)),
        ("llama-3-8b", "int4", 32 * 2 * 8 * (64 + 16)),
    ],
)
def test_bytes_per_token(name, k_format, nbytes):
    assert get_model(name).cache_spec(k_format).bytes_per_token == nbytes


def test_llama_2_takes_two_gibibytes_at_4096():
    assert blocks_for(get_model("llama-2-7b").cache_spec("fp16"), 4096).nbytes == 2 * GIB


def test_layers_add_up():
    spec = get_model("gemma-3-1b").cache_spec()
    layers = layer_bytes(spec)
    assert sum(layer.nbytes for layer in layers) == spec.bytes_per_token
    assert [layer.window for layer in layers[:7]] == [512] * 5 + [None, 512]


def test_a_layer_that_reads_another_has_no_bytes():
    spec = CacheSpec(3, 1, 16, kv_sources={2: 1})
    assert [layer.nbytes for layer in layer_bytes(spec)] == [64, 64, 0]


@pytest.mark.parametrize("name", ["gemma-3-1b", "gemma-3-4b", "gpt-oss-20b", "smollm2-135m"])
@pytest.mark.parametrize("formats", [("bf16", "bf16"), ("rot8", "rot8"), ("chan4", "rot4")])
def test_hybrids_equal_the_cache_s_own_allocation(name, formats):
    spec = get_model(name).cache_spec(*formats)
    blocks = blocks_for(spec, 2000, 2, num_new=2000)
    cache = KVCache(spec, blocks.num_blocks, blocks.num_raw_blocks or None)
    assert cache.stats().bytes == blocks.nbytes


def test_a_window_group_takes_no_more_than_it_keeps():
    model = get_model("gpt-oss-20b")
    spec = model.cache_spec()
    windowed = spec.groups.index(GroupSpec(64, 128))
    counts = [blocks_for(spec, n).num_blocks[windowed] for n in (128, 4096, 65536)]
    assert counts == [2, 3, 3]


@st.composite
def specs(draw):
    num_layers = draw(st.integers(1, 4))
    size = draw(st.sampled_from([32, 64, 128]))
    extents = st.sampled_from([None, 16, 100])
    windows = draw(st.lists(extents, min_size=1, max_size=min(2, num_layers), unique=True))
    quantized = [name for name in FORMATS if name != "int8_static"]
    k_format = draw(st.sampled_from(quantized))
    v_format = draw(st.sampled_from([n for n in quantized if FORMATS[n].kind != "channel"]))
    return CacheSpec(
        num_layers,
        draw(st.integers(1, 3)),
        draw(st.sampled_from([64, 128])),
        k_format=k_format,
        v_format=v_format,
        raw_first=draw(st.integers(0, 32)),
        raw_last=draw(st.sampled_from([0, 32, 64])),
        groups=[GroupSpec(size, window) for window in windows],
        layer_groups=[i % len(windows) for i in range(num_layers)],
    )


@settings(deadline=None, max_examples=60)
@given(specs(), st.integers(1, 700), st.integers(1, 3), st.integers(1, 200))
def test_predicted_bytes_are_allocated(spec, length, batch, num_new):
    blocks = blocks_for(spec, length, batch, num_new)
    cache = KVCache(spec, blocks.num_blocks, blocks.num_raw_blocks or None)
    assert cache.stats().bytes == blocks.nbytes


@settings(deadline=None, max_examples=30)
@given(specs(), st.integers(1, 300), st.integers(1, 3))
def test_sequences_grow_in_the_predicted_blocks(spec, length, batch):
    """A cache of exactly these blocks holds the sequences while each grows a token a step."""
    blocks = blocks_for(spec, length, batch)
    with mock.patch("kvcore.cache.get_backend", lambda name: MarkBackend()):
        cache = KVCache(spec, blocks.num_blocks, blocks.num_raw_blocks or None)
    sequences = [cache.sequence() for _ in range(batch)]
    for _ in range(length):
        with cache.step([(sequence, 1) for sequence in sequences]) as step:
            for layer in range(spec.num_layers):
                step.append(layer, [None] * batch, None)
    assert [len(sequence) for sequence in sequences] == [length] * batch


def test_growth_is_a_table_of_batches_and_lengths():
    spec = get_model("llama-3-8b").cache_spec()
    table = growth(spec, [1024, 2048, 4096], [1, 8])
    assert table.nbytes[0] == tuple(131_072 * n for n in (1024, 2048, 4096))
    assert table.nbytes[1] == tuple(8 * n for n in table.nbytes[0])


def test_memory_adds_up():
    model = get_model("llama-2-7b")
    total = memory(model, model.cache_spec("fp16"), 4096, 4)
    assert total.weights == 2 * 6_738_415_616
    assert total.kv == 8 * GIB
    assert total.total == total.weights + total.activations + total.kv
    assert total.kv_share == pytest.approx(8 * GIB / total.total)


def test_activations_by_hand():
    model = get_model("llama-2-7b")
    width = 2 * 4096 + max(4 * 32 * 128, 2 * 11008)
    assert activation_bytes(model, 2048, 3) == 2048 * width * 2 + 3 * 32000 * 4


def test_scores_of_a_prefill():
    scores = score_memory(get_model("llama-2-7b"), 8192, 512)
    assert scores.whole == 32 * 8192 * 8192 * 4
    assert scores.chunked == 32 * 512 * 8192 * 4
    assert scores.online == 0


@pytest.mark.parametrize("argument", ["length", "batch"])
def test_counts_below_one(argument):
    spec = CacheSpec(1, 1, 16)
    with pytest.raises(kvcore.InvalidArgument, match=f"^{argument}: expected at least 1, got 0"):
        blocks_for(spec, **{"length": 1, "batch": 1, argument: 0})
