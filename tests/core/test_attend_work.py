"""How the units of a call are cut into parts: whole, balanced, and within their memory."""

from __future__ import annotations

import ctypes as ct
import shlex
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core.library import ISAS, i32, i64, machine
from core.test_attend_kernels import Case

SPLIT, TILE, TOKEN_COST, MOST_PARTS = 256, 240, 4, 256
SOURCE = Path(__file__).parents[2] / "src" / "kvcore"
UNBOUNDED = 2**62


class Unit(ct.Structure):
    _fields_ = [
        *((name, i32) for name in ("share", "sequence", "head", "first_row", "num_rows")),
        *((name, i32) for name in ("begin", "end", "raw_begin")),
        *((name, i64) for name in ("state_row", "start")),
    ]

    @property
    def num_splits(self) -> int:
        return max(1, -(-self.end // SPLIT) - self.begin // SPLIT)

    def cost(self, num_splits: int) -> int:
        return (self.num_rows + TOKEN_COST) * SPLIT * num_splits


class Bound(ct.Structure):
    _fields_ = [("unit", i32), ("split", i32), ("cut", i32)]


class Cut(ct.Structure):
    _fields_ = [("unit", i32), ("first_split", i32), ("first_slot_row", i64)]


@dataclass
class Work:
    """What kv_cut_work made of some tiles."""

    units: list[Unit]
    bounds: list[Bound]
    cuts: list[Cut]
    slot_rows: int

    def part_costs(self) -> list[int]:
        """Of each part, from what it runs."""
        costs = [0] * (len(self.bounds) - 1)
        places = [(b.unit, b.split) for b in self.bounds]
        for u, unit in enumerate(self.units):
            for split in range(unit.num_splits):
                part = max(p for p, place in enumerate(places[:-1]) if place <= (u, split))
                costs[part] += unit.cost(1)
        return costs


@pytest.fixture(scope="module")
def cut_work(tmp_path_factory):
    """kv_cut_work, which the library does not export: (tiles, parts, most slot rows) -> Work."""
    target = tmp_path_factory.mktemp("work") / "work.so"
    core = SOURCE / "core"
    subprocess.run(
        [
            *shlex.split(sysconfig.get_config_var("CC") or "cc"), "-std=c11", "-O1", "-shared",
            "-fPIC", f"-I{SOURCE / 'include' / 'kvcore'}", f"-I{core}",
            str(core / "attend_work.c"), str(core / "attend_sight.c"), "-o", str(target),
        ],
        check=True,
    )  # fmt: skip
    library = ct.CDLL(str(target))

    def cut(tiles, num_parts, most_slot_rows=UNBOUNDED) -> Work:
        units = (Unit * (len(tiles) + MOST_PARTS))()
        start = state_row = 0
        for u, (rows, tokens) in enumerate(tiles):
            units[u] = Unit(-1, u, 0, 7 * u, rows, 0, tokens, tokens, state_row, start)
            start += (rows + TOKEN_COST) * tokens
            state_row += rows
        units[len(tiles)].start = start
        count, slot_rows = i64(len(tiles)), i64()
        bounds, cuts = (Bound * (MOST_PARTS + 1))(), (Cut * MOST_PARTS)()
        num_cuts = library.kv_cut_work(
            units, ct.byref(count), i32(num_parts), i64(most_slot_rows), bounds, cuts,
            ct.byref(slot_rows),
        )  # fmt: skip
        return Work(units[: count.value], bounds[: num_parts + 1], cuts[:num_cuts], slot_rows.value)

    return cut


tiles_of_rows = st.tuples(st.integers(1, TILE), st.integers(1, 40_000))


@settings(max_examples=300)
@given(
    tiles=st.lists(tiles_of_rows, min_size=1, max_size=20),
    num_parts=st.integers(1, MOST_PARTS),
    most_slot_rows=st.one_of(st.just(UNBOUNDED), st.integers(0, 30_000)),
)
@example(tiles=[(3, 3073)], num_parts=5, most_slot_rows=30)
def test_parts_take_all_rows_once_and_slots_stay_bounded(
    cut_work, tiles, num_parts, most_slot_rows
):
    work = cut_work(tiles, num_parts, most_slot_rows)
    rows: dict[int, list[tuple[int, int]]] = {}
    for unit in work.units:
        assert unit.num_rows > 0
        rows.setdefault(unit.sequence, []).append((unit.first_row, unit.state_row))
        assert unit.end == unit.raw_begin == tiles[unit.sequence][1]
    for s, (count, _) in enumerate(tiles):
        first = 7 * s, sum(n for n, _ in tiles[:s])
        sizes = [unit.num_rows for unit in work.units if unit.sequence == s]
        assert sum(sizes) == count
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        assert rows[s] == [(first[0] + n, first[1] + n) for n in starts]

    places = [(bound.unit, bound.split) for bound in work.bounds]
    assert places[0] == (0, 0) and places[-1] == (len(work.units), 0)
    assert places == sorted(places)
    for bound in work.bounds[:-1]:
        assert (bound.cut >= 0) == (bound.split > 0)
        if bound.split:
            assert bound.split < work.units[bound.unit].num_splits
            assert work.cuts[bound.cut].unit == bound.unit
            assert work.cuts[bound.cut].first_split <= bound.split

    slot_rows = 0
    for cut in work.cuts:
        unit = work.units[cut.unit]
        assert cut.first_slot_row == slot_rows
        slot_rows += (unit.num_splits - cut.first_split + 1) * unit.num_rows
    assert work.slot_rows == slot_rows <= most_slot_rows


@pytest.mark.parametrize(
    ("tiles", "num_parts"),
    [
        ([(TILE, 131_072)] * 72, 16),  # a chunk of a prompt: 512 new tokens, 8 KV heads of 4
        ([(TILE, 32_768)] * 40, 64),
        ([(TILE, 131_072), (TILE, 100_000), (TILE, 60_000)] * 5, 16),
    ],
)
def test_what_would_take_too_much_is_cut_between_rows(cut_work, tiles, num_parts):
    """The parts stay as even as sixteen rows of a tile allow."""
    most = 64 * 2**20 // (130 * 4)
    assert cut_work(tiles, num_parts).slot_rows > most
    work = cut_work(tiles, num_parts, most)
    assert len(work.units) > len(tiles) and work.slot_rows <= most
    costs = work.part_costs()
    even = sum(costs) / num_parts
    assert max(costs) <= even + 16 / TILE * tiles[0][1] * (TILE + TOKEN_COST)
    assert min(costs) > 0


def test_one_tile_is_still_cut_between_splits(cut_work):
    """Rows alone could not keep sixteen threads busy."""
    work = cut_work([(TILE, 131_072)], 16, 64 * 2**20 // (130 * 4))
    assert len(work.units) == 1 and len(work.cuts) == 1
    assert max(work.part_costs()) <= sum(work.part_costs()) / 16 + work.units[0].cost(1)


def test_bits_where_units_are_cut_between_rows(cut_work) -> None:
    """Twenty tiles of up to 45,000 tokens on as many threads and one more."""
    rows, tokens, dim = 20 * TILE, 45_000, 64
    tiles = [(TILE, tokens - rows + TILE * (i + 1)) for i in range(20)]
    assert cut_work(tiles, 21).slot_rows > 64 * 2**20 // ((dim + 2) * 4)
    case = Case(
        [(tokens - rows, rows)], heads=1, dim=8, dim_v=dim, k_format="fp16", v_format="fp16"
    )
    results = []
    for threads in (1, 21):
        with machine(ISAS[0], threads):
            results.append([x.tobytes() for x in case.run()])
    assert results[0] == results[1]
