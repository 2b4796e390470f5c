"""What a step's plan says, and that the same calls always give the same plans."""

from __future__ import annotations

import numpy as np
import pytest

import kvcore
from support import append_all, grow, make_cache
from traces import CPlayer, PythonPlayer, make_trace

TRACED = {
    "one group": (kvcore.CacheSpec(1, 1, 8, block_size=16, k_format="fp16"), (24,)),
    "three groups": (
        kvcore.CacheSpec(
            4,
            1,
            8,
            groups=[kvcore.GroupSpec(16), kvcore.GroupSpec(64), kvcore.GroupSpec(32)],
            layer_groups=[0, 1, 2, 0],
            kv_sources={3: 0},
        ),
        (40, 9, 17),
    ),
    "windows beside full attention": (
        kvcore.CacheSpec(
            3,
            1,
            8,
            groups=[kvcore.GroupSpec(32), kvcore.GroupSpec(16, 20), kvcore.GroupSpec(64, 70, 9)],
            layer_groups=[0, 1, 2],
        ),
        (20, 24, 8),
    ),
    "windows alone": (
        kvcore.CacheSpec(
            2,
            1,
            8,
            groups=[kvcore.GroupSpec(16, 50, 30), kvcore.GroupSpec(32, 1)],
            layer_groups=[1, 0],
        ),
        (24, 16),
    ),
    "raw rows of one group": (
        kvcore.CacheSpec(1, 1, 64, k_format="chan4", v_format="rot4"),
        (16,),
        (20,),
    ),
    "raw rows beside and in windows": (
        kvcore.CacheSpec(
            3,
            1,
            64,
            groups=[kvcore.GroupSpec(16), kvcore.GroupSpec(32, 70, 9), kvcore.GroupSpec(16, 20)],
            layer_groups=[0, 1, 2],
            layer_formats={0: ("rot4", "int8"), 1: ("chan2", "bf16")},
            raw_first=0,
        ),
        (40, 20, 24),
        (24, 24),
    ),
}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def assert_same_answers(actual, expected):
    assert len(actual) == len(expected)
    for n, (answer, other) in enumerate(zip(actual, expected, strict=True)):
        assert answer == other, f"call {n}"


class TestDeterminism:
    @pytest.mark.parametrize("name", TRACED)
    @pytest.mark.parametrize("seed", range(3))
    def test_a_trace_gives_the_same_plans_again(self, name, seed):
        trace = make_trace(seed, 500)
        answers = PythonPlayer(*TRACED[name]).play(trace)
        assert_same_answers(PythonPlayer(*TRACED[name]).play(trace), answers)

    @pytest.mark.parametrize("name", TRACED)
    @pytest.mark.parametrize("seed", range(3))
    def test_a_c_program_gets_the_same_plans(self, name, seed):
        trace = make_trace(seed, 500)
        player = CPlayer(*TRACED[name])
        assert_same_answers(player.play(trace), PythonPlayer(*TRACED[name]).play(trace))
        player.cache.close()

    @pytest.mark.parametrize("name", TRACED)
    def test_a_c_program_runs_a_long_trace(self, name):
        spec = TRACED[name][0]
        player = CPlayer(*TRACED[name])
        answers = player.play(make_trace(99, 20_000))
        assert all(balance[0] == 0 for balance in player.balance())
        kinds = {operation for operation, _ in answers}
        assert kinds >= {"fork", "truncate", "rollback", "commit", "drop_prefixes"}
        # The trace reaches what it is for: shortages, hits, evictions and copies.
        begun = [answer for operation, answer in answers if operation == "begin"]
        shortages = [answer for answer in begun if isinstance(answer[0], int)]
        assert 0.05 < len(shortages) / len(begun) < 0.8
        assert any(a for operation, a in answers if operation == "create_cached")
        allocations, evictions, copies, released, reencoded = np.sum(player.balance(), axis=0)[3:]
        assert allocations > evictions > 100 and copies > 100
        windows = any(pool.retention for pool in spec.pools)
        assert released > 1000 if windows else released == 0
        assert reencoded > 100 if spec.raw_groups else reencoded == 0
        refusals = [a for operation, a in answers if operation in ("fork", "truncate") and a[0]]
        assert len(refusals) > 20 if windows else not refusals
        player.cache.close()


TRIPLES = ("copies", "new_blocks", "restores")


def unpack(plan, groups):
    """The parts of a plan's buffer as kvcore.h lays them out."""
    count, rest = plan.num_sequences, plan.buffer
    parts = [rest[: count + 1], rest[count + 1 : 2 * count + 1]]
    rest = rest[2 * count + 1 :]
    for group in groups:
        sizes = [plan.num_tokens, *(getattr(group, name).size for name in TRIPLES)]
        edges = np.cumsum(sizes)
        parts.append(np.split(rest[: edges[-1]], edges[:-1]))
        rest = rest[edges[-1] :]
    assert not rest.size
    return parts


class TestContents:
    def test_one_prefill_and_one_decode(self, rng):
        cache = make_cache(8)
        a, b = cache.sequence(), cache.sequence()
        grow(cache, [(a, 20)], rng)
        with cache.step([(b, 33), (a, 1)]) as step:
            plan = step.plan()
            assert (plan.block_size, plan.num_sequences, plan.num_tokens) == (16, 2, 34)
            assert plan.max_new == 33
            assert plan.query_starts.tolist() == step.query_starts.tolist() == [0, 33, 34]
            assert plan.seq_lens.tolist() == step.seq_lens.tolist() == [33, 21]
            assert step.num_tokens == 34 and step.sequences == (b, a)
            assert plan.block_tables.tolist() == [[2, 3, 4], [0, 1, -1]]
            assert plan.slots.tolist() == [*range(32, 65), 16 + 4]
            assert plan.new_blocks.tolist() == [[0, 0, 2], [0, 1, 3], [0, 2, 4]]
            assert plan.copies.shape == (0, 3) and plan.num_copies == 0
            for array in (plan.slots, plan.block_tables, plan.query_starts, plan.buffer):
                assert array.dtype == np.int32
            append_all(step, rng)
        assert b.blocks().tolist() == [2, 3, 4] and a.blocks().tolist() == [0, 1]

    def test_a_new_cache_hands_out_blocks_in_order(self, rng):
        cache = make_cache(8)
        a = cache.sequence()
        grow(cache, [(a, 8 * 16)], rng)
        assert a.blocks().tolist() == list(range(8))

    @pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32])
    def test_a_fork_copies_its_last_block_when_it_is_partial(self, rng, length):
        cache = make_cache(8)
        a = cache.sequence()
        grow(cache, [(a, 40)], rng)
        b = a.fork(length)
        with cache.step([(b, 1)]) as step:
            plan = step.plan()
            append_all(step, rng)
            if length % 16:
                source = a.blocks()[length // 16]
                assert plan.copies.tolist() == [[source, 3, length % 16]]
                assert plan.new_blocks.tolist() == [[0, length // 16, 3]]
                assert plan.slots.tolist() == [3 * 16 + length % 16]
            else:
                assert plan.num_copies == 0
        shared = length // 16
        assert b.blocks()[:shared].tolist() == a.blocks()[:shared].tolist()
        assert b.blocks()[shared] not in a.blocks()
        assert cache.stats().copies == (1 if length % 16 else 0)

    def test_the_last_holder_of_a_block_writes_in_place(self, rng):
        cache = make_cache(8)
        a = cache.sequence()
        grow(cache, [(a, 20)], rng)
        b = a.fork()
        a.free()
        with cache.step([(b, 1)]) as step:
            assert step.plan().num_copies == 0
            append_all(step, rng)
        assert cache.stats().copies == 0

    def test_a_published_block_is_copied_before_it_is_written(self, rng):
        cache = make_cache(8)
        ids = np.arange(32)
        a = cache.sequence()
        grow(cache, [(a, ids)], rng)
        before = [x.copy() for x in a.read(0)]
        a.truncate(20)
        with cache.step([(a, 5)]) as step:
            assert step.plan().copies[:, 2].tolist() == [4]
            append_all(step, rng)
        hit = cache.sequence([*ids, 0])
        assert len(hit) == 32
        for held, expected in zip(hit.read(0), before, strict=True):
            np.testing.assert_array_equal(held, expected)

    def test_the_buffer_holds_every_array(self, rng):
        spec, num_blocks = TRACED["three groups"]
        cache = kvcore.KVCache(spec, num_blocks=num_blocks)
        a, b = cache.sequence(), cache.sequence()
        grow(cache, [(a, 70)], rng)
        c = a.fork(21)
        with cache.step([(b, 7), (c, 50), (a, 2)]) as step:
            plans = [step.plan(g) for g in range(3)]
            parts = unpack(plans[0], plans)
            assert parts[0].tolist() == [0, 7, 57, 59]
            assert parts[1].tolist() == [7, 71, 72]
            for plan, (slots, *triples) in zip(plans, parts[2:], strict=True):
                assert slots.tolist() == plan.slots.tolist()
                for name, part in zip(TRIPLES, triples, strict=True):
                    assert part.tolist() == getattr(plan, name).ravel().tolist()
                assert plan.buffer.tobytes() == plans[0].buffer.tobytes()
            assert [plan.block_size for plan in plans] == [16, 64, 32]
            append_all(step, rng)

    @pytest.mark.parametrize("group", range(3))
    def test_slots_are_the_tables_places(self, rng, group):
        spec, num_blocks = TRACED["three groups"]
        cache = kvcore.KVCache(spec, num_blocks=num_blocks)
        a, b = cache.sequence(), cache.sequence()
        for entries in ([(a, 50), (b, 9)], [(b, 30), (a, 61)], [(a, 1)]):
            with cache.step(entries) as step:
                plan = step.plan(group)
                tables, size = plan.block_tables, plan.block_size
                expected = [
                    tables[s, p // size] * size + p % size
                    for s, (sequence, n) in enumerate(entries)
                    for p in range(len(sequence), len(sequence) + n)
                ]
                assert plan.slots.tolist() == expected
                append_all(step, rng)

    def test_new_blocks_tell_what_changed_in_the_tables(self, rng):
        """An engine that keeps tables itself gets the step's tables by applying the changes."""
        cache = make_cache(30)
        a = cache.sequence()
        grow(cache, [(a, 40)], rng)
        b = a.fork(39)
        kept = {a: a.blocks().tolist(), b: b.blocks().tolist()}
        for entries in ([(b, 1), (a, 20)], [(a, 1), (b, 60)]):
            with cache.step(entries) as step:
                plan = step.plan()
                for s, column, block in plan.new_blocks.tolist():
                    row = kept[entries[s][0]]
                    row[column : column + 1] = [block]
                for s, (sequence, _) in enumerate(entries):
                    table = plan.block_tables[s]
                    assert kept[sequence] == table[table >= 0].tolist()
                append_all(step, rng)


def test_a_plan_ends_with_its_step(rng):
    cache = make_cache(8)
    a = cache.sequence()
    with cache.step([(a, 3)]) as step:
        plan = step.plan()
        append_all(step, rng)
    with pytest.raises(kvcore.StepClosed):
        step.plan()
    grow(cache, [(a, 100)], rng)  # takes over the closed step's memory
    assert plan.num_sequences == plan.num_tokens == plan.num_copies == 0
    for array in (plan.query_starts, plan.seq_lens, plan.slots, plan.buffer, plan.block_tables):
        assert array.size == 0
