"""Groups that keep only the last tokens: what is released, what stays readable, what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcore
from c_api import CCache, StatusError
from strategies import cuts, seeds
from support import (
    append_all,
    assert_balanced,
    assert_same_bits,
    grow,
    machine,
    make_cache,
    poison,
    random_kv,
    random_q,
    snapshot,
)

ISAS = kvcore.available_isas()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def windowed(retention=40, block_size=16, **spec):
    return make_cache(
        spec.pop("num_blocks", 16), groups=[kvcore.GroupSpec(block_size, retention)], **spec
    )


def full_and_windowed(num_blocks, retention=40, **spec):
    """Layer 0 keeps everything, layer 1 the last `retention` tokens."""
    groups = [kvcore.GroupSpec(16), kvcore.GroupSpec(16, retention)]
    return make_cache(num_blocks, num_layers=2, groups=groups, layer_groups=[0, 1], **spec)


def in_use(cache):
    return [group.in_use for group in cache.stats().groups]


class TestRelease:
    @pytest.mark.parametrize("retention", [1, 2, 15, 16, 17, 40, 64, 1000])
    def test_blocks_wholly_below_what_the_next_token_reads(self, rng, retention):
        cache = windowed(retention)
        a = cache.sequence()
        for length in range(1, 130):
            grow(cache, [(a, 1)], rng)
            # The token at `length` reads from length - retention + 1 on.
            read = [c for c in range(16) if c * 16 + 15 > length - retention and c * 16 < length]
            held = [c for c, block in enumerate(a.blocks()) if block >= 0]
            assert held == read
            assert len(a.blocks()) == -(-length // 16) and in_use(cache) == [len(held)]
            assert a.first_kept() == (held[0] if held else length // 16) * 16
            assert cache.stats().released == a.first_kept() // 16
        assert_balanced(cache)

    def test_at_commit_and_not_before(self, rng):
        cache = windowed(16)
        a = cache.sequence()
        step = cache.step([(a, 100)])
        assert (step.plan().block_tables >= 0).all() and in_use(cache) == [7]
        append_all(step, rng)
        assert in_use(cache) == [7]
        step.commit()
        assert in_use(cache) == [2] and cache.stats().released == 5
        with cache.step([(a, 1)]) as step:
            assert step.plan().block_tables.tolist() == [[-1] * 5 + a.blocks()[5:].tolist()]
            append_all(step, rng)

    def test_rollback_restores_everything(self, rng):
        cache = full_and_windowed(16)
        a = cache.sequence()
        grow(cache, [(a, 70)], rng)
        b = a.fork()
        before = snapshot(cache, [a, b])
        step = cache.step([(a, 60), (b, 5)])
        append_all(step, rng)
        step.rollback()
        assert snapshot(cache, [a, b]) == before

    def test_a_forks_blocks_stay_until_both_let_them_go(self, rng):
        cache = windowed(20)
        a = cache.sequence()
        grow(cache, [(a, 40)], rng)
        b = a.fork()
        kept = b.blocks().tolist()
        grow(cache, [(a, 60)], rng)
        assert b.blocks().tolist() == kept and a.first_kept() == 80
        assert in_use(cache) == [2 + 2]
        b.free()
        assert in_use(cache) == [2]
        assert_balanced(cache)

    def test_released_blocks_are_used_again(self, rng):
        cache = windowed(20, num_blocks=4)
        a = cache.sequence()
        for _ in range(50):
            grow(cache, [(a, 16)], rng)
        assert len(a) == 800 and in_use(cache) == [2]

    def test_too_few_blocks_for_one_step(self, rng):
        cache = windowed(16, num_blocks=4)
        a = cache.sequence()
        with pytest.raises(kvcore.OutOfBlocks):
            cache.step([(a, 65)])
        grow(cache, [(a, 64)], rng)
        grow(cache, [(a, 48)], rng)


class TestReading:
    @pytest.mark.parametrize("isa", ISAS)
    @settings(max_examples=30)
    @given(data=st.data())
    def test_the_bits_of_a_group_that_keeps_everything(self, isa, data):
        """Released blocks, and whatever else nobody owns, hold NaN before each step."""
        rng = np.random.default_rng(data.draw(seeds))
        window = data.draw(st.one_of(st.integers(1, 40), st.integers(1, 400)))
        retention = window + data.draw(st.integers(0, 50))
        size = data.draw(st.sampled_from([16, 32, 128]))
        caches = [windowed(r, size, num_blocks=64 * 16 // size) for r in (retention, None)]
        pairs = [[cache.sequence()] for cache in caches]
        if data.draw(st.booleans()):
            for cache, sequences in zip(caches, pairs, strict=True):
                grow(cache, [(sequences[0], 50)], np.random.default_rng(1))
                sequences.append(sequences[0].fork())
        counts = data.draw(cuts(data.draw(st.integers(1, 300)), most=5))
        options = data.draw(
            st.fixed_dictionaries({}, optional={"softcap": st.just(2.0), "causal": st.just(False)})
        )
        for count in counts:
            new = count * len(pairs[0])
            k, v = random_kv(rng, new, caches[0].spec.layers[0])
            q = random_q(rng, new, 4, 16)
            results = []
            for cache, sequences in zip(caches, pairs, strict=True):
                poison(cache, sequences)
                with machine(isa), cache.step([(s, count) for s in sequences]) as step:
                    step.append(0, k, v)
                    results.append(step.attend(0, q, window=window, return_lse=True, **options))
            for actual, expected in zip(*results, strict=True):
                assert not np.isnan(actual).any()
                assert_same_bits(actual, expected)
        assert in_use(caches[0]) <= in_use(caches[1])

    def test_read_gives_what_is_kept(self, rng):
        cache = full_and_windowed(16)
        a = cache.sequence()
        texts = [random_kv(rng, 100, layer) for layer in cache.spec.layers]
        with cache.step([(a, 100)]) as step:
            for layer, (k, v) in enumerate(texts):
                step.append(layer, k, v)
        assert (a.first_kept(), a.first_kept(0), a.first_kept(1)) == (0, 0, 48)
        for layer, (k, v) in enumerate(texts):
            for start in (None, 48, 70, 100):
                first = a.first_kept(layer) if start is None else start
                for held, rows in zip(a.read(layer, start), (k, v), strict=True):
                    assert_same_bits(held, rows[first:])
        assert_same_bits(a.read(0, 3)[1], texts[0][1][3:])

    def test_read_before_what_is_kept(self, rng):
        cache = windowed()
        a = cache.sequence()
        grow(cache, [(a, 100)], rng)
        with pytest.raises(kvcore.TokensReleased, match=r"^start: expected 48 to 100, .* got 47"):
            a.read(0, 47)
        for start in (-1, 101):
            with pytest.raises(kvcore.InvalidArgument, match=r"^start: expected 0 to 100"):
                a.read(0, start)
        assert_balanced(cache)


class TestWindows:
    @pytest.mark.parametrize("window", [None, 41, 1000])
    def test_wider_than_the_retention(self, rng, window):
        """Even while nothing was released yet, so that a program fails at once or never."""
        cache = full_and_windowed(16)
        with cache.step([(cache.sequence(), 3)]) as step:
            append_all(step, rng)
            q = random_q(rng, 3, 2, 16)
            step.attend(0, q, window=window)
            step.attend(1, q, window=40)
            with pytest.raises(
                kvcore.InvalidArgument,
                match=rf"^window: expected at most 40, the retention of layer 1's .* got {window}",
            ):
                step.attend(1, q, window=window)

    def test_positions_that_reach_behind(self, rng):
        cache = windowed(16)
        a = cache.sequence()
        grow(cache, [(a, 100)], rng)
        with cache.step([(a, 2)]) as step:
            append_all(step, rng)
            q, out = random_q(rng, 2, 2, 16), np.full((2, 2, 16), 7, "f4")
            assert a.first_kept() == 80
            with pytest.raises(kvcore.TokensReleased):
                step.attend(0, q, window=16, positions=[94, 101], out=out)
            assert (out == 7).all()
            step.attend(0, q, window=16, positions=[95, 101], out=out)
            assert np.isfinite(out).all()

    def test_a_mask_may_show_what_is_kept(self, rng):
        cache = windowed(16)
        a = cache.sequence()
        grow(cache, [(a, 100)], rng)
        with cache.step([(a, 1)]) as step:
            append_all(step, rng)
            q = random_q(rng, 1, 2, 16)
            everything = np.ones((1, 101), bool)
            masked = step.attend(0, q, window=16, mask=[everything])
            assert_same_bits(masked, step.attend(0, q, window=16))


class TestCutting:
    @settings(max_examples=60)
    @given(data=st.data())
    def test_where_the_next_token_would_read_what_was_released(self, data):
        retention = data.draw(st.integers(1, 60))
        num_tokens = data.draw(st.integers(1, 150))
        length = data.draw(st.integers(0, num_tokens))
        cache = windowed(retention, num_blocks=20, poisoned=False)
        a = cache.sequence()
        grow(cache, [(a, num_tokens)], np.random.default_rng(0))
        kept = a.first_kept()
        blocks, stats, rows = a.blocks().tolist(), cache.stats(), a.read(0)
        read = range(max(0, length - retention + 1), length)
        partial = length % 16 > 0  # the next token would go into a released block
        if any(token < kept for token in read) or (kept > length and partial):
            for call in (a.fork, a.truncate):
                with pytest.raises(
                    kvcore.TokensReleased,
                    match=rf"^length: expected 0 or {kept + retention - 1} to {num_tokens}, "
                    rf"got {length}: group 0, .* keeps the tokens from {kept} on$",
                ):
                    call(length)
            assert len(a) == num_tokens
            assert a.blocks().tolist() == blocks and cache.stats() == stats
            assert_balanced(cache)
            return
        b = a.fork(length)
        for held, expected in zip(b.read(0), rows, strict=True):
            assert_same_bits(held, expected[b.first_kept() - kept : length - kept])
        assert a.blocks().tolist() == blocks
        a.truncate(length)
        assert a.blocks().tolist() == b.blocks().tolist()
        assert_balanced(cache)

    @pytest.mark.parametrize("slack", [1, 5, 16, 40])
    def test_slack_lets_tokens_be_taken_back(self, rng, slack):
        """Speculative decoding: of slack + 1 new tokens one is right, or some, or all."""
        window = 20
        caches = [
            make_cache(16, groups=[kvcore.GroupSpec(16, *keeps)]) for keeps in [(window, slack), ()]
        ]
        sequences = [cache.sequence() for cache in caches]
        for n in range(100):
            k, v = random_kv(rng, 1 + slack, caches[0].spec.layers[0])
            q = random_q(rng, 1 + slack, 2, 16)
            outs = []
            for cache, sequence in zip(caches, sequences, strict=True):
                poison(cache, [sequence])
                with cache.step([(sequence, 1 + slack)]) as step:
                    step.append(0, k, v)
                    outs.append(step.attend(0, q, window=window))
                sequence.truncate(len(sequence) - (0, slack, n % (slack + 1))[n % 3])
                assert sequence.first_kept() == cache.spec.groups[0].first_kept(step.seq_lens[0])
            assert_same_bits(*outs)
            if len(sequences[1]) > 200:
                break
        a = sequences[0]
        assert len(a) - window + 1 - slack - 16 <= a.first_kept() <= len(a) - window + 1
        assert_balanced(caches[0])

    def test_slack_stays_with_forks(self, rng):
        cache = make_cache(16, groups=[kvcore.GroupSpec(16, 20, 30)])
        a = cache.sequence()
        grow(cache, [(a, 100)], rng)
        assert a.first_kept() == 48
        b = a.fork(80)
        assert b.blocks().tolist() == a.blocks()[:5].tolist()
        b.truncate(70)
        b.truncate(67)
        with pytest.raises(
            kvcore.TokensReleased, match=r"expected 0 or 67 to 67, got 66: .* of 30"
        ):
            b.truncate(66)
        grow(cache, [(b, 1)], rng)
        assert b.first_kept() == 48
        grow(cache, [(b, 50)], rng)
        assert b.first_kept() == 64
        assert_balanced(cache)

    def test_to_nothing_and_on(self, rng):
        cache = windowed(20)
        a = cache.sequence()
        grow(cache, [(a, 100)], rng)
        a.truncate(0)
        assert in_use(cache) == [0] and len(a.blocks()) == 0
        grow(cache, [(a, 30)], rng)
        assert a.blocks()[0] >= 0


def publish(cache, tokens, rng):
    sequence = cache.sequence(tokens)
    if len(sequence) < len(tokens):
        grow(cache, [(sequence, tokens[len(sequence) :])], rng)
    return sequence


def adopted(cache, tokens):
    sequence = cache.sequence([*tokens, 0])
    try:
        return len(sequence)
    finally:
        sequence.free()


class TestPrefixes:
    def test_a_hit_adopts_what_its_next_token_reads(self, rng):
        cache = full_and_windowed(16)
        a = publish(cache, [*range(128)], rng)
        b = cache.sequence([*range(128), 0])
        assert len(b) == 128 and b.first_kept(1) == 80
        assert b.blocks(0).tolist() == a.blocks(0).tolist()
        assert b.blocks(1).tolist() == a.blocks(1).tolist() == [-1] * 5 + a.blocks(1)[5:].tolist()
        for layer in range(2):
            for held, rows in zip(b.read(layer), a.read(layer), strict=True):
                assert_same_bits(held, rows)

    def test_released_blocks_are_cached_and_found(self, rng):
        """A shorter text ends where the longer one's blocks were released long ago."""
        cache = full_and_windowed(16)
        a = publish(cache, [*range(128)], rng)
        stats = cache.stats().groups[1]
        assert (stats.in_use, stats.cached, stats.released) == (3, 5, 5)
        b = cache.sequence([*range(64), 999])
        assert len(b) == 64 and b.blocks(1)[0] < 0 <= b.blocks(1)[1]
        grow(cache, [(b, 1), (a, 1)], rng)
        assert_balanced(cache)

    def test_evicting_a_released_block_leaves_the_prefix(self, rng):
        """Group 1 has room for one text only: group 0's blocks of the other are still found."""
        cache = full_and_windowed([32, 8])
        first, second = [*range(100, 228)], [*range(300, 428)]
        publish(cache, first, rng).free()
        assert adopted(cache, first) == 128
        b = publish(cache, second, rng)
        assert cache.stats().groups[1].evictions > 0 == cache.stats().groups[0].evictions
        # The eight blocks of group 1 went to the second text: none is left of the first.
        assert adopted(cache, first) == 0
        assert cache.stats().groups[0].cached == 8
        b.free()
        # Computed again, the first text's blocks of group 1 join those of group 0 that are there.
        c = publish(cache, first, rng)
        c.free()
        assert adopted(cache, first) == 128
        assert_balanced(cache)

    def test_the_longest_prefix_that_can_be_used(self, rng):
        """Blocks that a hit of this length needs may be gone, and those of another be there."""
        cache = full_and_windowed([32, 10], retention=20)
        tokens = [*range(160)]
        publish(cache, tokens[:64], rng).free()
        grow(cache, [(b := cache.sequence(), 160)], rng)  # takes all of group 1
        assert cache.stats().groups[1].evictions == 4
        b.free()
        a = publish(cache, tokens, rng)
        assert adopted(cache, tokens) == 160
        grow(cache, [(b := cache.sequence(), 64)], rng)
        # Columns 0 to 3 of group 1 were given up, the first ones released.
        hits = [adopted(cache, tokens[:n]) for n in range(16, 161, 16)]
        assert hits == [0] * 5 + [96, 112, 128, 144, 160]
        # A text that leaves this one at token 130 starts from what is there before.
        assert adopted(cache, [*tokens[:130], *range(500, 520)]) == 128
        assert adopted(cache, [*tokens[:90], *range(500, 520)]) == 0
        assert len(a) == 160

    @settings(max_examples=60)
    @given(data=st.data())
    def test_hits_hold_what_was_computed(self, data):
        """Whatever was evicted, released and filled in: a hit reads as the text it stands for."""
        retention = data.draw(st.integers(1, 70))
        cache = full_and_windowed(
            [24, data.draw(st.integers(8, 16))], retention, poisoned=False, num_kv_heads=1
        )
        texts = [[d] * d + [*range(100 * d, 100 * d + 120 - d)] for d in range(1, 4)]
        texts += [[*texts[0][:50], *texts[1][50:]]]
        hits = 0
        for _ in range(data.draw(st.integers(4, 14))):
            tokens = data.draw(st.sampled_from(texts))[: data.draw(st.integers(17, 120))]
            a = cache.sequence(tokens)
            hits += len(a) > 0
            self.assert_marks(a, tokens)
            while len(a) < len(tokens):
                new = tokens[len(a) :][: data.draw(st.integers(1, 120))]
                with cache.step([(a, new)]) as step:
                    for layer in range(2):
                        rows = self.marks(tokens[: len(a) + len(new)])[len(a) :]
                        step.append(layer, rows, -rows)
                self.assert_marks(a, tokens[: len(a)])
            a.free()
            assert_balanced(cache)
        assert cache.stats().prefix_hits == hits

    def marks(self, tokens):
        """Rows [n, 1, 16] that depend on all tokens up to their own."""
        sums = np.cumsum([(t + 1) * (i + 3) ** 2 for i, t in enumerate(tokens)])
        return (sums % 1_048_573).astype("f4")[:, None, None] + np.zeros((1, 1, 16), "f4")

    def assert_marks(self, sequence, tokens):
        for layer in range(2):
            k, v = sequence.read(layer)
            rows = self.marks(tokens[: len(sequence)])[sequence.first_kept(layer) :]
            assert_same_bits(k, rows)
            assert_same_bits(v, -rows)

    def test_windows_alone(self, rng):
        """The groups that retain most stand in for the one that keeps everything."""
        cache = make_cache(
            [8, 8],
            num_layers=2,
            groups=[kvcore.GroupSpec(16, 20), kvcore.GroupSpec(16, 40)],
            layer_groups=[0, 1],
        )
        publish(cache, [*range(64)], rng).free()
        assert adopted(cache, [*range(64)]) == 64
        grow(cache, [(a := cache.sequence(), 80)], rng)
        assert len(a) == 80 and adopted(cache, [*range(64)]) < 64
        assert_balanced(cache)

    def test_drop_prefixes(self, rng):
        cache = full_and_windowed(16)
        a = publish(cache, [*range(128)], rng)
        cache.drop_prefixes()
        stats = cache.stats()
        assert (stats.in_use, stats.cached) == (8 + 3, 0)
        assert adopted(cache, [*range(128)]) == 128  # a holds all that this needs
        assert adopted(cache, [*range(64)]) == 0
        assert len(a) == 128


class TestSizes:
    @settings(max_examples=30)
    @given(data=st.data())
    def test_memory_for_sequences_of_a_length(self, data):
        """They all fit: each written in one step, then all of them growing token by token."""
        sizes = [data.draw(st.sampled_from([16, 32])) for _ in range(2)]
        keeps = [data.draw(st.one_of(st.none(), st.integers(1, 90))) for _ in sizes]
        groups = [kvcore.GroupSpec(*pair) for pair in zip(sizes, keeps, strict=True)]
        spec = kvcore.CacheSpec(2, 1, 8, groups=groups, layer_groups=[0, 1])
        length = data.draw(st.integers(8, 150))
        span, num_sequences = max(sizes), data.draw(st.integers(1, 5))
        whole = -(-length // span) * span  # a length that all groups fill
        memory = spec.nbytes(
            [num_sequences * g.blocks_for(whole) + whole // g.block_size for g in groups]
        )
        cache = kvcore.KVCache(spec, memory=memory, sequence_length=whole)
        assert cache.stats().bytes <= memory
        sequences = [cache.sequence() for _ in range(num_sequences)]
        rng = np.random.default_rng(0)
        written = whole - min(whole - 1, data.draw(st.integers(0, 20)))
        for sequence in sequences:
            grow(cache, [(sequence, written)], rng)
        for _ in range(written, whole):
            grow(cache, [(sequence, 1) for sequence in sequences], rng)

    def test_what_a_length_saves(self):
        """Five layers of six with a window of 1024, texts of 32,768 tokens."""
        spec = kvcore.CacheSpec(
            6,
            1,
            64,
            groups=[kvcore.GroupSpec(64), kvcore.GroupSpec(64, 1024)],
            layer_groups=[0, 1, 1, 1, 1, 1],
        )
        memory = spec.nbytes(8 * 512)  # eight texts, if every layer kept them whole
        assert spec.blocks_in(memory) == (8 * 512, 8 * 512)
        full, windowed = spec.blocks_in(memory, 32_768)
        # 17 blocks of a window for each 512 that are kept, and room to write a text at once.
        assert windowed == -(-full * 17 // 512) + 512 - 17 and full >= 37 * 512
        assert memory - 6 * spec.block_nbytes(0) < spec.nbytes((full, windowed)) <= memory

    def test_a_length_changes_nothing_without_a_retention(self):
        spec = kvcore.CacheSpec(3, 2, 64)
        for memory in (10**6, 10**8):
            assert spec.blocks_in(memory, 1000) == spec.blocks_in(memory)

    @settings(max_examples=60)
    @given(data=st.data())
    def test_blocks_for_is_what_a_sequence_takes_at_most(self, data):
        size = data.draw(st.sampled_from([16, 32]))
        retention = data.draw(st.one_of(st.none(), st.integers(1, 100)))
        slack = data.draw(st.integers(0, 40)) if retention else 0
        group = kvcore.GroupSpec(size, retention, slack)
        num_new, num_tokens = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 300))
        most = group.blocks_for(num_tokens, num_new)
        cache = make_cache(most, groups=[group], poisoned=False, num_kv_heads=1)
        a, rng = cache.sequence(), np.random.default_rng(0)
        while len(a) < num_tokens:  # OutOfBlocks is what must not come
            grow(cache, [(a, data.draw(st.integers(1, min(num_new, num_tokens - len(a)))))], rng)

    @pytest.mark.parametrize("retention", [1, 2, 17, 33, 50])
    @pytest.mark.parametrize("num_new", [1, 5, 16, 40])
    def test_blocks_for_is_reached(self, rng, retention, num_new):
        cache = windowed(retention, num_blocks=32)
        taken = 0
        for start in range(num_new):
            a = cache.sequence()
            grow(cache, [(a, 60 + start)], rng)
            while len(a) + num_new <= 200:
                step = cache.step([(a, num_new)])
                taken = max(taken, *in_use(cache))
                append_all(step, rng)
                step.commit()
            a.free()
        assert taken == kvcore.GroupSpec(16, retention).blocks_for(200, num_new)

    @pytest.mark.parametrize("retention", [0, -1, 2**31, 1.5, "8", True])
    def test_what_is_refused(self, retention):
        with pytest.raises((kvcore.InvalidArgument, kvcore.InvalidType), match=r"^retention: "):
            kvcore.GroupSpec(64, retention)

    @pytest.mark.parametrize("arguments", [(20, -1), (20, 1.5), (20, None)])
    def test_slack_that_is_refused(self, arguments):
        with pytest.raises((kvcore.InvalidArgument, kvcore.InvalidType), match=r"^slack: "):
            kvcore.GroupSpec(64, *arguments)


class TestCDoor:
    def cache(self, retention, slack=0):
        group = SimpleNamespace(block_size=16, retention=retention, slack=slack)
        layer = SimpleNamespace(group=0, kv_source=0)
        return CCache(SimpleNamespace(groups=[group], num_layers=1, layers=[layer]), [8])

    @pytest.mark.parametrize("numbers", [(-1, 0), (-(2**31), 0), (20, -1)])
    def test_numbers_below_zero(self, numbers):
        with pytest.raises(StatusError, match="ERR_VALUE"):
            self.cache(*numbers)

    def test_check_finds_a_column_that_came_back(self):
        """A C program that writes where it must not: into the row of blocks of a plan."""
        cache = self.cache(20)
        a = cache.create()
        for count in (80, 1):
            step = cache.begin([(a, count)])
            row = cache.plan(step, 0).block_rows[0]
            cache.mark_appended(step, 0)
            cache.commit(step)
            cache.check()
        assert row[0] == -1
        row[0] = 0
        with pytest.raises(StatusError, match="CORRUPT"):
            cache.check()
        row[0] = -1
        cache.check()
        cache.close()

    def test_reading_a_released_block(self, rng):
        """kv_read and kv_attend, told nothing of windows, refuse what is -1."""
        blocks = np.zeros((8, 1, 16, 8), "f4")
        table = np.array([[-1, 2, 3]], np.int32)
        q = random_q(rng, 1, 1, 8)
        ops = kvcore.ops.paged_attention
        with pytest.raises(kvcore.InvalidArgument, match=r"^block_tables: expected blocks 0 to 7"):
            ops(q, blocks, blocks, table, [40], [0, 1])
        for window in (25, 100):
            with pytest.raises(kvcore.InvalidArgument, match=r"^block_tables: expected -1 only"):
                ops(q, blocks, blocks, table, [40], [0, 1], window=window)
        assert not ops(q, blocks, blocks, table, [40], [0, 1], window=24).any()
        mask = np.arange(40)[None] >= 16
        assert not ops(q, blocks, blocks, table, [40], [0, 1], mask=[mask]).any()
        with pytest.raises(kvcore.InvalidArgument, match=r"^block_tables: expected -1 only"):
            ops(q, blocks, blocks, table, [40], [0, 1], mask=[mask | (np.arange(40) == 9)])
        with pytest.raises(kvcore.InvalidArgument, match=r"^block_tables: .* got -2 to 3"):
            ops(q, blocks, blocks, np.where(table < 0, -2, table), [40], [0, 1], window=24)
