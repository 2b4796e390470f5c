"""The options of attend against float64, any of them together, and to the bit where bits are due.

Each alone and every pair are cases of the contract: tests/parity.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcore
from attention_oracle import assert_close, attention, visible_tokens
from strategies import LAYOUTS, options, problems
from support import (
    FORMAT_DTYPES,
    assert_same_bits,
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


def attend(cache, texts, contexts, q, layout="NHD", **given):
    """(query_starts, out, lse) of the tokens after `contexts` of sequences made of `texts`."""
    sequences = [cache.sequence() for _ in texts]
    for sequence, (k, v), context in zip(sequences, texts, contexts, strict=True):
        if context:
            with cache.step([(sequence, context)]) as step:
                step.append(0, k[:context], v[:context])
    news = [len(k) - c for (k, _), c in zip(texts, contexts, strict=True)]
    with cache.step(list(zip(sequences, news, strict=True))) as step:
        parts = [(k[c:], v[c:]) for (k, v), c in zip(texts, contexts, strict=True)]
        step.append(0, *(np.concatenate(rows) for rows in zip(*parts, strict=True)))
        starts = step.query_starts
        rows = to_layout(q, layout, starts, extra=2)
        out, lse = step.attend(0, rows, layout=layout, return_lse=True, **given)
    return starts, from_layout(out, layout, starts), lse


def of_sequence(given, s, starts):
    """The options as the oracle takes them for one sequence."""
    own = dict(given)
    if own.get("mask") is not None:
        own["mask"] = own["mask"][s]
    if own.get("positions") is not None:
        own["positions"] = np.asarray(own["positions"])[starts[s] : starts[s + 1]]
    return own


def solve(problem, given):
    rng = np.random.default_rng(problem.seed)
    spec = problem.spec()
    cache = kvcore.KVCache(spec, num_blocks=problem.blocks_needed() + 2)
    poison(cache)
    layer = spec.layers[0]
    texts = [random_kv(rng, n, layer, problem.kv_dtype, problem.magnitude) for n in problem.lengths]
    q = random_q(rng, sum(problem.news), problem.num_heads, layer.head_dim, problem.q_dtype)
    given = {**given, "scale": problem.scale}
    starts, out, lse = attend(cache, texts, problem.contexts, q, problem.layout, **given)
    for s, (k, v) in enumerate(texts):
        k, v = k.astype(FORMAT_DTYPES[layer.k_format]), v.astype(FORMAT_DTYPES[layer.v_format])
        rows = slice(starts[s], starts[s + 1])
        reference = attention(q[rows], k, v, **of_sequence(given, s, starts))
        dots = takes_dots(kvcore.get_isa(), layer, problem.news[s])
        assert_close(out[rows], lse[rows], reference, cancels=True, dots=dots)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25)
@given(data=st.data(), problem=problems(max_context=900, max_work=2_000_000))
def test_pairs_equal_the_oracle(isa, data, problem):
    with machine(isa, problem.num_threads):
        solve(problem, data.draw(options(problem)))


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=1000)
@given(data=st.data(), problem=problems(max_work=10_000_000))
def test_pairs_equal_the_oracle_on_the_large_grid(isa, data, problem):
    with machine(isa, problem.num_threads):
        solve(problem, data.draw(options(problem)))


class World:
    """Three sequences, long, short and in between, and every option for them."""

    contexts, news, heads = (590, 0, 250), (70, 33, 5), 6

    def __init__(self, seed=0, **spec):
        rng = np.random.default_rng(seed)
        self.spec = {"head_dim": 40, **spec}
        self.lengths = [c + n for c, n in zip(self.contexts, self.news, strict=True)]
        layer = self.cache().spec.layers[0]
        self.texts = [random_kv(rng, n, layer) for n in self.lengths]
        self.q = random_q(rng, sum(self.news), self.heads, 40)
        shapes = list(zip(self.news, self.lengths, strict=True))
        masks = [
            rng.random(shape) < density
            for shape, density in zip(shapes, (0.5, 0.02, 0.9), strict=True)
        ]
        starts = [c for c, n in zip(self.contexts, self.news, strict=True) for _ in range(n)]
        self.options = {
            "softcap": {"softcap": 1.5},
            "alibi": {"alibi_slopes": 2.0 ** -np.arange(1, 7)},
            "window": {"window": 100},
            "non-causal": {"causal": False},
            "mask": {"mask": [masks[0], masks[1], None]},
            "positions": {"positions": np.array(starts) + rng.integers(0, 5, len(starts))},
            "sinks": {"sinks": rng.standard_normal(6).astype(np.float32) * 3},
        }

    def cache(self, **changes):
        return make_cache(80, **{**self.spec, **changes})

    def given(self, *names):
        return {key: value for name in names for key, value in self.options[name].items()}


NAMES = list(World().options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", ["fp16", "bf16"])
def test_layouts_with_masks(layout, format):
    world = World(k_format=format, v_format=format)
    given = world.given("mask", "positions", "alibi", "sinks")
    results = [
        attend(world.cache(), world.texts, world.contexts, world.q, name, **given)[1:]
        for name in ("NHD", layout)
    ]
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "names",
    [
        ("window", "softcap"),
        ("mask", "alibi"),
        ("mask", "window", "sinks"),
        ("non-causal",),
        tuple(NAMES),
    ],
    ids="+".join,
)
class TestBits:
    def test_threads_and_block_size(self, isa, names):
        world = World()
        given = world.given(*names)
        results = []
        for threads, block_size in ((1, 16), (3, 16), (4, 64), (2, 256), (1, 1024)):
            with machine(isa, threads):
                cache = world.cache(block_size=block_size)
                results.append(attend(cache, world.texts, world.contexts, world.q, **given)[1:])
        for result in results[1:]:
            for a, b in zip(result, results[0], strict=True):
                assert_same_bits(a, b)

    def test_alone_or_in_a_batch(self, isa, names):
        world = World()
        given = world.given(*names)
        with machine(isa, 2):
            starts, out, lse = attend(world.cache(), world.texts, world.contexts, world.q, **given)
            for s, (text, context) in enumerate(zip(world.texts, world.contexts, strict=True)):
                rows = slice(starts[s], starts[s + 1])
                own = of_sequence(given, s, starts)
                if own.get("mask") is not None:
                    own["mask"] = [own["mask"]]
                alone = attend(world.cache(), [text], [context], world.q[rows], **own)[1:]
                assert_same_bits(alone[0], out[rows])
                assert_same_bits(alone[1], lse[rows])

    def test_chunks(self, isa, names):
        world = World()
        given = world.given(*names)
        if "mask" not in given:  # else what a token sees would depend on its step
            given.pop("causal", None)
        k, v = world.texts[0]
        context, end = world.contexts[0], world.lengths[0]
        q, own = world.q[: world.news[0]], of_sequence(given, 0, [0, world.news[0]])
        own = {**own, "causal": True}
        if own.get("mask") is not None:  # hide what a chunk would not have yet
            own["mask"] = own["mask"] & visible_tokens(len(q), end)
        whole_mask = own.pop("mask", None)
        own.pop("positions", None)  # they end with the step: its keys then stand where stored
        with machine(isa):
            results = []
            for cuts in ([0, 70], [0, 1, 40, 70], [0, 9, 10, 69, 70]):
                parts = []
                for a, b in itertools.pairwise(cuts):
                    chunk = dict(own)
                    if whole_mask is not None:
                        chunk["mask"] = [whole_mask[a:b, : context + b]]
                    text = (k[: context + b], v[: context + b])
                    parts.append(attend(world.cache(), [text], [context + a], q[a:b], **chunk)[1:])
                results.append([np.concatenate(x) for x in zip(*parts, strict=True)])
        for result in results[1:]:
            for x, y in zip(result, results[0], strict=True):
                assert_same_bits(x, y)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    "names",
    [("window",), ("mask",), ("mask", "softcap", "alibi"), ("window", "sinks"), ("mask", "window")],
    ids="+".join,
)
def test_what_is_not_seen_takes_no_part(isa, format, names):
    """NaN in K and V wherever a row does not look: the bits of that row stay."""
    world = World(k_format=format, v_format=format)
    given = world.given(*names)
    k, v = world.texts[0]
    context, n, m = world.contexts[0], world.news[0], world.lengths[0]
    own = of_sequence(given, 0, [0, n])
    sight = {key: own.get(key) for key in ("window", "mask", "positions")}
    seen = visible_tokens(n, m, **sight)
    if own.get("mask") is not None:
        own["mask"] = [own["mask"]]
    with machine(isa):
        clean = attend(world.cache(), [(k, v)], [context], world.q[:n], **own)[1:]
        for row in (0, 31, 69):
            bad_k, bad_v = k.copy(), v.copy()
            bad_k[~seen[row]] = np.nan
            bad_v[~seen[row]] = np.nan
            bad = attend(world.cache(), [(bad_k, bad_v)], [context], world.q[:n], **own)[1:]
            for a, b in zip(bad, clean, strict=True):
                assert_same_bits(a[row], b[row], f"row {row}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "given", [{"window": 40}, {"window": 3}, {"alibi_slopes": [0.5, 0.1, 0.3, 0.2]}], ids=str
)
def test_a_tree_sees_as_its_paths_do(isa, given):
    """Nodes at their depth, with the mask of their ancestors: each as the end of its own text."""
    rng = np.random.default_rng(11)
    parents = [-1, 0, 0, 1, 1, 2, 3, 3, 6]
    n, context, heads = len(parents), 250, 4
    layer = kvcore.LayerSpec(2, 16, 16, "fp32", "fp32", 0, 0)
    k, v = random_kv(rng, context + n, layer)
    q = random_q(rng, n, heads, 16)
    paths = []
    for node, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), node])
    mask = np.zeros((n, context + n), bool)
    mask[:, :context] = True
    for node, path in enumerate(paths):
        mask[node, [context + ancestor for ancestor in path]] = True
    positions = [context + len(path) - 1 for path in paths]
    with machine(isa):
        cache = make_cache(40)
        _, out, lse = attend(
            cache, [(k, v)], [context], q, mask=[mask], positions=positions, **given
        )
    for node, path in enumerate(paths):
        rows = [*range(context), *(context + ancestor for ancestor in path)]
        reference = attention(q[node : node + 1], k[rows], v[rows], **given)
        assert_close(out[node : node + 1], lse[node : node + 1], reference, cancels=True)


@pytest.mark.parametrize("isa", ISAS)
def test_masks_as_bits(isa):
    """Bits mean what booleans do, and those beyond the last key mean nothing."""
    world = World()
    given = world.given("mask", "window", "sinks")
    bits = [
        None if mask is None else np.packbits(mask, axis=1, bitorder="little")
        for mask in given["mask"]
    ]
    assert any(n % 8 for n in world.lengths)
    for row, length in zip(bits, world.lengths, strict=True):
        if row is not None and length % 8:
            row[:, -1] |= 0xFF << length % 8 & 0xFF
    with machine(isa, 2):
        results = [
            attend(world.cache(), world.texts, world.contexts, world.q, **{**given, "mask": mask})
            for mask in (given["mask"], bits)
        ]
    for a, b in zip(*(result[1:] for result in results), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("isa", ISAS)
def test_rows_that_see_nothing(isa):
    world = World()
    masks = [np.zeros((n, m), bool) for n, m in zip(world.news, world.lengths, strict=True)]
    masks[0][3, 400] = True
    with machine(isa, 2):
        _, out, lse = attend(world.cache(), world.texts, world.contexts, world.q, mask=masks)
        assert_same_bits(out[3, 0], world.texts[0][1][400, 0])
        assert not np.delete(out, 3, axis=0).any()
        assert np.isneginf(np.delete(lse, 3, axis=0)).all()
        sinks = np.linspace(-3, 3, 6, dtype=np.float32)
        _, out, lse = attend(
            world.cache(), world.texts, world.contexts, world.q, mask=masks, sinks=sinks
        )
        assert not np.delete(out, 3, axis=0).any()
        assert (np.delete(lse, 3, axis=0) == sinks).all()


@pytest.mark.parametrize("isa", ISAS)
def test_tanh(isa):
    """The lse of a row that sees one token is its capped score: tanh itself when the cap is 1."""
    x = np.concatenate([
        np.linspace(-12, 12, 40001), np.geomspace(1e-38, 1e3, 20000), [0.0, -0.0, 1e30, -1e30],
    ]).astype(np.float32)  # fmt: skip
    q = np.zeros((len(x), 1, 8), np.float32)
    q[:, 0, 0] = x
    k = np.zeros((1, 1, 8), np.float32)
    k[0, 0, 0] = 1
    with machine(isa):
        _, lse = kvcore.ops.attention(
            q, k, k, causal=False, scale=1.0, softcap=1.0, return_lse=True
        )
    exact = np.tanh(x.astype(np.float64))
    error = np.abs(lse[:, 0] - exact)
    assert (error <= 2.0**-22 * np.abs(exact) + 2.0**-149).all()
    assert (np.abs(lse) <= 1).all()


def test_a_window_reads_what_it_sees_and_no_more():
    """The time of a decode step with a window does not grow with the context."""
    import time

    cache = make_cache(250, num_kv_heads=1, head_dim=8, block_size=4096, poisoned=False)
    rng = np.random.default_rng(0)
    times = []
    with machine(None, 1):
        for length in (600, 1_000_000):
            a = cache.sequence()
            with cache.step([(a, length)]) as step:
                step.append(0, *random_kv(rng, length, cache.spec.layers[0]))
            best = np.inf
            with cache.step([(a, 1)]) as step:
                step.append(0, *random_kv(rng, 1, cache.spec.layers[0]))
                q = random_q(rng, 1, 1, 8)
                for _ in range(30):
                    start = time.perf_counter()
                    step.attend(0, q, window=500)
                    best = min(best, time.perf_counter() - start)
            times.append(best)
    assert times[1] < 5 * times[0]  # a thousand times the context and more


class TestContiguous:
    """ops.attention has the bits of the paged operation, and reads K and V in place."""

    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("names", [(), ("softcap", "window"), tuple(NAMES)], ids="+".join)
    @pytest.mark.parametrize("layout", ["NHD", "HND"])
    def test_ragged(self, isa, names, layout):
        world = World()
        given = world.given(*names)
        kv_starts = np.concatenate([[0], np.cumsum(world.lengths)])
        k, v = (np.concatenate(x) for x in zip(*world.texts, strict=True))
        with machine(isa, 3):
            starts, *expected = attend(world.cache(), world.texts, world.contexts, world.q, **given)
            out, lse = kvcore.ops.attention(
                *(to_layout(x, layout, starts) for x in (world.q, k, v)),
                query_starts=starts,
                kv_starts=kv_starts,
                layout=layout,
                return_lse=True,
                **given,
            )
        assert_same_bits(from_layout(out, layout, starts), expected[0])
        assert_same_bits(lse, expected[1])

    @pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
    def test_padded(self, layout):
        world = World()
        given = world.given("mask", "sinks", "alibi")
        kv_starts = np.concatenate([[0], np.cumsum(world.lengths)])
        k, v = (np.concatenate(x) for x in zip(*world.texts, strict=True))
        starts, *expected = attend(world.cache(), world.texts, world.contexts, world.q, **given)
        out, lse = kvcore.ops.attention(
            to_layout(world.q, layout, starts, extra=3),
            to_layout(k, layout, kv_starts, extra=1),
            to_layout(v, layout, kv_starts, extra=1),
            query_lens=world.news,
            kv_lens=world.lengths,
            layout=layout,
            return_lse=True,
            **given,
        )
        assert_same_bits(from_layout(out, layout, starts), expected[0])
        assert_same_bits(lse, expected[1])

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_cross_attention_and_empty_sequences(self, dtype):
        rng = np.random.default_rng(1)
        layer = kvcore.LayerSpec(2, 16, 24, "fp32", "fp32", 0, 0)
        k, v = random_kv(rng, 50, layer, dtype)
        q = random_q(rng, 90, 4, 16, dtype)
        starts, kv_starts = [0, 60, 70, 70, 90], [0, 30, 30, 50, 50]
        out, lse = kvcore.ops.attention(
            q, k, v, query_starts=starts, kv_starts=kv_starts, causal=False, return_lse=True
        )
        for s in range(4):
            rows, at = slice(*starts[s : s + 2]), slice(*kv_starts[s : s + 2])
            assert_close(
                out[rows], lse[rows], attention(q[rows], k[at], v[at], causal=False), cancels=True
            )

    def test_views_are_read_in_place(self):
        rng = np.random.default_rng(2)
        fused = rng.standard_normal((300, 8, 32)).astype(np.float32)
        q, k, v = fused[:, :4], fused[:, 4:6], fused[:, 6:]
        out = kvcore.ops.attention(q, k, v)
        assert_same_bits(out, kvcore.ops.attention(q.copy(), k.copy(), v.copy()))
        assert_close(out, None, attention(q, k, v), cancels=True)

    @pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
    def test_nothing_at_all(self, shape):
        q = np.ones((shape[0], 4, 16), np.float32)
        k = np.ones((shape[1], 2, 16), np.float32)
        out, lse = kvcore.ops.attention(q, k, k, causal=False, return_lse=True)
        assert out.shape == q.shape and not out.any() and np.isneginf(lse).all()
