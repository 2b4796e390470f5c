"""A sequence's output bits depend on its own q, k and v, and on nothing around them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import kvcore
from strategies import DTYPES, FORMATS, block_sizes, cuts, head_dims, seeds
from support import assert_same_bits, machine, make_cache, random_kv, random_q

ISAS = kvcore.available_isas()

formats = st.sampled_from(FORMATS)


class Text:
    """One text's q, k and v, of which any part can be asked for."""

    def __init__(self, seed, length, num_heads=2, ratio=2, head_dim=32, dtype="float32"):
        rng = np.random.default_rng(seed)
        shape = kvcore.LayerSpec(num_heads, head_dim, head_dim, "fp32", "fp32", 0, 0)
        self.k, self.v = random_kv(rng, length, shape, dtype)
        self.q = random_q(rng, length, num_heads * ratio, head_dim, dtype)

    def __len__(self):
        return len(self.k)


def run(cache, entries, *, exact=False):
    """One step that gives each (sequence, text) its next n tokens; [(out, lse)] for each."""
    spans = [(text, len(sequence), len(sequence) + n) for sequence, text, n in entries]
    with cache.step([(sequence, n) for sequence, _, n in entries]) as step:
        step.append(
            0,
            np.concatenate([text.k[a:b] for text, a, b in spans]),
            np.concatenate([text.v[a:b] for text, a, b in spans]),
        )
        q = np.concatenate([text.q[a:b] for text, a, b in spans])
        out, lse = step.attend(0, q, return_lse=True, exact=exact)
        starts = step.query_starts
    return [
        (out[starts[s] : starts[s + 1]], lse[starts[s] : starts[s + 1]])
        for s in range(len(entries))
    ]


def run_in_chunks(cache, text, chunks, **options):
    """(out, lse) of a whole text that a new sequence is given chunk by chunk."""
    sequence = cache.sequence()
    parts = [run(cache, [(sequence, text, n)], **options)[0] for n in chunks]
    return [np.concatenate(x) for x in zip(*parts, strict=True)]


def cache_for(text_or_lengths, *, block_size=16, format="fp32", **spec):
    lengths = [len(text_or_lengths)] if isinstance(text_or_lengths, Text) else text_or_lengths
    num_blocks = sum(-(-n // block_size) + 1 for n in lengths)
    return make_cache(
        num_blocks,
        **{
            "head_dim": 32,
            "block_size": block_size,
            "k_format": format,
            "v_format": format,
            **spec,
        },
    )


def assert_same(actual, expected, what=""):
    for a, b, name in zip(actual, expected, ("out", "lse"), strict=True):
        assert_same_bits(a, b, f"{what} {name}")


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25)
@given(data=st.data(), format=formats, seed=seeds)
def test_alone_or_in_any_batch(isa, data, format, seed):
    lengths = data.draw(st.lists(st.integers(1, 600), min_size=2, max_size=6))
    contexts = [data.draw(st.integers(0, n - 1)) for n in lengths]
    texts = [Text(seed + i, n) for i, n in enumerate(lengths)]
    with machine(isa, data.draw(st.integers(1, 4))):
        alone = []
        for text, context in zip(texts, contexts, strict=True):
            cache = cache_for(text, format=format)
            sequence = cache.sequence()
            if context:
                run(cache, [(sequence, text, context)])
            alone += run(cache, [(sequence, text, len(text) - context)])
        order = data.draw(st.permutations(range(len(texts))))
        cache = cache_for(lengths, format=format)
        sequences = [cache.sequence() for _ in texts]
        started = [i for i in order if contexts[i]]
        if started:
            run(cache, [(sequences[i], texts[i], contexts[i]) for i in started])
        together = run(cache, [(sequences[i], texts[i], lengths[i] - contexts[i]) for i in order])
    for i, result in zip(order, together, strict=True):
        assert_same(result, alone[i], f"text {i}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", ["one long", "decode", "ragged", "one head"])
def test_on_one_to_four_threads(isa, format, shape):
    lengths, news, heads = {
        "one long": ([1500], [300], 2),
        "decode": ([900] * 8, [1] * 8, 2),
        "ragged": ([1, 17, 700, 1300, 256], [1, 5, 100, 1, 256], 3),
        "one head": ([4000], [1], 1),
    }[shape]
    texts = [Text(i, n, num_heads=heads, ratio=3) for i, n in enumerate(lengths)]
    results = []
    for num_threads in (1, 2, 3, 4):
        with machine(isa, num_threads):
            cache = cache_for(lengths, format=format, block_size=64, num_kv_heads=heads)
            sequences = [cache.sequence() for _ in texts]
            old = [(s, t, len(t) - n) for s, t, n in zip(sequences, texts, news, strict=True)]
            run(cache, [entry for entry in old if entry[2]])
            results.append(run(cache, list(zip(sequences, texts, news, strict=True))))
    for num_threads, result in enumerate(results, start=1):
        for s, row in enumerate(result):
            assert_same(row, results[0][s], f"{num_threads} threads, text {s}")


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40)
@given(data=st.data(), format=formats, length=st.integers(2, 700), seed=seeds)
def test_whole_or_in_chunks(isa, data, format, length, seed):
    text = Text(seed, length, dtype=data.draw(st.sampled_from(DTYPES)))
    chunks = data.draw(cuts(length))
    exact = format == "bf16"
    with machine(isa, data.draw(st.integers(1, 4))):
        whole = run_in_chunks(cache_for(text, format=format), text, [length], exact=exact)
        parts = run_in_chunks(cache_for(text, format=format), text, chunks, exact=exact)
    assert_same(parts, whole, f"chunks {chunks}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
def test_whole_or_token_by_token(isa, format):
    text = Text(3, 530)
    with machine(isa):
        whole = run_in_chunks(cache_for(text, format=format), text, [530], exact=True)
        single = run_in_chunks(cache_for(text, format=format), text, [1] * 530, exact=True)
    assert_same(single, whole)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25)
@given(
    sizes=st.tuples(block_sizes, block_sizes),
    format=formats,
    length=st.integers(1, 1200),
    head_dim=head_dims,
    seed=seeds,
)
def test_in_blocks_of_any_size(isa, sizes, format, length, head_dim, seed):
    assume(sizes[0] != sizes[1])
    text = Text(seed, length, head_dim=head_dim)
    chunks = [length - length // 3, length // 3] if length > 2 else [length]
    with machine(isa):
        results = [
            run_in_chunks(
                cache_for(text, block_size=size, format=format, head_dim=head_dim),
                text,
                chunks,
                exact=True,
            )
            for size in sizes
        ]
    assert_same(*results, f"blocks of {sizes}")


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25)
@given(data=st.data(), format=formats, length=st.integers(2, 400), seed=seeds)
def test_shared_blocks_or_own(isa, data, format, length, seed):
    """A fork goes on with the bits of a sequence that computed everything itself."""
    at = data.draw(st.integers(1, length - 1))
    text, other = Text(seed, length), Text(seed + 1, length)
    with machine(isa, data.draw(st.integers(1, 4))):
        own = cache_for(text, format=format)
        sequence = own.sequence()
        run(own, [(sequence, text, at)])
        expected = run(own, [(sequence, text, length - at)])[0]

        cache = cache_for([length] * 3, format=format)
        parent = cache.sequence()
        run(cache, [(parent, text, data.draw(st.integers(at, length)))])
        child, sibling = parent.fork(at), parent.fork(at)
        entries = [(child, text, length - at), (sibling, other, length - at)]
        if data.draw(st.booleans()):
            parent.free()
        elif len(parent) < length:
            entries.append((parent, other, length - len(parent)))
        entries = data.draw(st.permutations(entries))
        results = run(cache, entries)
    child_row = [entry[0] for entry in entries].index(child)
    assert_same(results[child_row], expected, f"fork at {at}")


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25)
@given(data=st.data(), format=formats, length=st.integers(33, 400), seed=seeds)
def test_prefix_hit_or_miss(isa, data, format, length, seed):
    text = Text(seed, length)
    ids = np.random.default_rng(seed).integers(0, 1000, length)
    with machine(isa, data.draw(st.integers(1, 4))):
        cache = cache_for([length] * 2, format=format)
        miss = cache.sequence(ids)
        assert len(miss) == 0
        expected = run_with_ids(cache, miss, text, ids, data.draw(cuts(length)))
        hit = cache.sequence(ids)
        adopted = len(hit)
        assert adopted == (length - 1) // 16 * 16
        if data.draw(st.booleans()):
            miss.free()
        result = run_with_ids(cache, hit, text, ids, data.draw(cuts(length - adopted)))
    assert_same(result, [x[adopted:] for x in expected], f"{adopted} tokens adopted")


def run_with_ids(cache, sequence, text, ids, chunks):
    """(out, lse) of the rest of a text, given with its token ids."""
    parts = []
    for n in chunks:
        span = slice(len(sequence), len(sequence) + n)
        with cache.step([(sequence, ids[span])]) as step:
            step.append(0, text.k[span], text.v[span])
            parts.append(step.attend(0, text.q[span], return_lse=True, exact=True))
    return [np.concatenate(x) for x in zip(*parts, strict=True)]


@pytest.mark.parametrize("isa", ISAS)
def test_after_truncate_the_same_again(isa):
    text, other = Text(5, 300), Text(6, 300)
    with machine(isa):
        cache = cache_for([300, 300])
        a = cache.sequence()
        expected = run(cache, [(a, text, 300)])[0]
        a.truncate(123)
        run(cache, [(a, other, 50)])
        a.truncate(123)
        assert_same(run(cache, [(a, text, 177)])[0], [x[123:] for x in expected])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (2, 8), (1, 16)])
def test_a_query_head_alone_or_in_its_group(isa, shape):
    """What a query head gives does not depend on the heads that share its KV head."""
    num_kv_heads, ratio = shape
    text = Text(8, 290, num_heads=num_kv_heads, ratio=ratio)
    with machine(isa):
        cache = cache_for([290] * (ratio + 1), num_kv_heads=num_kv_heads)
        whole = run_in_chunks(cache, text, [280, 10])
        for member in range(ratio):
            single = Text(8, 290, num_heads=num_kv_heads, ratio=ratio)
            single.q = np.ascontiguousarray(text.q[:, member::ratio])
            result = run_in_chunks(cache, single, [280, 10])
            assert_same(result, [x[:, member::ratio] for x in whole], f"query head {member}")
