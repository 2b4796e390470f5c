"""The four layouts of new rows: the same bits in, the same bits out, padding ignored and zeroed."""

from __future__ import annotations

import numpy as np
import pytest

import kvcore
from strategies import DTYPES, LAYOUTS
from support import (
    assert_same_bits,
    from_layout,
    grow,
    machine,
    make_cache,
    random_kv,
    random_q,
    to_layout,
)

NEWS = [7, 1, 20, 3]
PADDED = [layout for layout in LAYOUTS if layout.startswith("B")]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def cache():
    return make_cache(40, head_dim=24, head_dim_v=40)


def entries(cache):
    rng = np.random.default_rng(1)
    sequences = [cache.sequence() for _ in NEWS]
    grow(cache, [(s, 30 + 10 * i) for i, s in enumerate(sequences)], rng)
    return list(zip(sequences, NEWS, strict=True))


def run(cache, k, v, q, layout, extra=0, **options):
    """One step in a layout; (out as it came, lse, query_starts, what was stored)."""
    members = entries(cache)
    with cache.step(members) as step:
        starts = step.query_starts
        rows = [to_layout(x, layout, starts, extra) for x in (k, v, q)]
        step.append(0, *rows[:2], layout=layout)
        out, lse = step.attend(0, rows[2], layout=layout, return_lse=True, **options)
    stored = [np.concatenate(x) for x in zip(*(s.read(0) for s, _ in members), strict=True)]
    for sequence, _ in members:
        sequence.free()
    return out, lse, starts, stored


@pytest.mark.parametrize("isa", kvcore.available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("extra", [0, 5])
def test_every_layout_gives_the_same_bits(cache, rng, isa, dtype, layout, extra):
    """With NaN in the padding on the way in, and zeros there on the way out."""
    k, v = random_kv(rng, sum(NEWS), cache.spec.layers[0], dtype)
    q = random_q(rng, sum(NEWS), 6, 24, dtype)
    with machine(isa, 2):
        expected, expected_lse, starts, expected_stored = run(cache, k, v, q, "NHD")
        out, lse, _, stored = run(cache, k, v, q, layout, extra)
    assert_same_bits(np.ascontiguousarray(from_layout(out, layout, starts)), expected)
    assert_same_bits(lse, expected_lse)
    for actual, wanted in zip(stored, expected_stored, strict=True):
        assert_same_bits(actual, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_has_the_layouts_shape(cache, rng, layout):
    k, v = random_kv(rng, sum(NEWS), cache.spec.layers[0])
    q = random_q(rng, sum(NEWS), 6, 24)
    out, lse, _, _ = run(cache, k, v, q, layout, extra=2)
    total, count, n = sum(NEWS), len(NEWS), max(NEWS) + 2
    shapes = {
        "NHD": (total, 6, 40),
        "HND": (6, total, 40),
        "BSHD": (count, n, 6, 40),
        "BHSD": (count, 6, n, 40),
    }
    assert out.shape == shapes[layout] and lse.shape == (total, 6)


@pytest.mark.parametrize("append_layout", LAYOUTS)
@pytest.mark.parametrize("attend_layout", LAYOUTS)
def test_append_and_attend_choose_for_themselves(cache, rng, append_layout, attend_layout):
    k, v = random_kv(rng, sum(NEWS), cache.spec.layers[0])
    q = random_q(rng, sum(NEWS), 2, 24)
    expected = run(cache, k, v, q, "NHD")[0]
    with cache.step(entries(cache)) as step:
        starts = step.query_starts
        rows = (to_layout(x, append_layout, starts) for x in (k, v))
        step.append(0, *rows, layout=append_layout)
        out = step.attend(0, to_layout(q, attend_layout, starts), layout=attend_layout)
    assert_same_bits(np.ascontiguousarray(from_layout(out, attend_layout, starts)), expected)


class TestOut:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_written_and_returned(self, cache, rng, layout, dtype):
        k, v = random_kv(rng, sum(NEWS), cache.spec.layers[0])
        q = random_q(rng, sum(NEWS), 4, 24, dtype)
        fresh = run(cache, k, v, q, layout, extra=3)[0]
        target = np.full_like(fresh, np.nan)
        returned = run(cache, k, v, q, layout, extra=3, out=target)[0]
        assert returned is target
        assert_same_bits(target, fresh)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_may_be_a_part_of_a_larger_array(self, cache, rng, layout):
        """Only the part is written: what lies around it stays."""
        k, v = random_kv(rng, sum(NEWS), cache.spec.layers[0])
        q = random_q(rng, sum(NEWS), 4, 24)
        fresh = run(cache, k, v, q, layout)[0]
        around = np.full([n + 2 for n in fresh.shape], 7, np.float32)
        inside = tuple(slice(1, -1) for _ in fresh.shape)
        run(cache, k, v, q, layout, out=around[inside])
        assert_same_bits(np.ascontiguousarray(around[inside]), fresh)
        around[inside] = 7
        assert (around == 7).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["part", "every other", "reversed", "transposed", "repeated"])
def test_strided_rows(cache, rng, layout, kind):
    k, v = random_kv(rng, sum(NEWS), cache.spec.layers[0])
    q = random_q(rng, sum(NEWS), 4, 24)
    if kind == "repeated":  # one head for all, by a stride of zero
        k, v, q = (np.repeat(x[:, :1], x.shape[1], axis=1) for x in (k, v, q))
    expected, _, starts, _ = run(cache, k, v, q, layout)
    with cache.step(entries(cache)) as step:
        rows = [strided(to_layout(x, layout, starts), kind, layout) for x in (k, v, q)]
        assert kind == "repeated" or not any(x.flags.c_contiguous for x in rows)
        step.append(0, *rows[:2], layout=layout)
        out = step.attend(0, rows[2], layout=layout)
    assert_same_bits(np.ascontiguousarray(out), np.ascontiguousarray(expected))


def strided(array, kind, layout):
    """An array equal to `array` whose memory lies otherwise."""
    if kind == "part":
        around = np.full([n + 3 for n in array.shape], np.nan, array.dtype)
        result = around[tuple(slice(1, -2) for _ in array.shape)]
    elif kind == "every other":
        result = np.full([2 * n for n in array.shape], np.nan, array.dtype)
        result = result[tuple(slice(None, None, 2) for _ in array.shape)]
    elif kind == "reversed":
        result = np.empty_like(array)[tuple(slice(None, None, -1) for _ in array.shape)]
    elif kind == "transposed":
        result = np.empty(array.shape, array.dtype, order="F")
    else:
        axis = layout.index("H")
        return np.broadcast_to(np.take(array, [0], axis=axis), array.shape)
    result[...] = array
    return result


def test_padded_rows_of_one_token_each_are_a_decode(cache, rng):
    sequences = [cache.sequence() for _ in range(5)]
    grow(cache, [(s, 9) for s in sequences], rng)
    k, v = random_kv(rng, 5, cache.spec.layers[0])
    q = random_q(rng, 5, 2, 24)
    with cache.step([(s, 1) for s in sequences]) as step:
        step.append(0, k[:, None], v[:, None], layout="BSHD")
        ragged = step.attend(0, q)
        padded = step.attend(0, q[:, :, None], layout="BHSD")
    assert_same_bits(np.ascontiguousarray(padded[:, :, 0]), ragged)


def test_one_large_block_is_a_contiguous_cache(rng):
    """block_size = max_len: a sequence's keys are one dense [H, length, D] part of the storage."""
    cache = make_cache(3, head_dim=24, block_size=512)
    a = cache.sequence()
    grow(cache, [(a, 300)], rng)
    block = a.blocks().item()
    k_blocks = cache.blocks(0)[0]
    np.testing.assert_array_equal(k_blocks[block, :, :300].transpose(1, 0, 2), a.read(0)[0])
