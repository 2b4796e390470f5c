"""Plans as one int32 array, which is how they go to another memory than the core's."""

from __future__ import annotations

import numpy as np
import pytest

import kvcore
from kvcore._native import attention
from kvcore._native.blocks import Plan
from support import append_all, grow, make_cache

SPEC = kvcore.CacheSpec(
    2,
    1,
    64,
    groups=[kvcore.GroupSpec(16), kvcore.GroupSpec(32, 70, 30)],
    layer_groups=[0, 1],
    layer_formats={0: ("rot4", "int8"), 1: ("bf16", "bf16")},
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def step(rng):
    """An open step with copies, restores and released blocks."""
    cache = kvcore.KVCache(SPEC, (40, 40), 40)
    a, b = cache.sequence(), cache.sequence()
    grow(cache, [(a, 170)], rng)
    grow(cache, [(b, 40)], rng)
    c = b.fork(37)
    a.truncate(150)
    with cache.step([(c, 3), (a, 1), (b, 21)]) as step:
        yield step
        append_all(step, rng)


@pytest.mark.parametrize("pool", range(3))
@pytest.mark.parametrize("spare", [0, 5])
def test_every_part_is_where_pack_says(step, pool, spare):
    plan = step.plan(pool)
    tables = plan.block_tables
    width = plan.num_columns + spare
    assert plan.num_columns == tables.shape[1]
    target = np.full(3 + plan.packed_size(width), -7, np.int32)
    starts, lens, slots, first = plan.pack(target, 3, width)
    assert starts == 3 and (np.diff([starts, lens, slots, first]) % 4 == 0).all()
    assert target[:3].tolist() == [-7] * 3
    assert target[starts : starts + 4].tolist() == plan.query_starts.tolist()
    assert target[lens : lens + 3].tolist() == plan.seq_lens.tolist()
    assert target[slots : slots + plan.num_tokens].tolist() == plan.slots.tolist()
    packed = target[first : first + 3 * width].reshape(3, width)
    assert packed[:, : tables.shape[1]].tolist() == tables.tolist()
    assert (packed[:, tables.shape[1] :] == -1).all()


def test_copies_and_restores(step):
    plans = [step.plan(pool) for pool in range(3)]
    assert plans[0].num_copies and plans[2].num_restores
    for plan in plans:
        target = np.full(plan.packed_changes_size() + 4, -7, np.int32)
        copies, restores = plan.pack_changes(target, 4)
        assert copies == 4 and restores % 4 == 0
        assert target[copies:][: plan.copies.size].tolist() == plan.copies.ravel().tolist()
        assert target[restores:][: plan.restores.size].tolist() == plan.restores.ravel().tolist()


@pytest.mark.parametrize("missing", range(1, 5))
def test_too_little_room(step, missing):
    plan = step.plan()
    width = plan.num_columns
    with pytest.raises(kvcore.InvalidArgument, match=r"^target: expected"):
        plan.pack(np.empty(plan.packed_size(width) - missing, np.int32), 0, width)
    with pytest.raises(kvcore.InvalidArgument, match=r"^target: expected"):
        plan.pack_changes(np.empty(plan.packed_changes_size() - missing, np.int32), 0)


def test_a_table_that_is_too_narrow(step):
    with pytest.raises(kvcore.InvalidArgument):
        step.plan().pack(np.empty(1000, np.int32), 0, step.plan().num_columns - 1)


def test_plans_of_callers_own_books():
    tables = np.arange(6, dtype=np.int32).reshape(2, 3)
    lens, starts = np.array([40, 33], np.int32), np.array([0, 1, 3], np.int32)
    plan = Plan.from_tables(tables, lens, starts, 16)
    target = np.empty(plan.packed_size(4), np.int32)
    first, second, slots, third = plan.pack(target, 0, 4)
    assert slots == third  # there are none
    assert target[first : first + 3].tolist() == [0, 1, 3]
    assert target[second : second + 2].tolist() == [40, 33]
    assert target[third:].reshape(2, 4).tolist() == [[0, 1, 2, -1], [3, 4, 5, -1]]
    plan = Plan.from_slots(np.array([5, -1, 7], np.int32), 16)
    assert plan.num_columns == 0
    with pytest.raises(kvcore.InvalidArgument):
        plan.pack(np.empty(100, np.int32), 0, 1)
    target = np.empty(plan.packed_size(0), np.int32)
    _, _, slots, end = plan.pack(target, 0, 0)
    assert target[slots : slots + 3].tolist() == [5, -1, 7] and end == target.size


class TestSight:
    """What new tokens see of what a group has released."""

    @pytest.mark.parametrize("window", [1, 70])
    def test_a_window_within_the_retention(self, step, window):
        attention.check_sight(step.plan(1), 40, True, window, None, None, None)

    @pytest.mark.parametrize(("causal", "window"), [(True, 0), (False, 0), (True, 130)])
    def test_a_token_that_sees_more(self, step, causal, window):
        attention.check_sight(step.plan(0), 40, causal, window, None, None, None)
        with pytest.raises(kvcore.TokensReleased):
            attention.check_sight(step.plan(1), 40, causal, window, None, None, None)

    def test_positions_move_the_window(self, step):
        positions = np.arange(step.num_tokens, dtype=np.int32)
        with pytest.raises(kvcore.TokensReleased):
            attention.check_sight(step.plan(1), 40, True, 70, positions, None, None)

    def test_a_mask_hides_what_is_released(self, step):
        bits = np.zeros((1, 19), np.uint8)  # of sequence 1, which has 151 tokens
        bits[0, 12:] = 255
        offsets = np.array([-1, 0, -1], np.int64)
        attention.check_sight(step.plan(1), 40, True, 0, None, bits, offsets)
        bits[0, 0] = 1
        with pytest.raises(kvcore.TokensReleased):
            attention.check_sight(step.plan(1), 40, True, 0, None, bits, offsets)

    def test_a_block_that_is_none(self, step):
        with pytest.raises(kvcore.InvalidArgument):
            attention.check_sight(step.plan(0), 1, True, 0, None, None, None)


def test_layers_that_a_graph_has_appended(rng):
    cache = make_cache(4, num_layers=3, kv_sources={2: 0})
    a = cache.sequence()
    with cache.step([(a, 3)]) as step:
        assert step.graph_key is None
        step.mark_appended()
    assert len(a) == 3
    with pytest.raises(kvcore.StepClosed):
        step.mark_appended()


def test_the_cpu_has_refused_what_is_not_finite():
    cache = make_cache(4, poisoned=False, head_dim=32, k_format="int8", v_format="int8")
    a = cache.sequence()
    rows = np.full((1, 2, 32), np.nan, np.float32)
    with pytest.raises(kvcore.NotFinite), cache.step([(a, 1)]) as step:
        step.append(0, rows, rows)
    cache.check_finite()
