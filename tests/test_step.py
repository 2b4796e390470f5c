"""The step as a transaction: all or nothing, whatever goes wrong inside."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

import kvcore
from support import (
    append_all,
    assert_balanced,
    assert_same_bits,
    grow,
    make_cache,
    poison,
    random_kv,
    random_q,
    snapshot,
)

GROUPS = {
    "num_layers": 3,
    "groups": [kvcore.GroupSpec(16), kvcore.GroupSpec(64)],
    "layer_groups": [0, 1, 0],
}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


class World:
    """A cache with three sequences, two of which share blocks, and what must stay as it is."""

    def __init__(self, rng):
        self.rng = rng
        self.cache = make_cache([30, 10], **GROUPS)
        self.a, self.b = self.cache.sequence(), self.cache.sequence()
        grow(self.cache, [(self.a, [*range(70)]), (self.b, 20)], rng)
        self.c = self.a.fork(40)
        self.before = self.snapshot()

    @property
    def sequences(self):
        return [self.a, self.b, self.c]

    def snapshot(self):
        return snapshot(self.cache, self.sequences)

    def step(self):
        """Writes into a shared block, into an own one, and takes new ones."""
        return self.cache.step([(self.c, [*range(100, 130)]), (self.b, 3), (self.a, 1)])

    def assert_unchanged(self):
        assert self.snapshot() == self.before
        # The blocks that were given back are handed out again as if nothing had been.
        with self.step() as step:
            tables = [step.plan(g).block_tables.tolist() for g in (0, 1)]
            step.rollback()
        fresh = World(np.random.default_rng(0))
        with fresh.step() as step:
            assert tables == [step.plan(g).block_tables.tolist() for g in (0, 1)]
            step.rollback()


@pytest.fixture
def world(rng):
    return World(rng)


class TestRollBack:
    def test_by_hand(self, world):
        step = world.step()
        append_all(step, world.rng)
        step.rollback()
        world.assert_unchanged()

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
    @pytest.mark.parametrize("layers", range(4))
    def test_by_any_exception_after_any_layer(self, world, error, layers):
        with pytest.raises(error), world.step() as step:
            for layer in range(layers):
                step.append(layer, *random_kv(world.rng, 34, world.cache.spec.layers[layer]))
            raise error
        world.assert_unchanged()

    @pytest.mark.parametrize("layer", range(3))
    @pytest.mark.parametrize("which", ["k", "v"])
    @pytest.mark.parametrize("fault", ["shape", "dtype", "None"])
    def test_by_a_bad_array_at_any_layer(self, world, layer, which, fault):
        spec = world.cache.spec.layers[layer]
        rows = dict(zip("kv", random_kv(world.rng, 34, spec), strict=True))
        rows[which] = {
            "shape": rows[which][:33],
            "dtype": rows[which].astype(np.float64),
            "None": None,
        }[fault]
        expected = kvcore.InvalidArgument if fault == "shape" else kvcore.InvalidType
        with pytest.raises(expected, match=f"^{which}: expected"), world.step() as step:
            for before in range(layer):
                step.append(before, *random_kv(world.rng, 34, spec))
            step.append(layer, **rows)
        world.assert_unchanged()

    @pytest.mark.parametrize("appended", [[], [0], [0, 1], [2, 1]])
    def test_by_an_incomplete_commit(self, world, appended):
        missing = sorted({0, 1, 2} - set(appended))
        with pytest.raises(kvcore.StepIncomplete, match=str(missing[0])), world.step() as step:
            for layer in appended:
                step.append(layer, *random_kv(world.rng, 34, world.cache.spec.layers[layer]))
        assert not step.is_open
        world.assert_unchanged()

    def test_by_dropping_the_step(self, world):
        step = world.step()
        append_all(step, world.rng)
        assert world.cache.stats().open_steps == 1
        del step
        assert world.cache.stats().open_steps == 0
        world.assert_unchanged()

    def test_by_dropping_a_step_that_is_in_a_cycle(self, world):
        step = world.step()
        holder = [step]
        holder.append(holder)
        del step, holder
        gc.collect()
        world.assert_unchanged()

    def test_by_dropping_a_cycle_that_alone_has_the_sequences(self):
        """The collector takes a cycle apart in any order; the sequences go after the step."""
        cache = make_cache(4)
        holder = [cache.step([(cache.sequence(), 3), (cache.sequence(), [1, 2])])]
        holder += [holder, *holder[0].sequences]
        del holder
        gc.collect()
        stats = cache.stats()
        assert (stats.open_steps, stats.num_sequences, stats.in_use) == (0, 0, 0)
        cache.check()

    def test_by_a_backend_that_fails(self, world, monkeypatch):
        def fail(*arguments):
            raise MemoryError("no memory")

        monkeypatch.setattr(world.cache.backend, "copy_blocks", fail, raising=False)
        with pytest.raises(MemoryError):
            world.step()
        monkeypatch.undo()
        world.assert_unchanged()

    def test_leaves_a_copy_on_write_source_alone(self, world):
        """The child's copy was written; the parent's block was not."""
        with pytest.raises(ZeroDivisionError), world.step() as step:
            append_all(step, world.rng)
            raise ZeroDivisionError
        assert world.c.blocks().tolist() == world.a.blocks()[:3].tolist()
        world.assert_unchanged()

    def test_a_rolled_back_step_publishes_nothing(self, world):
        with world.step() as step:
            append_all(step, world.rng)
            step.rollback()
        assert len(world.cache.sequence([*range(40), *range(100, 130)])) == 0


class TestCommit:
    def test_makes_everything_visible_at_once(self, world):
        with world.step() as step:
            append_all(step, world.rng)
            assert [len(s) for s in world.sequences] == [70, 20, 40]
            assert not step.is_open or world.cache.stats().open_steps == 1
        assert [len(s) for s in world.sequences] == [71, 23, 70]
        assert_balanced(world.cache)

    def test_by_hand(self, world):
        step = world.step()
        append_all(step, world.rng)
        step.commit()
        assert not step.is_open
        assert [len(s) for s in world.sequences] == [71, 23, 70]

    def test_by_hand_inside_with(self, world):
        with world.step() as step:
            append_all(step, world.rng)
            step.commit()
        assert len(world.a) == 71

    def test_an_error_after_a_commit_does_not_undo_it(self, world):
        with pytest.raises(ValueError), world.step() as step:
            append_all(step, world.rng)
            step.commit()
            raise ValueError
        assert len(world.a) == 71

    def test_holds_what_was_there_and_what_came(self, world):
        old = [s.read(0) for s in world.sequences]
        rows = {}
        with world.step() as step:
            starts = step.query_starts
            for layer, spec in enumerate(world.cache.spec.layers):
                rows[layer] = random_kv(world.rng, 34, spec)
                step.append(layer, *rows[layer])
        for s, (sequence, before) in enumerate(
            zip([world.c, world.b, world.a], [old[2], old[1], old[0]], strict=True)
        ):
            new = slice(starts[s], starts[s + 1])
            for held, past, came in zip(sequence.read(0), before, rows[0], strict=True):
                assert_same_bits(held, np.concatenate([past, came[new]]))


class TestOrder:
    def test_attend_before_append(self, world):
        with world.step() as step:
            with pytest.raises(kvcore.StepError):
                step.attend(0, random_q(world.rng, 34, 2, 16))
            step.rollback()
        world.assert_unchanged()

    def test_attend_sees_its_own_layer_only_after_its_append(self, world):
        q = random_q(world.rng, 34, 2, 16)
        with world.step() as step:
            step.append(0, *random_kv(world.rng, 34, world.cache.spec.layers[0]))
            step.attend(0, q)
            with pytest.raises(kvcore.StepError):
                step.attend(1, q)
            step.rollback()

    def test_append_twice(self, world):
        rows = random_kv(world.rng, 34, world.cache.spec.layers[0])
        with world.step() as step:
            step.append(0, *rows)
            first = step.attend(0, random_q(np.random.default_rng(1), 34, 2, 16))
            with pytest.raises(kvcore.StepError):
                step.append(0, *(x + 1 for x in rows))
            again = step.attend(0, random_q(np.random.default_rng(1), 34, 2, 16))
            assert_same_bits(again, first)
            step.rollback()

    def test_append_again_after_a_refused_append(self, world):
        spec = world.cache.spec.layers[0]
        rows = random_kv(world.rng, 34, spec)
        with world.step() as step:
            with pytest.raises(kvcore.InvalidArgument):
                step.append(0, rows[0], rows[1][:5])
            append_all(step, world.rng)
        assert len(world.a) == 71

    def test_layers_in_any_order(self, world):
        with world.step() as step:
            for layer in (2, 0, 1):
                step.append(layer, *random_kv(world.rng, 34, world.cache.spec.layers[layer]))
        assert len(world.a) == 71

    def test_append_to_a_layer_without_storage(self, rng):
        cache = make_cache(4, num_layers=2, kv_sources={1: 0})
        rows = random_kv(rng, 2, cache.spec.layers[0])
        with cache.step([(cache.sequence(), 2)]) as step:
            with pytest.raises(kvcore.StepError):
                step.append(1, *rows)
            with pytest.raises(kvcore.StepError):
                step.attend(1, random_q(rng, 2, 2, 16))
            step.append(0, *rows)
            step.attend(1, random_q(rng, 2, 2, 16))

    @pytest.mark.parametrize("close", ["commit", "rollback"])
    def test_a_closed_step(self, world, close):
        step = world.step()
        append_all(step, world.rng)
        getattr(step, close)()
        rows = random_kv(world.rng, 34, world.cache.spec.layers[0])
        before = world.snapshot()
        for call in (
            step.commit,
            step.rollback,
            step.plan,
            lambda: step.append(0, *rows),
            lambda: step.attend(0, random_q(world.rng, 34, 2, 16)),
        ):
            with pytest.raises(kvcore.StepClosed):
                call()
        with step:  # leaving it again does nothing
            pass
        assert world.snapshot() == before
        assert step.num_tokens == 34 and step.query_starts.tolist() == [0, 30, 33, 34]


class TestOverlap:
    def test_steps_over_disjoint_sequences(self, rng):
        """Begun, filled and closed in any order; each is as if it were alone."""
        cache = make_cache(20)
        a, b = cache.sequence(), cache.sequence()
        first, second = cache.step([(a, 20)]), cache.step([(b, 20)])
        rows = [random_kv(rng, 20, cache.spec.layers[0]) for _ in range(2)]
        second.append(0, *rows[1])
        first.append(0, *rows[0])
        first.commit()
        third = cache.step([(a, 3)])
        second.commit()
        third.rollback()
        for sequence, expected in zip((a, b), rows, strict=True):
            for held, came in zip(sequence.read(0), expected, strict=True):
                assert_same_bits(held, came)
        assert_balanced(cache)

    @pytest.mark.parametrize("first_ends", ["commit", "rollback"])
    @pytest.mark.parametrize("second_ends", ["commit", "rollback"])
    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_over_two_forks_of_one_partial_block(self, rng, first_ends, second_ends, order):
        cache = make_cache(12)
        a = cache.sequence()
        grow(cache, [(a, 20)], rng)
        b = a.fork()
        old = a.read(0)
        steps = [cache.step([(a, 5)]), cache.step([(b, 7)])]
        rows = [random_kv(rng, n, cache.spec.layers[0]) for n in (5, 7)]
        for step, new in zip(steps, rows, strict=True):
            step.append(0, *new)
        ends = [first_ends, second_ends]
        for i in order:
            getattr(steps[i], ends[i])()
            assert_balanced(cache)
        poison(cache, [a, b])
        for sequence, end, new in zip((a, b), ends, rows, strict=True):
            for held, past, came in zip(sequence.read(0), old, new, strict=True):
                came = came if end == "commit" else came[:0]
                assert_same_bits(held, np.concatenate([past, came]))

    def test_a_sequence_in_an_open_step_is_busy(self, world):
        step = world.step()
        before = [len(s) for s in world.sequences]
        for call in (
            world.a.fork,
            world.a.free,
            lambda: world.a.truncate(3),
            lambda: world.a.read(0),
            lambda: world.cache.step([(world.a, 1)]),
            lambda: world.cache.step([(world.cache.sequence(), 1), (world.b, 1)]),
        ):
            with pytest.raises(kvcore.SequenceBusy):
                call()
        assert [len(s) for s in world.sequences] == before
        step.rollback()
        world.assert_unchanged()


class TestShortage:
    def test_says_how_many_are_needed_and_available(self, rng):
        cache = make_cache([30, 2], **GROUPS)
        a = cache.sequence()
        grow(cache, [(a, [*range(70)])], rng)
        before = snapshot(cache, [a])
        b = cache.sequence()
        with pytest.raises(kvcore.OutOfBlocks, match=r"group 1: 2 blocks needed, 0 avail") as error:
            cache.step([(b, 65)])
        assert (error.value.group, error.value.needed, error.value.available) == (1, 2, 0)
        b.free()
        assert snapshot(cache, [a]) == before

    def test_counts_cached_blocks_as_available(self, rng):
        cache = make_cache(4)
        a = cache.sequence()
        grow(cache, [(a, [*range(48)])], rng)
        a.free()
        with pytest.raises(kvcore.OutOfBlocks) as error:
            cache.step([(cache.sequence(), 65)])
        assert (error.value.needed, error.value.available) == (5, 4)
        assert cache.stats().cached == 3

    def test_of_the_last_block(self, rng):
        cache = make_cache(3)
        a, b = cache.sequence(), cache.sequence()
        grow(cache, [(a, 16), (b, 16)], rng)
        with pytest.raises(kvcore.OutOfBlocks):
            cache.step([(a, 1), (b, 1)])
        grow(cache, [(a, 1)], rng)
        assert cache.stats().free == 0

    def test_counts_the_copy_that_a_shared_block_needs(self, rng):
        cache = make_cache(2)
        a = cache.sequence()
        grow(cache, [(a, 17)], rng)
        b = a.fork()
        with pytest.raises(kvcore.OutOfBlocks) as error:
            cache.step([(b, 1)])
        assert (error.value.needed, error.value.available) == (1, 0)
        a.free()
        grow(cache, [(b, 1)], rng)

    def test_of_a_huge_number_of_tokens(self):
        cache = make_cache(4)
        a = cache.sequence()
        with pytest.raises(kvcore.OutOfBlocks) as error:
            cache.step([(a, 2**31 - 1)])
        assert error.value.needed == 2**27


def test_a_step_keeps_its_sequences_and_cache_alive(rng):
    cache = make_cache(4)
    step = cache.step([(cache.sequence(), 3)])
    alive = weakref.ref(cache)
    spec = cache.spec.layers[0]
    del cache
    gc.collect()
    assert alive() is not None
    step.append(0, *random_kv(rng, 3, spec))
    step.commit()
    (sequence,) = step.sequences
    assert len(sequence) == 3
    del step, sequence
    gc.collect()
    assert alive() is None


def test_repr(world):
    step = world.step()
    assert repr(step) == "Step(3 sequences, 34 tokens, open)"
    step.rollback()
    assert repr(step) == "Step(3 sequences, 34 tokens, closed)"


def test_entries_may_be_any_iterable(rng):
    cache = make_cache(8)
    sequences = [cache.sequence() for _ in range(3)]
    grow(cache, ((s, n) for n, s in enumerate(sequences, start=1)), rng)
    grow(cache, zip(sequences, [[1, 2], np.int64(3), np.array([4, 5])], strict=True), rng)
    assert [len(s) for s in sequences] == [3, 5, 5]


IDS = [3, 1, 4, 1, 5] * 4
FORMS = {
    "a list": IDS,
    "a tuple": tuple(IDS),
    "NumPy ints in a list": [np.int64(i) for i in IDS],
    "int32": np.array(IDS, np.int32),
    "int64": np.array(IDS, np.int64),
    "uint8": np.array(IDS, np.uint8),
    "int32 with gaps": np.repeat(np.array(IDS, np.int32), 2)[::2],
    "int32 of the other byte order": np.array(IDS, ">i4"),
    "a memoryview": memoryview(np.array(IDS, np.int32)),
}


@pytest.mark.parametrize("ids", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("pair", [tuple, list])
def test_token_ids_come_in_many_forms(rng, ids, pair):
    """They are stored as what they say: the next text that starts with them finds the block."""
    cache = make_cache(8)
    a, b = cache.sequence(), cache.sequence()
    grow(cache, [pair((b, np.int32(2))), pair((a, ids))], rng)
    assert (len(a), len(b)) == (20, 2)
    assert len(cache.sequence([*IDS, 9])) == 16
    assert len(cache.sequence([*IDS[:15], 9, 9, 9])) == 0


def test_entries_that_change_what_was_read_before(rng):
    """Reading an entry can run the caller's code, which here frees the sequence before it."""
    cache = make_cache(8)
    a, b = cache.sequence(), cache.sequence()

    class Count:
        def __index__(self):
            if not a.is_freed:
                a.free()
            return 2

    with pytest.raises(kvcore.SequenceFreed):
        cache.step([(a, 1), (b, Count())])
    assert cache.stats().open_steps == 0 and len(b) == 0
    grow(cache, [(b, Count())], rng)
    assert len(b) == 2
