"""The operations on plain arrays: as the cache computes them, and as NumPy does."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcore
from attention_oracle import assert_close, assert_within, attention, merge
from kvcore import ops
from strategies import DTYPES, FORMATS, seeds
from support import (
    BFLOAT16,
    FORMAT_DTYPES,
    LANES,
    append_all,
    assert_same_bits,
    bits,
    grow,
    machine,
    make_cache,
    random_kv,
    random_q,
    stored,
)

ISAS = kvcore.available_isas()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def in_layout(blocks, layout):
    """Blocks [N, H, B, D] as an array of their own in a layout."""
    return np.ascontiguousarray(blocks if layout == "HND" else blocks.transpose(0, 2, 1, 3))


class TestPagedAttention:
    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("layout", ["HND", "NHD"])
    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("q_dtype", DTYPES)
    def test_gives_the_caches_bits(self, rng, isa, layout, format, q_dtype):
        cache = make_cache(60, head_dim=24, head_dim_v=40, k_format=format, v_format=format)
        sequences = [cache.sequence() for _ in range(3)]
        grow(cache, [(s, n) for s, n in zip(sequences, (290, 5, 64), strict=True)], rng)
        q = random_q(rng, 13, 6, 24, q_dtype)
        with machine(isa, 2), cache.step(list(zip(sequences, (1, 10, 2), strict=True))) as step:
            append_all(step, rng)
            expected = step.attend(0, q, scale=0.3, return_lse=True)
            blocks = (in_layout(x, layout) for x in stored(cache, 0))
            actual = ops.paged_attention(
                q,
                *blocks,
                step.plan().block_tables,
                step.seq_lens,
                step.query_starts,
                scale=0.3,
                return_lse=True,
                layout=layout,
            )
        for x, y in zip(actual, expected, strict=True):
            assert_same_bits(x, y)

    def test_takes_bf16_blocks_as_their_bits(self, rng):
        k, v = (rng.standard_normal((3, 2, 16, 8)).astype(BFLOAT16) for _ in range(2))
        q = random_q(rng, 2, 2, 8)
        books = ([[2, 0]], [20], [0, 2])
        assert_same_bits(
            ops.paged_attention(q, k.view(np.uint16), v.view(np.uint16), *books),
            ops.paged_attention(q, k, v, *books),
        )

    @settings(max_examples=40)
    @given(seed=seeds, data=st.data())
    def test_equals_the_oracle_over_any_books(self, seed, data):
        """Tables in any order, blocks shared, columns beyond the lengths never looked at."""
        rng = np.random.default_rng(seed)
        block_size = data.draw(st.sampled_from([16, 32, 64]))
        lens = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=4))
        news = [data.draw(st.integers(0, n)) for n in lens]
        if not sum(news):
            news[0] = 1
        layout = data.draw(st.sampled_from(["HND", "NHD"]))
        num_blocks = 12
        k, v = (rng.standard_normal((num_blocks, 2, block_size, 16)) for _ in range(2))
        k, v = k.astype(np.float32), v.astype(np.float32)
        width = -(-max(lens) // block_size) + data.draw(st.integers(0, 2))
        tables = rng.integers(0, num_blocks, (len(lens), width))
        for row, length in zip(tables, lens, strict=True):
            row[-(-length // block_size) :] = -(10**6)
        starts = np.cumsum([0, *news])
        q = random_q(rng, starts[-1], 4, 16)
        blocks = (in_layout(x, layout) for x in (k, v))
        out, lse = ops.paged_attention(
            q, *blocks, tables, lens, starts, return_lse=True, layout=layout
        )
        for s, (length, n) in enumerate(zip(lens, news, strict=True)):
            if n:
                rows = slice(starts[s], starts[s + 1])
                place = np.arange(length)
                at = tables[s][place // block_size], slice(None), place % block_size
                assert_close(out[rows], lse[rows], attention(q[rows], k[at], v[at]))

    def test_blocks_may_be_strided(self, rng):
        """One array of K and V side by side, as several engines keep them."""
        both = rng.standard_normal((5, 2, 2, 16, 8)).astype(np.float32)
        k, v = both[:, 0], both[:, 1]
        q = random_q(rng, 1, 2, 8)
        books = ([[4, 1, 2]], [40], [0, 1])
        assert_same_bits(
            ops.paged_attention(q, k, v, *books),
            ops.paged_attention(q, k.copy(), v.copy(), *books),
        )


class TestAppendKv:
    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("layout", ["HND", "NHD"])
    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_writes_what_the_cache_writes(self, rng, isa, layout, format, dtype):
        cache = make_cache(6, head_dim_v=24, k_format=format, v_format=format)
        a = cache.sequence()
        k, v = random_kv(rng, 40, cache.spec.layers[0], dtype)
        arrays = [np.full(in_layout(x, layout).shape, np.nan, x.dtype) for x in stored(cache, 0)]
        with machine(isa), cache.step([(a, 40)]) as step:
            step.append(0, k, v)
            ops.append_kv(k, v, *arrays, step.plan().slots, layout=layout)
        for actual, expected in zip(arrays, stored(cache, 0), strict=True):
            assert_same_bits(actual, in_layout(expected, layout))

    def test_writes_named_slots_only(self, rng):
        k_blocks, v_blocks = (np.full((4, 2, 16, 8), np.nan, np.float32) for _ in range(2))
        k, v = (rng.standard_normal((5, 2, 8)).astype(np.float32) for _ in range(2))
        slots = [63, 0, -1, 17, 16]
        ops.append_kv(k, v, k_blocks, v_blocks, slots)
        for rows, blocks in ((k, k_blocks), (v, v_blocks)):
            flat = blocks.transpose(0, 2, 1, 3).reshape(64, 2, 8)
            for i in (0, 1, 3, 4):
                assert_same_bits(flat[slots[i]], rows[i])
            assert np.isnan(np.delete(flat, [63, 0, 17, 16], axis=0)).all()

    def test_writes_into_a_part_of_an_array(self, rng):
        both = np.full((4, 2, 2, 16, 8), np.nan, np.float32)
        k, v = (rng.standard_normal((3, 2, 8)).astype(np.float32) for _ in range(2))
        ops.append_kv(k, v, both[:, 0], both[:, 1], [5, 6, 40])
        assert_same_bits(np.ascontiguousarray(both[2, 0, :, 8]), k[2])
        assert_same_bits(np.ascontiguousarray(both[0, 1, :, 5:7]), v[:2].transpose(1, 0, 2).copy())
        assert np.isfinite(both).sum() == 2 * 3 * 2 * 8


class TestMergeStates:
    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("parts", [1, 2, 3, 7])
    def test_joins_what_was_split(self, rng, isa, parts):
        """Attention over parts of the keys, merged, is attention over all of them."""
        q = rng.standard_normal((9, 4, 32))
        k, v = (rng.standard_normal((100, 2, 32)) for _ in range(2))
        edges = np.linspace(0, 91, parts + 1).astype(int)
        outs, lses = [], []
        for start, stop in itertools.pairwise(edges):
            # The last part has the new tokens' own triangle; the others all queries see whole.
            stop = 100 if stop == 91 else stop
            single = [
                attention(q[i : i + 1], k[start:e], v[start:e])
                for i, e in enumerate(np.minimum(stop, np.arange(92, 101)))
            ]
            outs.append(np.concatenate([r.out for r in single]))
            lses.append(np.concatenate([r.lse for r in single]))
        with machine(isa):
            out, lse = ops.merge_states(np.float32(outs), np.float32(lses))
        assert out.shape == (9, 4, 32) and lse.shape == (9, 4)
        assert_close(out, lse, attention(q, k, v))

    @pytest.mark.parametrize("isa", ISAS)
    @settings(max_examples=40)
    @given(seed=seeds, shape=st.tuples(*(st.integers(1, 6),) * 3), spread=st.sampled_from([1, 60]))
    def test_equals_the_oracle(self, isa, seed, shape, spread):
        rng = np.random.default_rng(seed)
        parts, rows, width = shape[0], shape[1], 8 * shape[2]
        outs = rng.standard_normal((parts, rows, width)).astype(np.float32)
        lses = (rng.standard_normal((parts, rows)) * spread).astype(np.float32)
        empty = rng.random((parts, rows)) < 0.3
        lses[empty] = -np.inf
        outs[empty] = np.nan  # whatever an empty part's out holds
        with machine(isa, 2):
            out, lse = ops.merge_states(outs, lses)
        expected, expected_lse = merge(outs, lses)
        unseen = np.isneginf(expected_lse)
        assert np.array_equal(np.isneginf(lse), unseen)
        assert not bits(out[unseen]).any()
        largest = np.nanmax(np.where(empty[..., None], 0, np.abs(outs)), axis=(0, 2))
        allowed = np.broadcast_to(1e-6 * largest[:, None], out.shape)
        assert_within(np.abs(out - expected)[~unseen], allowed[~unseen], "out")
        seen = expected_lse[~unseen]
        assert_within(np.abs(lse[~unseen] - seen), 2e-6 + 2.0**-23 * np.abs(seen), "lse")

    def test_an_empty_part_changes_no_bit(self, rng):
        outs = rng.standard_normal((3, 5, 16)).astype(np.float32)
        lses = rng.standard_normal((3, 5)).astype(np.float32)
        expected = ops.merge_states(outs, lses)
        nan, nothing = np.full((1, 5, 16), np.nan, np.float32), np.full((1, 5), -np.inf, np.float32)
        for place in range(4):
            actual = ops.merge_states(
                np.concatenate([outs[:place], nan, outs[place:]]),
                np.concatenate([lses[:place], nothing, lses[place:]]),
            )
            for x, y in zip(actual, expected, strict=True):
                assert_same_bits(x, y)

    def test_one_part_is_itself(self, rng):
        outs = rng.standard_normal((1, 4, 3, 16)).astype(np.float32)
        lses = rng.standard_normal((1, 4, 3)).astype(np.float32)
        out, lse = ops.merge_states(outs, lses)
        assert_same_bits(out, outs[0])
        assert_same_bits(lse, lses[0])

    def test_parts_far_apart_do_not_overflow(self):
        outs = np.array([[[1.0] * 8], [[2.0] * 8]], np.float32)
        out, lse = ops.merge_states(outs, np.array([[3e38], [-3e38]], np.float32))
        assert (out == 1).all() and lse.item() == np.float32(3e38)


def every_value(dtype):
    """Every bit pattern of a 16-bit dtype."""
    return np.arange(2**16, dtype=np.uint16).view(dtype)


def telling_floats(dtype):
    """float32 numbers around every value of a 16-bit format: it, the ties, their neighbours."""
    values = every_value(dtype).astype(np.float32)
    values = values[np.isfinite(values)]
    values = np.sort(values)
    with np.errstate(over="ignore"):
        ties = (values[:-1].astype(np.float64) + values[1:]) / 2
        ties = np.concatenate([ties, [65520.0, -65520.0, 3.3961776e38, -3.3961776e38]])
        ties = ties.astype(np.float32)
        around = [values, ties, *(np.nextafter(ties, np.float32(x)) for x in (-np.inf, np.inf))]
    specials = np.array(
        [0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38, -3.4028235e38],
        np.float32,
    )
    result = np.concatenate([*around, specials])
    return np.concatenate([result, np.zeros(-result.size % 16, np.float32)])


def nans():
    patterns = [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0x7FA00000, 0x7F80FFFF]
    return np.array([*patterns, 0x7FC12345] * 2, np.uint32).view(np.float32)


@pytest.mark.parametrize("isa", ISAS)
class TestFormats:
    @pytest.mark.parametrize("format", ["fp16", "bf16"])
    def test_quantize_rounds_as_numpy(self, isa, format):
        dtype = FORMAT_DTYPES[format]
        x = telling_floats(dtype)
        with machine(isa), np.errstate(over="ignore"):
            expected = x.astype(dtype)
            code = ops.quantize(x.reshape(-1, 16), format).ravel()
        assert np.array_equal(bits(code), bits(expected))

    @pytest.mark.parametrize("format", ["fp16", "bf16"])
    def test_quantize_keeps_nan(self, isa, format):
        with machine(isa):
            code = ops.quantize(nans().reshape(1, -1), format)
        assert np.isnan(code.view(FORMAT_DTYPES[format])).all()
        # Quiet, with the sign and the upper payload.
        shift, quiet = (13, 0x7E00) if format == "fp16" else (16, 0x7FC0)
        payload = (bits(nans()) & 0x7FFFFF) >> shift
        expected = (bits(nans()) >> 16 & 0x8000) | quiet | payload
        assert np.array_equal(bits(code)[0], expected.astype(np.uint16))

    @pytest.mark.parametrize("format", FORMATS)
    def test_dequantize_is_exact(self, isa, format):
        if format == "fp32":
            code = np.random.default_rng(0).integers(0, 2**32, 4096, np.uint32).view(np.float32)
        else:
            code = every_value(FORMAT_DTYPES[format])
        with machine(isa):
            actual = ops.dequantize(code.reshape(-1, 32), format).ravel()
        expected = code.astype(np.float32)
        number = ~np.isnan(expected)
        assert actual.dtype == np.float32
        assert np.array_equal(bits(actual)[number], bits(expected)[number])
        assert np.isnan(actual[~number]).all()

    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_any_input_dtype(self, isa, format, dtype):
        x = random_q(np.random.default_rng(0), 11, 3, 40, dtype, magnitude=30.0)
        with machine(isa):
            code = ops.quantize(x, format)
            decoded = ops.dequantize(code, format)
        expected = x.astype(np.float32).astype(FORMAT_DTYPES[format])
        assert code.shape == decoded.shape == x.shape
        assert np.array_equal(bits(code), bits(expected))
        assert_same_bits(decoded, expected.astype(np.float32))

    def test_fp32_is_the_bits_themselves(self, isa):
        x = np.concatenate([nans(), telling_floats(np.float16)])
        with machine(isa):
            assert_same_bits(ops.quantize(x.reshape(-1, 16), "fp32").ravel(), x)

    @pytest.mark.parametrize("format", ["fp16", "bf16"])
    def test_every_length_of_a_row(self, isa, format):
        rng = np.random.default_rng(0)
        for width in range(8, 80, 8):
            x = rng.standard_normal((3, width)).astype(np.float32)
            with machine(isa):
                code = ops.quantize(x, format)
            assert np.array_equal(bits(code), bits(x.astype(FORMAT_DTYPES[format])))


@pytest.mark.parametrize("format", FORMATS)
def test_quantize_and_dequantize_take_rows_that_lie_anyhow(format):
    x = np.arange(64, dtype=np.float32).reshape(4, 16)
    unaligned = np.zeros(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(x.shape)
    unaligned[:] = x
    expected = ops.quantize(x, format)
    assert_same_bits(ops.quantize(unaligned, format), expected)
    assert_same_bits(ops.quantize(x[::-1, :8], format), expected[::-1, :8].copy())
    assert_same_bits(ops.dequantize(expected[::2], format), x[::2].copy())


def test_format_names_have_aliases():
    x = np.ones((1, 8), np.float32)
    for name, alias in (("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32")):
        assert_same_bits(ops.quantize(x, alias), ops.quantize(x, name))


@pytest.mark.parametrize("isa", ISAS)
class TestLinear:
    @settings(max_examples=40)
    @given(
        seed=seeds,
        rows=st.integers(1, 20),
        shape=st.tuples(st.integers(1, 70), st.integers(1, 300)),
        biased=st.booleans(),
        num_threads=st.integers(1, 4),
    )
    def test_equals_float64(self, isa, seed, rows, shape, biased, num_threads):
        rng = np.random.default_rng(seed)
        outputs, inputs = shape
        x = rng.standard_normal((rows, inputs)).astype(np.float32)
        w = rng.standard_normal((outputs, inputs)).astype(np.float32)
        bias = rng.standard_normal(outputs).astype(np.float32) if biased else None
        with machine(isa, num_threads):
            y = ops.linear(x, w, bias)
        exact = x.astype(np.float64) @ w.T.astype(np.float64)
        size = np.abs(x).astype(np.float64) @ np.abs(w).T
        if biased:
            exact, size = exact + bias, size + np.abs(bias)
        assert y.dtype == np.float32
        assert_within(np.abs(y - exact), (inputs / LANES[isa] + 6) * 2.0**-24 * size, "y")

    @pytest.mark.parametrize("inputs", [1, 17, 64, 576, 1000])
    def test_a_row_has_the_same_bits_in_any_company(self, isa, inputs):
        rng = np.random.default_rng(inputs)
        x = rng.standard_normal((33, inputs)).astype(np.float32)
        w = rng.standard_normal((150, inputs)).astype(np.float32)
        with machine(isa, 1):
            alone = np.concatenate([ops.linear(x[i : i + 1], w) for i in range(len(x))])
        for num_threads in (1, 2, 3, 4):
            with machine(isa, num_threads):
                for rows in (2, 3, 4, 5, 8, 9, 16, 17, 33):
                    assert_same_bits(ops.linear(x[:rows], w), alone[:rows], f"{rows} rows")
                assert_same_bits(ops.linear(x[::-1], w), alone[::-1].copy(), "reversed")

    def test_an_output_has_the_same_bits_in_any_company(self, isa):
        rng = np.random.default_rng(3)
        x = rng.standard_normal((3, 100)).astype(np.float32)
        w = rng.standard_normal((40, 100)).astype(np.float32)
        with machine(isa):
            whole = ops.linear(x, w)
            for start, stop in ((0, 1), (5, 12), (7, 40)):
                part = ops.linear(x, w[start:stop])
                assert_same_bits(part, np.ascontiguousarray(whole[:, start:stop]))

    def test_out_and_strides(self, isa):
        rng = np.random.default_rng(4)
        x = rng.standard_normal((4, 30)).astype(np.float32)[::2, 3:20]
        w = rng.standard_normal((9, 40)).astype(np.float32)[1:8, 5:22]
        around = np.full((4, 20), 7, np.float32)
        with machine(isa):
            expected = ops.linear(x.copy(), w.copy())
            returned = ops.linear(x, w, out=around[1:3, 2:9])
        assert np.shares_memory(returned, around)
        assert_same_bits(returned.copy(), expected)
        around[1:3, 2:9] = 7
        assert (around == 7).all()


def test_linear_of_nothing():
    w = np.zeros((3, 5), np.float32)
    assert ops.linear(np.zeros((0, 5), np.float32), w).shape == (0, 3)
    assert ops.linear(np.zeros((2, 5), np.float32), w[:0]).shape == (2, 0)
