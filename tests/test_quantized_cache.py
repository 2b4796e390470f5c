"""Caches of quantized formats: what they hold, and attention over it, through every operation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import attention_oracle as oracle
import kvcore
from kvcore.formats import FORMATS
from quantized_reference import Side
from strategies import seeds
from support import assert_same_bits, machine

QUANTIZED = [name for name, format in FORMATS.items() if format.is_quantized]
ROW = [name for name in QUANTIZED if FORMATS[name].kind == "row"]
HEADS, QUERY_HEADS, DIM = 2, 4, 64

#: docs/numerics.md: the default path's distance, beside the length of the values.
FAST = 4e-4


def scales(rng, name):
    if name != "int8_static":
        return None
    return rng.uniform(0.01, 0.05, (1, HEADS, DIM)).astype(np.float32)


def make(rng, k_format, v_format, raw_first=4, raw_last=32, num_blocks=24, bias=None, **options):
    spec = kvcore.CacheSpec(
        1,
        HEADS,
        DIM,
        block_size=64,
        k_format=k_format,
        v_format=v_format,
        raw_first=raw_first,
        raw_last=raw_last,
        key_bias=bias,
        key_scales=scales(rng, k_format),
        value_scales=scales(rng, v_format),
        **options,
    )
    return kvcore.KVCache(spec, num_blocks=num_blocks)


class Held:
    """A sequence and what it is expected to hold."""

    def __init__(self, cache, sequence=None, sides=None):
        spec = cache.spec
        self.cache, self.sequence = cache, sequence or cache.sequence()
        keeps_raw = bool(spec.raw_groups)
        layer = spec.layers[0]
        given = [{} for _ in range(2)]
        for channels, array in zip(given, spec.layer_scales(0), strict=True):
            if array is not None:
                channels["scales"] = array
        if spec.layer_bias(0) is not None:
            given[0]["bias"] = spec.layer_bias(0)
        self.sides = sides or [
            Side(name, spec.raw_first, spec.raw_last, keeps_raw, **channels)
            for name, channels in zip((layer.k_format, layer.v_format), given, strict=True)
        ]

    def fork(self):
        return Held(self.cache, self.sequence.fork(), [side.fork() for side in self.sides])

    def truncate(self, length):
        self.sequence.truncate(length)
        for side in self.sides:
            side.truncate(length)

    def append(self, rng, count, exact=True, **options):
        k = rng.standard_normal((count, HEADS, DIM)).astype(np.float32)
        v = rng.standard_normal((count, HEADS, DIM)).astype(np.float32)
        q = rng.standard_normal((count, QUERY_HEADS, DIM)).astype(np.float32)
        with self.cache.step([(self.sequence, count)]) as step:
            step.append(0, k, v)
            out, lse = step.attend(0, q, return_lse=True, exact=exact, **options)
        for side, rows in zip(self.sides, (k, v), strict=True):
            side.append(rows)
        self.check(q, out, lse, exact, options)
        return out

    def check(self, q, out, lse, exact, options):
        length, count = len(self.sequence), len(q)
        some = {0, 1, 17, 30, 31, 32, 63, count - 1}
        for i in range(count) if count < 40 else sorted(i for i in some if i < count):
            position = length - count + i
            k, v = (side.seen(position, position + 1) for side in self.sides)
            reference = oracle.attention(q[i : i + 1], k, v, **options)
            if exact:
                oracle.assert_close(out[i : i + 1], lse[i : i + 1], reference, cancels=True)
            else:
                error = np.linalg.norm(out[i : i + 1] - reference.out, axis=-1)
                assert (error <= FAST * reference.mean_length).all(), (i, error.max())

    def check_read(self):
        length = len(self.sequence)
        for side, rows in zip(self.sides, self.sequence.read(0), strict=True):
            assert_same_bits(rows, side.seen(length, length) if length else rows, side.name)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("raw", [(4, 32), (0, 64)])  # others: tests/parity
@pytest.mark.parametrize("name", QUANTIZED)
def test_prefill_then_decode(name, raw, exact):
    rng = np.random.default_rng(0)
    v_format = name if FORMATS[name].kind == "row" else "rot4"
    held = Held(make(rng, name, v_format, *raw))
    for count in (150, 1, 1, 40, 1, 31, 1, 1, 90, 2):
        held.append(rng, count, exact)
        held.check_read()


@pytest.mark.parametrize(
    "k_format,v_format", [("bf16", "rot4"), ("rot8", "fp32"), ("chan4", "bf16")]
)
def test_one_side_may_stay_a_float(k_format, v_format):
    rng = np.random.default_rng(0)
    held = Held(make(rng, k_format, v_format))
    for count in (70, 1, 1, 33, 1):
        held.append(rng, count)
        held.check_read()


@pytest.mark.parametrize("isa", kvcore.available_isas())
@pytest.mark.parametrize("name", ["int8", "rot4", "chan4"])
def test_options_and_isas(name, isa):
    rng = np.random.default_rng(1)
    v_format = name if FORMATS[name].kind == "row" else "rot4"
    with machine(isa, 2):
        held = Held(make(rng, name, v_format))
        held.append(rng, 300, False, window=100, softcap=20.0)
        held.append(rng, 1, False, sinks=np.ones(QUERY_HEADS, np.float32))
        slopes = np.full(QUERY_HEADS, 0.1, np.float32)
        held.append(rng, 1, False, window=7, alibi_slopes=slopes)
        held.append(rng, 60, False, alibi_slopes=slopes)


@pytest.mark.parametrize("name", ["rot4", "rot3", "chan4"])
def test_a_key_bias_is_taken_off_and_put_back(name):
    rng = np.random.default_rng(2)
    bias = rng.standard_normal((1, HEADS, DIM)).astype(np.float32) * 3
    held = Held(make(rng, name, "rot4", bias=bias))
    for count in (100, 1, 40, 1):
        held.append(rng, count, exact=False)
        held.check_read()


FORMAT_PAIRS = st.one_of(
    st.tuples(st.sampled_from(ROW), st.sampled_from(ROW)),
    st.tuples(st.sampled_from(["chan4", "chan2"]), st.sampled_from(["rot4", "bf16", "int8"])),
)


@pytest.mark.parametrize("length", [31, 95, 96])
def test_reading_before_a_group_is_sealed(length):
    """With raw_last=0 the token that completes a group reads it encoded; until then it is raw."""
    held = Held(make(np.random.default_rng(3), "chan4", "rot4", 0, 0))
    held.append(np.random.default_rng(4), length)
    held.check_read()


@settings(max_examples=40)
@given(
    data=st.data(), pair=FORMAT_PAIRS, seed=seeds, raw=st.sampled_from([(4, 32), (0, 0), (1, 64)])
)
def test_sequences_through_every_operation(data, pair, seed, raw):
    rng = np.random.default_rng(seed)
    cache = make(rng, *pair, *raw)
    held = [Held(cache)]
    for _ in range(data.draw(st.integers(2, 8))):
        one = held[data.draw(st.integers(0, len(held) - 1))]
        length = len(one.sequence)
        action = data.draw(st.sampled_from(["append", "append", "truncate", "fork", "roll back"]))
        if action == "truncate" and length:
            one.truncate(data.draw(st.integers(0, length)))
        elif action == "fork" and len(held) < 3 and length:
            held.append(one.fork())
        elif action == "roll back":
            rows = np.full((33, HEADS, DIM), 7, np.float32)
            step = cache.step([(one.sequence, 33)])
            step.append(0, rows, rows)
            step.rollback()
        elif length < 250:
            one.append(rng, data.draw(st.sampled_from([1, 1, 2, 31, 32, 33, 100])))
        cache.check()
    for one in held:
        if len(one.sequence):
            one.check_read()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ["int8", "rot4", "chan4"])
def test_stored_bytes_and_exact_bits_do_not_depend_on_chunking(name, exact):
    outs, reads = [], []
    v_format = name if FORMATS[name].kind == "row" else "rot4"
    for cuts in ([200], [1] * 200, [64, 100, 36], [33, 31, 136]):
        rng = np.random.default_rng(5)
        k, v, q = (
            rng.standard_normal((200, heads, DIM)).astype(np.float32)
            for heads in (HEADS, HEADS, QUERY_HEADS)
        )
        cache = make(rng, name, v_format)
        a, done, parts = cache.sequence(), 0, []
        for count in cuts:
            new = slice(done, done + count)
            with cache.step([(a, count)]) as step:
                step.append(0, k[new], v[new])
                parts.append(step.attend(0, q[new], exact=exact))
            done += count
        outs.append(np.concatenate(parts))
        reads.append(a.read(0))
    for out, read in zip(outs, reads, strict=True):
        for actual, expected in zip(read, reads[0], strict=True):
            assert_same_bits(actual, expected)
        if exact:
            assert_same_bits(out, outs[0])
        else:
            np.testing.assert_allclose(out, outs[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ["rot8", "rot4", "chan4"])
def test_bits_do_not_depend_on_company_threads_or_sharing(name, exact):
    rng = np.random.default_rng(6)
    v_format = name if FORMATS[name].kind == "row" else "rot4"
    prefix = [rng.standard_normal((600, HEADS, DIM)).astype(np.float32) for _ in range(2)]
    tails = [rng.standard_normal((n, HEADS, DIM)).astype(np.float32) for n in (1, 40, 3, 1)]
    queries = [rng.standard_normal((len(t), QUERY_HEADS, DIM)).astype(np.float32) for t in tails]

    def run(members, threads, shared):
        cache = make(np.random.default_rng(0), name, v_format, num_blocks=100)
        with machine(None, threads):
            trunk = cache.sequence()
            with cache.step([(trunk, 600)]) as step:
                step.append(0, *prefix)
            forks = []
            for _ in members:
                if shared:
                    forks.append(trunk.fork())
                    continue
                one = cache.sequence()
                with cache.step([(one, 600)]) as step:
                    step.append(0, *prefix)
                forks.append(one)
            entries = [(f, len(tails[m])) for f, m in zip(forks, members, strict=True)]
            with cache.step(entries) as step:
                rows = np.concatenate([tails[m] for m in members])
                step.append(0, rows, rows)
                out = step.attend(0, np.concatenate([queries[m] for m in members]), exact=exact)
        cuts = np.cumsum([len(tails[m]) for m in members])[:-1]
        return dict(zip(members, np.split(out, cuts), strict=True))

    alone = {m: run([m], 1, False)[m] for m in range(4)}
    for members, threads, shared in (
        ([0, 1, 2, 3], 1, True),
        ([3, 2, 0], 3, True),
        ([2, 1], 2, False),
    ):
        for m, out in run(members, threads, shared).items():
            assert_same_bits(out, alone[m], f"{m} of {members}")


@pytest.mark.parametrize("isa", kvcore.available_isas())
def test_a_few_more_rows_than_are_read_undecoded(isa):
    """They are decoded as many rows are, in scratch that must be large enough for both."""
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((276, 1, 16)).astype(np.float32) for _ in range(2))
    q = rng.standard_normal((16, 2, 16)).astype(np.float32)
    spec = kvcore.CacheSpec(1, 1, 16, k_format="rot8", v_format="rot8", raw_first=0, raw_last=0)
    outs = []
    with machine(isa):
        for exact in (False, True):
            cache = kvcore.KVCache(spec, num_blocks=8)
            a = cache.sequence()
            with cache.step([(a, 260)]) as step:
                step.append(0, k[:260], v[:260])
            with cache.step([(a, 16)]) as step:
                step.append(0, k[260:], v[260:])
                outs.append(step.attend(0, q, exact=exact))
    assert_same_bits(*outs)


@pytest.mark.parametrize("argument", ["k", "v"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["rot4", "chan4"])
def test_numbers_that_are_not_finite(name, bad, argument):
    rng = np.random.default_rng(7)
    cache = make(rng, name, "rot4")
    held = Held(cache)
    held.append(rng, 50)
    rows = {n: rng.standard_normal((20, HEADS, DIM)).astype(np.float32) for n in "kv"}
    rows[argument][13, 1, 5] = bad
    before = held.sequence.read(0)
    step = cache.step([(held.sequence, 20)])
    with pytest.raises(kvcore.NotFinite, match=f"{argument}: .* new token 13, head 1"):
        step.append(0, **rows)
    step.rollback()
    for actual, expected in zip(held.sequence.read(0), before, strict=True):
        assert_same_bits(actual, expected)
    held.append(rng, 20)

    cache = make(rng, name, "rot4", saturate=True)
    a = cache.sequence()
    with cache.step([(a, 20)]) as step:
        step.append(0, **rows)
        out = step.attend(0, np.ones_like(rows["k"]))
    assert np.isfinite(out).all()
    assert all(np.isfinite(x).all() for x in a.read(0))
    clean = {n: np.nan_to_num(x, nan=0.0, posinf=65504.0) for n, x in rows.items()}
    b = cache.sequence()
    with cache.step([(b, 20)]) as step:
        step.append(0, **clean)
    for actual, expected in zip(a.read(0), b.read(0), strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("name", ["rot4", "chan4", "int8"])
def test_prefix_hits_read_what_a_miss_reads(name):
    rng = np.random.default_rng(8)
    v_format = name if FORMATS[name].kind == "row" else "rot4"
    cache = make(rng, name, v_format, num_blocks=64)
    ids = np.arange(200, dtype=np.int32)
    k, v, q = (
        rng.standard_normal((200, heads, DIM)).astype(np.float32)
        for heads in (HEADS, HEADS, QUERY_HEADS)
    )
    a = cache.sequence(ids)
    with cache.step([(a, ids)]) as step:
        step.append(0, k, v)
        expected = step.attend(0, q, exact=True)
    a.free()
    b = cache.sequence(ids)
    assert len(b) == 192
    with cache.step([(b, ids[192:])]) as step:
        step.append(0, k[192:], v[192:])
        assert_same_bits(step.attend(0, q[192:], exact=True), expected[192:])
    cache.check()
