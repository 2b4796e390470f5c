"""Prefix reuse: who finds what, and that a hit is the same tokens of the same tenant."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcore
from support import append_all, assert_balanced, assert_same_bits, grow, make_cache


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def publish(cache, tokens, rng, salt=None):
    """A sequence that holds `tokens`, found or computed; its contents."""
    sequence = cache.sequence(tokens, salt=salt)
    if len(sequence) < len(tokens):
        grow(cache, [(sequence, tokens[len(sequence) :])], rng)
    return sequence


def adopted(cache, tokens, salt=None):
    return len(cache.sequence(tokens, salt=salt))


class TestLength:
    @pytest.mark.parametrize("held", [0, 1, 15, 16, 17, 32, 33, 47, 48])
    @pytest.mark.parametrize("asked", [0, 1, 16, 17, 32, 33, 48, 49, 100])
    def test_whole_blocks_and_never_the_last_token(self, rng, held, asked):
        cache = make_cache(8)
        if held:
            publish(cache, list(range(held)), rng)
        assert adopted(cache, list(range(asked))) == min(held, max(asked - 1, 0)) // 16 * 16

    def test_in_spans_of_the_largest_block_when_groups_differ(self, rng):
        cache = make_cache(
            [16, 4],
            num_layers=2,
            groups=[kvcore.GroupSpec(16), kvcore.GroupSpec(64)],
            layer_groups=[0, 1],
        )
        publish(cache, list(range(140)), rng)
        assert adopted(cache, list(range(140))) == 128
        assert adopted(cache, list(range(128))) == 64
        sequence = cache.sequence(list(range(140)))
        assert [len(sequence.blocks(g)) for g in (0, 1)] == [8, 2]

    def test_a_block_is_found_once_it_is_full_and_committed(self, rng):
        cache = make_cache(8)
        a = cache.sequence()
        grow(cache, [(a, [*range(15)])], rng)
        assert adopted(cache, [*range(20)]) == 0
        step = cache.step([(a, [15, 16])])
        append_all(step, rng)
        assert adopted(cache, [*range(20)]) == 0
        step.rollback()
        assert adopted(cache, [*range(20)]) == 0
        grow(cache, [(a, [15, 16])], rng)
        assert adopted(cache, [*range(20)]) == 16

    def test_tokens_given_by_number_are_never_found(self, rng):
        cache = make_cache(12)
        a = cache.sequence()
        grow(cache, [(a, [*range(16)])], rng)
        grow(cache, [(a, 16)], rng)
        grow(cache, [(a, [*range(32, 64)])], rng)  # known ids after unknown ones
        assert adopted(cache, [*range(64)]) == 16
        a.truncate(16)
        grow(cache, [(a, [*range(16, 32)])], rng)  # the unknown ones are gone
        assert adopted(cache, [*range(64)]) == 32

    def test_forks_publish_what_they_add(self, rng):
        cache = make_cache(16)
        a = publish(cache, [*range(40)], rng)
        b = a.fork(20)
        grow(cache, [(b, [*range(100, 130)])], rng)
        assert adopted(cache, [*range(20), *range(100, 130)]) == 48
        assert adopted(cache, [*range(41)]) == 32

    def test_a_text_that_was_truncated_and_went_on_differently(self, rng):
        cache = make_cache(16)
        a = publish(cache, [*range(48)], rng)
        a.truncate(20)
        grow(cache, [(a, [*range(200, 230)])], rng)
        assert adopted(cache, [*range(20), *range(200, 230)]) == 48
        assert adopted(cache, [*range(49)]) == 48  # the old blocks are still cached


class TestComparison:
    @settings(max_examples=150)
    @given(data=st.data())
    def test_hits_are_exactly_the_equal_prefixes(self, data):
        """Texts over two ids, so that they often agree; room for all, so nothing is evicted."""
        rng = np.random.default_rng(0)
        cache = make_cache(120)
        published = {}
        length, salts = st.integers(1, 70), st.sampled_from([None, "a", "b"])
        for _ in range(data.draw(st.integers(1, 8))):
            tokens, salt = data.draw(texts(length, published)), data.draw(salts)
            best = max(
                (common_blocks(tokens, other) for other, s in published if s == salt), default=0
            )
            sequence = cache.sequence(tokens, salt=salt)
            assert len(sequence) == min(best, (len(tokens) - 1) // 16) * 16
            for other, held in published.items():
                if (
                    other[1] == salt
                    and len(sequence)
                    and other[0][: len(sequence)] == tuple(tokens[: len(sequence)])
                ):
                    k, v = sequence.read(0)
                    assert_same_bits(k, held[0][: len(k)])
                    assert_same_bits(v, held[1][: len(v)])
                    break
            else:
                assert not len(sequence)
            if len(sequence) < len(tokens):
                grow(cache, [(sequence, tokens[len(sequence) :])], rng)
            published.setdefault((tuple(tokens), salt), sequence.read(0))
        assert_balanced(cache)

    def test_equal_hashes_of_unequal_tokens(self, rng):
        """Two texts of 16 tokens whose hashes in core/prefix_index.c are the same 64 bits."""
        a, b = colliding_spans(16)
        assert a != b and span_hash(a) == span_hash(b)
        cache = make_cache(8)
        publish(cache, [*a, 0], rng)
        assert adopted(cache, [*a, 0]) == 16
        assert adopted(cache, [*b, 0]) == 0
        publish(cache, [*b, 0], rng)
        for tokens in (a, b):
            assert adopted(cache, [*tokens, 0]) == 16
        assert cache.sequence([*a, 0]).blocks()[0] != cache.sequence([*b, 0]).blocks()[0]

    def test_more_texts_than_buckets(self, rng):
        """300 prefixes share some hundreds of buckets; each finds its own blocks."""
        cache = make_cache(300)
        prompts = rng.integers(0, 50_000, (300, 16))
        blocks = []
        for tokens in prompts:
            sequence = cache.sequence()
            grow(cache, [(sequence, tokens)], rng)
            blocks.append(sequence.blocks()[0])
        for tokens, block in zip(prompts, blocks, strict=True):
            assert cache.sequence([*tokens, 0]).blocks().tolist() == [block]

    def test_the_same_tokens_after_another_beginning_are_another_text(self, rng):
        cache = make_cache(16)
        tail = [*range(100, 116)]
        publish(cache, [*range(16), *tail, 0], rng)
        assert adopted(cache, [*tail, 0]) == 0
        assert adopted(cache, [*range(50, 66), *tail, 0]) == 0
        assert adopted(cache, [*range(16), *tail, 0]) == 32


def common_blocks(a, b):
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    return same // 16


@st.composite
def texts(draw, length, published):
    tokens = []
    if published:
        old = draw(st.sampled_from(sorted(t for t, _ in published)))
        tokens = list(old[: draw(st.integers(0, len(old)))])
    return tokens + draw(st.lists(st.integers(0, 1), min_size=1, max_size=draw(length)))


MASK = 2**64 - 1


def span_hash(tokens, salt=0):
    """hash_span of core/prefix_index.c, from the root of a salt."""
    value = mix(np.array([salt], np.uint64))
    for token in tokens:
        value = mix(value + np.uint64((0x9E3779B97F4A7C15 + token) & MASK))
    return int(value[0])


def mix(x):
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def colliding_spans(length):
    """Two lists of token ids with one hash.

    The last step of the hash is a bijection of (hash before + token). So it is enough to find two
    beginnings whose hashes lie closer than the largest token id: a birthday problem.
    """
    rng = np.random.default_rng(1)
    heads = rng.integers(0, 2**31, (400_000, length - 1))
    value = np.full(len(heads), mix(np.zeros(1, np.uint64))[0])
    with np.errstate(over="ignore"):
        for column in heads.T:
            value = mix(value + (np.uint64(0x9E3779B97F4A7C15) + column.astype(np.uint64)))
    order = np.argsort(value)
    gaps = np.diff(value[order])
    nearest = int(np.argmin(gaps))
    gap = int(gaps[nearest])
    assert gap < 2**31 - 1
    low, high = heads[order[nearest]].tolist(), heads[order[nearest + 1]].tolist()
    return [*low, gap], [*high, 0]


class TestTenants:
    def test_a_salt_keeps_tenants_apart(self, rng):
        cache = make_cache(16)
        tokens = [*range(33)]
        publish(cache, tokens, rng, salt="a")
        assert adopted(cache, tokens, "a") == 32
        for other in (None, "b", b"a", "", "A", b""):
            assert adopted(cache, tokens, other) == 0

    def test_an_empty_sequence_with_a_salt_publishes_under_it(self, rng):
        cache = make_cache(16)
        a = cache.sequence(salt="a")
        grow(cache, [(a, [*range(20)])], rng)
        assert adopted(cache, [*range(20)]) == 0
        assert adopted(cache, [*range(20)], "a") == 16

    def test_a_fork_and_a_truncated_sequence_keep_their_salt(self, rng):
        cache = make_cache(16)
        a = publish(cache, [*range(20)], rng, salt="a")
        b = a.fork(4)
        a.truncate(0)
        grow(cache, [(a, [*range(50, 70)]), (b, [*range(80, 110)])], rng)
        for tokens in ([*range(50, 70)], [*range(4), *range(80, 110)]):
            assert adopted(cache, tokens) == 0
            assert adopted(cache, tokens, "a") >= 16

    @pytest.mark.parametrize("salt", [1, 1.5, ["a"], ("a",)])
    def test_a_salt_is_text_or_bytes(self, salt):
        with pytest.raises(kvcore.InvalidType, match="salt"):
            make_cache(2).sequence([1], salt=salt)


class TestEviction:
    def test_cached_blocks_are_given_up_for_new_ones_oldest_first(self, rng):
        cache = make_cache(4)
        for start in (0, 100, 200):
            publish(cache, [*range(start, start + 16)], rng).free()
        assert cache.stats().cached == 3
        a = cache.sequence()
        grow(cache, [(a, 32)], rng)  # one free block, and one cached
        assert cache.stats().evictions == 1
        found = [adopted(cache, [*range(s, s + 17)]) for s in (0, 100, 200)]
        assert found == [0, 16, 16]

    def test_a_hit_makes_a_prefix_young_again(self, rng):
        cache = make_cache(3)
        for start in (0, 100, 200):
            publish(cache, [*range(start, start + 16)], rng).free()
        cache.sequence([*range(17)]).free()
        grow(cache, [(cache.sequence(), 16)], rng)
        assert adopted(cache, [*range(17)]) == 16

    def test_the_end_of_a_text_goes_before_its_beginning(self, rng):
        cache = make_cache(4)
        publish(cache, [*range(64)], rng).free()
        grow(cache, [(a := cache.sequence(), 16)], rng)
        assert len(a) == 16
        assert adopted(cache, [*range(65)]) == 48

    def test_blocks_in_use_are_never_evicted(self, rng):
        cache = make_cache(4)
        a = publish(cache, [*range(48)], rng)
        expected = [x.copy() for x in a.read(0)]
        b = cache.sequence()
        with pytest.raises(kvcore.OutOfBlocks) as error:
            cache.step([(b, 17)])
        assert (error.value.needed, error.value.available) == (2, 1)
        grow(cache, [(b, 16)], rng)
        for held, before in zip(a.read(0), expected, strict=True):
            assert_same_bits(held, before)

    def test_what_was_evicted_can_be_published_again(self, rng):
        cache = make_cache(4)
        tokens = [*range(48)]
        for _ in range(3):
            publish(cache, tokens, rng).free()
            assert adopted(cache, [*tokens, 0]) == 48
            grow(cache, [(a := cache.sequence(), 64)], rng)
            assert adopted(cache, [*tokens, 0]) == 0
            a.free()
        assert_balanced(cache)

    def test_of_a_twin_that_the_text_was_published_by(self, rng):
        """b's beginning was published by a, and is evicted with it; b goes on from the start."""
        cache = make_cache(4)
        tokens = [*range(48)]
        a, b = cache.sequence(), cache.sequence()
        for sequence in (a, b):
            grow(cache, [(sequence, tokens[:16])], rng)
        a.free()
        grow(cache, [(filler := cache.sequence(), 48)], rng)
        assert cache.stats().evictions == 1
        filler.free()
        grow(cache, [(b, tokens[16:])], rng)
        assert adopted(cache, [*tokens[16:], 0]) == 0
        assert cache.sequence([*tokens, 0]).blocks().tolist() == b.blocks().tolist()

    def test_drop_prefixes(self, rng):
        cache = make_cache(8)
        a = publish(cache, [*range(32)], rng)
        publish(cache, [*range(100, 132)], rng).free()
        cache.drop_prefixes()
        stats = cache.stats()
        assert (stats.in_use, stats.cached, stats.free) == (2, 0, 6)
        assert adopted(cache, [*range(100, 133)]) == 0
        assert adopted(cache, [*range(33)]) == 32  # a still holds these
        assert len(a) == 32


def test_counts(rng):
    cache = make_cache(16)
    cache.sequence()
    assert cache.stats().prefix_queries == 0
    publish(cache, [*range(40)], rng)
    hit = cache.sequence([*range(40)])
    cache.sequence([9, 9, 9])
    stats = cache.stats()
    assert (stats.prefix_queries, stats.prefix_hits, stats.prefix_hit_tokens) == (3, 1, 32)
    assert len(hit) == 32


def test_an_empty_salted_sequence_is_no_query():
    cache = make_cache(2)
    cache.sequence(salt="a")
    assert cache.stats().prefix_queries == 0
