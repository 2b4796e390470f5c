"""Attention against float64, with NaN wherever no sequence has a token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

import kvcore
from attention_oracle import assert_close, attention
from strategies import problems
from support import (
    DTYPES,
    FORMAT_DTYPES,
    assert_same_bits,
    bits,
    from_layout,
    machine,
    make_cache,
    poison,
    random_kv,
    random_q,
    takes_dots,
    to_layout,
)

ISAS = kvcore.available_isas()


def solve(problem):
    """Runs a problem through a cache; asserts every row and what the cache holds."""
    rng = np.random.default_rng(problem.seed)
    spec = problem.spec()
    cache = kvcore.KVCache(spec, num_blocks=problem.blocks_needed() + 2)
    poison(cache)
    layer = spec.layers[0]
    sequences = [cache.sequence() for _ in problem.contexts]
    texts = [
        random_kv(rng, length, layer, problem.kv_dtype, problem.magnitude)
        for length in problem.lengths
    ]
    fill(cache, sequences, texts, problem.contexts)
    q = random_q(rng, sum(problem.news), problem.num_heads, layer.head_dim, problem.q_dtype)
    with cache.step(list(zip(sequences, problem.news, strict=True))) as step:
        append_rest(step, texts, problem.contexts, problem.layout)
        out, lse = step.attend(
            0,
            to_layout(q, problem.layout, step.query_starts, extra=1),
            layout=problem.layout,
            scale=problem.scale,
            return_lse=True,
        )
        starts = step.query_starts
    out = from_layout(out, problem.layout, starts)
    assert out.dtype == q.dtype and lse.dtype == np.float32
    for s, (sequence, (k, v)) in enumerate(zip(sequences, texts, strict=True)):
        k, v = k.astype(FORMAT_DTYPES[layer.k_format]), v.astype(FORMAT_DTYPES[layer.v_format])
        rows = slice(starts[s], starts[s + 1])
        reference = attention(q[rows], k, v, problem.scale)
        dots = takes_dots(kvcore.get_isa(), layer, problem.news[s])
        assert_close(out[rows], lse[rows], reference, dots=dots)
        for held, expected in zip(sequence.read(0), (k, v), strict=True):
            assert_same_bits(held, expected.astype(np.float32), "read")


def fill(cache, sequences, texts, contexts):
    """Stores what each sequence holds before the step, where that is anything."""
    entries = [(s, c) for s, c in zip(sequences, contexts, strict=True) if c]
    if entries:
        parts = [(k[:c], v[:c]) for (k, v), c in zip(texts, contexts, strict=True) if c]
        with cache.step(entries) as step:
            step.append(0, *(np.concatenate(rows) for rows in zip(*parts, strict=True)))


def append_rest(step, texts, contexts, layout):
    parts = [(k[c:], v[c:]) for (k, v), c in zip(texts, contexts, strict=True)]
    rows = [np.concatenate(rows) for rows in zip(*parts, strict=True)]
    step.append(0, *(to_layout(x, layout, step.query_starts) for x in rows), layout=layout)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=30)
@given(problem=problems(max_work=10_000_000))
def test_equals_the_oracle(isa, problem):
    with machine(isa, problem.num_threads):
        solve(problem)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=1500)
@given(problem=problems())
def test_equals_the_oracle_on_the_large_grid(isa, problem):
    with machine(isa, problem.num_threads):
        solve(problem)


# The places where the arithmetic changes its shape: block and split ends, one row, four rows.
EDGES = [0, 1, 15, 16, 17, 31, 255, 256, 257, 511, 512, 513, 767, 768, 2999, 3000]


def attend_once(cache, texts, contexts, q, **options):
    """(step's query_starts, what attend gives) for sequences made of `texts`."""
    sequences = [cache.sequence() for _ in texts]
    fill(cache, sequences, texts, contexts)
    news = [len(k) - c for (k, _), c in zip(texts, contexts, strict=True)]
    with cache.step(list(zip(sequences, news, strict=True))) as step:
        append_rest(step, texts, contexts, "NHD")
        return step.query_starts, step.attend(0, q, **options)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [64, 200])
def test_context_lengths_at_the_edges(isa, format, head_dim):
    rng = np.random.default_rng(head_dim)
    cache = make_cache(
        sum(-(-(c + 5) // 64) for c in EDGES),
        head_dim=head_dim,
        num_kv_heads=1,
        block_size=64,
        k_format=format,
        v_format=format,
    )
    news = [1 + i % 5 for i in range(len(EDGES))]
    texts = [random_kv(rng, c + n, cache.spec.layers[0]) for c, n in zip(EDGES, news, strict=True)]
    q = random_q(rng, sum(news), 3, head_dim)
    with machine(isa):
        starts, (out, lse) = attend_once(cache, texts, EDGES, q, return_lse=True)
    for s, (k, v) in enumerate(texts):
        rows = slice(starts[s], starts[s + 1])
        k, v = (x.astype(FORMAT_DTYPES[format]) for x in (k, v))
        assert_close(out[rows], lse[rows], attention(q[rows], k, v))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 30.0, 1e3, 1e8])
def test_scores_of_any_magnitude(isa, magnitude):
    """Up to where one token takes all the weight, and lse is thousands away from 0."""
    rng = np.random.default_rng(7)
    cache = make_cache(64, head_dim=64)
    texts = [random_kv(rng, 700, cache.spec.layers[0])]
    texts = [(k * np.float32(magnitude), v) for k, v in texts]
    q = random_q(rng, 50, 4, 64)
    with machine(isa):
        _, (out, lse) = attend_once(cache, texts, [650], q, return_lse=True)
    assert_close(out, lse, attention(q, *texts[0]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale", [None, 1.0, 0.125, -0.5, 0.0])
def test_scale(isa, scale):
    rng = np.random.default_rng(8)
    cache = make_cache(8, head_dim=24)
    texts = [random_kv(rng, 100, cache.spec.layers[0])]
    q = random_q(rng, 30, 4, 24)
    with machine(isa):
        _, (out, lse) = attend_once(cache, texts, [70], q, return_lse=True, scale=scale)
    assert_close(out, lse, attention(q, *texts[0], scale))
    if scale == 0:
        seen = np.arange(71, 101)
        np.testing.assert_allclose(lse, np.repeat(np.log(seen)[:, None], 4, 1), rtol=1e-6)


def test_a_first_token_sees_itself_alone():
    rng = np.random.default_rng(9)
    cache = make_cache(1)
    texts = [random_kv(rng, 1, cache.spec.layers[0])]
    q = random_q(rng, 1, 2, 16)
    _, (out, lse) = attend_once(cache, texts, [0], q, return_lse=True)
    assert_same_bits(out, texts[0][1], "softmax of one score is 1")
    np.testing.assert_allclose(lse[0], (q * texts[0][0]).sum(-1)[0] / 4, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("q_dtype", DTYPES)
@pytest.mark.parametrize("exact", [False, True])
def test_return_lse_and_exact_do_not_change_out(q_dtype, exact):
    rng = np.random.default_rng(10)
    spec = {"head_dim": 32, "k_format": "fp16", "v_format": "fp16"}
    cache = make_cache(40, **spec)
    texts = [random_kv(rng, n, cache.spec.layers[0]) for n in (40, 300)]
    q = random_q(rng, 12, 6, 32, q_dtype)
    plain = attend_once(cache, texts, [30, 298], q)[1]
    cache = make_cache(40, **spec)
    out, lse = attend_once(cache, texts, [30, 298], q, return_lse=True, exact=exact)[1]
    assert_same_bits(out, plain)
    assert lse.shape == (12, 6)


class TestWhatIsNotSeen:
    """NaN and infinity reach exactly the rows that see them."""

    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("poisonous", [np.nan, np.inf])
    @pytest.mark.parametrize("where", ["k", "v"])
    def test_a_later_token_stays_unseen(self, isa, poisonous, where):
        rng = np.random.default_rng(11)
        cache = make_cache(40)
        k, v = random_kv(rng, 300, cache.spec.layers[0])
        q = random_q(rng, 60, 4, 16)
        bad = 280
        (k if where == "k" else v)[bad, 1] = poisonous
        with machine(isa):
            _, (out, lse) = attend_once(cache, [(k, v)], [240], q, return_lse=True)
        clean = attention(q[: bad - 240], k[:bad], v[:bad])
        assert_close(out[: bad - 240], lse[: bad - 240], clean)
        # Head 0 of K and V serves query heads 0 and 1; head 1, which has the poison, 2 and 3.
        assert np.isfinite(out[:, :2]).all() and np.isfinite(lse[:, :2]).all()
        if where == "v":
            assert not np.isfinite(out[bad - 240 :, 2:]).any()
            assert np.isfinite(lse).all()
        elif np.isnan(poisonous):
            assert np.isnan(out[bad - 240 :, 2:]).all()

    @pytest.mark.parametrize("isa", ISAS)
    def test_a_neighbour_in_the_batch_stays_unseen(self, isa):
        rng = np.random.default_rng(12)
        cache = make_cache(60)
        texts = [random_kv(rng, n, cache.spec.layers[0]) for n in (290, 33, 100)]
        texts[1][0][:] = np.nan
        texts[1][1][:] = np.nan
        q = random_q(rng, 9, 4, 16)
        with machine(isa, 3):
            starts, out = attend_once(cache, texts, [287, 30, 97], q)
        for s, expected in ((0, True), (1, False), (2, True)):
            assert np.isfinite(out[starts[s] : starts[s + 1]]).all() == expected

    @pytest.mark.parametrize("isa", ISAS)
    def test_a_query_that_is_nan_spoils_its_own_row(self, isa):
        rng = np.random.default_rng(13)
        cache = make_cache(60)
        texts = [random_kv(rng, 290, cache.spec.layers[0])]
        q = random_q(rng, 20, 4, 16)
        with machine(isa):
            clean = attend_once(cache, texts, [270], q)[1]
            q[7, 2] = np.nan
            out = attend_once(cache, texts, [270], q)[1]
        assert np.isnan(out[7, 2]).all()
        out[7, 2] = clean[7, 2]
        assert_same_bits(out, clean)

    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("format", ["fp32", "fp16", "bf16"])
    def test_what_truncate_and_free_left_behind(self, isa, format):
        """Blocks go from hand to hand, and what was in them is NaN each time."""
        rng = np.random.default_rng(14)
        cache = make_cache(30, k_format=format, v_format=format, head_dim=40)
        layer = cache.spec.layers[0]
        a, b, c = (cache.sequence() for _ in range(3))
        texts = [random_kv(rng, 200, layer), random_kv(rng, 90, layer), random_kv(rng, 60, layer)]
        fill(cache, [a, b, c], texts, [150, 60, 50])
        a.truncate(37)
        b.free()
        d = c.fork(20)
        c.free()
        poison(cache, [a, d])
        texts = [[x[:37] for x in texts[0]], [x[:20] for x in texts[2]]]
        new = random_kv(rng, 70 + 3, layer)
        q = random_q(rng, 73, 2, 40)
        with machine(isa), cache.step([(a, 70), (d, 3)]) as step:
            step.append(0, *new)
            out, lse = step.attend(0, q, return_lse=True, exact=True)
        for rows, old in ((slice(0, 70), texts[0]), (slice(70, 73), texts[1])):
            k, v = (
                np.concatenate([x, y[rows]]).astype(FORMAT_DTYPES[format])
                for x, y in zip(old, new, strict=True)
            )
            assert_close(out[rows], lse[rows], attention(q[rows], k, v))

    def test_poison_is_where_no_sequence_is(self):
        """What the tests above rely on."""
        rng = np.random.default_rng(15)
        cache = make_cache(4)
        a = cache.sequence()
        fill(cache, [a], [random_kv(rng, 20, cache.spec.layers[0])], [20])
        before = [bits(x).copy() for x in a.read(0)]
        poison(cache, [a])
        for array in cache.blocks(0):
            assert np.isfinite(array[:, 0, :, 0]).sum() == 20
        assert all(np.array_equal(bits(x), y) for x, y in zip(a.read(0), before, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("magnitude", "head_dim"), [(3.0, 64), (3.0, 248), (20.0, 248)])
def test_scores_that_cancel(isa, magnitude, head_dim):
    """q . k far smaller than the sum of abs(q_d * k_d): float32 loses the difference."""
    rng = np.random.default_rng(0)
    cache = make_cache(100, head_dim=head_dim)
    texts = [random_kv(rng, 30, cache.spec.layers[0], magnitude=magnitude) for _ in range(40)]
    q = random_q(rng, 1200, 2, head_dim, magnitude=magnitude)
    with machine(isa):
        starts, (out, lse) = attend_once(cache, texts, [0] * 40, q, return_lse=True)
    for s, (k, v) in enumerate(texts):
        rows = slice(starts[s], starts[s + 1])
        assert_close(out[rows], lse[rows], attention(q[rows], k, v), cancels=True)


def test_layers_that_read_another_layers_cache():
    rng = np.random.default_rng(16)
    cache = make_cache(8, num_layers=3, kv_sources={2: 0})
    a = cache.sequence()
    rows = [random_kv(rng, 20, cache.spec.layers[0]) for _ in range(2)]
    q = random_q(rng, 20, 2, 16)
    with cache.step([(a, 20)]) as step:
        step.append(0, *rows[0])
        step.append(1, *rows[1])
        outs = [step.attend(layer, q) for layer in range(3)]
    for out, source in zip(outs, (0, 1, 0), strict=True):
        assert_close(out, None, attention(q, *rows[source]))


def test_groups_have_their_own_blocks():
    rng = np.random.default_rng(17)
    groups = [kvcore.GroupSpec(16), kvcore.GroupSpec(64), kvcore.GroupSpec(32)]
    cache = make_cache(
        [12, 3, 6],
        num_layers=3,
        head_dim=[16, 32, 8],
        num_kv_heads=[1, 2, 4],
        groups=groups,
        layer_groups=[0, 1, 2],
    )
    a, b = cache.sequence(), cache.sequence()
    held = {layer: ([], []) for layer in range(3)}
    for entries in ([(a, 50), (b, 3)], [(b, 40), (a, 1)], [(a, 60), (b, 1)]):
        with cache.step(entries) as step:
            for layer, spec in enumerate(cache.spec.layers):
                k, v = random_kv(rng, step.num_tokens, spec)
                q = random_q(rng, step.num_tokens, 4, spec.head_dim)
                step.append(layer, k, v)
                out, lse = step.attend(layer, q, return_lse=True)
                for s, (sequence, _) in enumerate(entries):
                    rows = slice(step.query_starts[s], step.query_starts[s + 1])
                    text = held[layer][0 if sequence is a else 1]
                    text.append((k[rows], v[rows]))
                    stored = (np.concatenate(x) for x in zip(*text, strict=True))
                    assert_close(out[rows], lse[rows], attention(q[rows], *stored))
