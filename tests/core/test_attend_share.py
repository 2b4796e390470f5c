"""Which sequences of a call are found to share a prefix; bits are test_shared_prefixes.py's."""

from __future__ import annotations

import ctypes as ct
import shlex
import subprocess
import sysconfig
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.library import AttendOptions, Step, i32, ptr

SPLIT = 256
SOURCE = Path(__file__).parents[2] / "src" / "kvcore"


class Sight(ct.Structure):
    _fields_ = [
        ("plan", ptr),
        ("options", ptr),
        ("narrowed", ct.c_int),
        ("moved", ct.c_int),
        ("quantized", ptr),
    ]


class Share(ct.Structure):
    _fields_ = [
        (name, i32)
        for name in ("first_member", "num_members", "num_splits", "num_rows", "rows_before")
    ]


class Shares(ct.Structure):
    _fields_ = [
        ("list", ct.POINTER(Share)),
        ("count", i32),
        ("members", ct.POINTER(i32)),
        ("first_rows", ct.POINTER(i32)),
        ("share_of", ct.POINTER(i32)),
        ("member_of", ct.POINTER(i32)),
    ]


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """kv_find_shares, which the library does not export, as [(members, num_splits)]."""
    target = tmp_path_factory.mktemp("share") / "share.so"
    core = SOURCE / "core"
    subprocess.run(
        [
            *shlex.split(sysconfig.get_config_var("CC") or "cc"), "-std=c11", "-O1", "-shared",
            "-fPIC", f"-I{SOURCE / 'include' / 'kvcore'}", f"-I{core}",
            str(core / "attend_share.c"), str(core / "attend_sight.c"), "-o", str(target),
        ],
        check=True,
    )  # fmt: skip
    library = ct.CDLL(str(target))
    library.kv_shares_nbytes.restype = ct.c_int64
    library.kv_sight_of.restype = Sight

    def find(block_size, tables, lengths, counts=None, group_size=1, **options):
        counts = counts or [1] * len(tables)
        step = Step(block_size, counts, lengths, tables)
        given = AttendOptions(ct.sizeof(AttendOptions), 1.0, **options)
        sight = library.kv_sight_of(ct.byref(step.plan), ct.byref(given))
        memory = np.zeros(library.kv_shares_nbytes(len(tables)), np.uint8)
        shares = Shares()
        library.kv_find_shares(
            ct.byref(sight), group_size, memory.ctypes.data_as(ptr), ct.byref(shares)
        )
        return [list_members(shares, i, counts, group_size) for i in range(shares.count)]

    return find


def list_members(shares, i, counts, group_size):
    """(members, num_splits) of a share, whose books are checked on the way."""
    share = shares.list[i]
    places = range(share.first_member, share.first_member + share.num_members)
    members = [shares.members[p] for p in places]
    rows = [counts[s] * group_size for s in members]
    assert [shares.share_of[s] for s in members] == [i] * len(members)
    assert [shares.member_of[s] for s in members] == list(places)
    assert [shares.first_rows[p] for p in places] == [sum(rows[:n]) for n in range(len(rows))]
    assert share.num_rows == sum(rows)
    assert share.rows_before == sum(shares.list[n].num_rows for n in range(i))
    return sorted(members), share.num_splits


def table(*parts):
    return [block for part in parts for block in part]


def test_what_all_begin_with(search):
    prefix = range(8)  # two splits of blocks of 64
    tables = [table(prefix, [10 + s]) for s in range(3)]
    assert search(64, tables, [513, 540, 576]) == [([0, 1, 2], 2)]


def test_a_token_of_its_own_is_left_to_each(search):
    tables = [table(range(4))] * 2
    assert search(64, tables, [256, 256]) == []
    assert search(64, [*tables, table(range(4), [9])], [256, 256, 257]) == []
    assert search(64, [table(range(8))] * 2, [512, 512]) == [([0, 1], 1)]


def test_part_of_a_split_is_not_shared(search):
    tables = [table(range(7), [20 + s, 30 + s]) for s in range(2)]
    assert search(64, tables, [576, 576]) == [([0, 1], 1)]
    assert search(16, [table(range(15), [20 + s, 30 + s]) for s in range(2)], [272, 272]) == []


def test_blocks_larger_than_a_split(search):
    tables = [[5, 6 + s] for s in range(2)]
    assert search(1024, tables, [1030, 1100]) == [([0, 1], 4)]
    assert search(1024, [[5], [5]], [700, 700]) == [([0, 1], 2)]


def test_others_stay_out(search):
    tables = [table(range(8)), table(range(20, 28)), table(range(7), [40]), table(range(50, 58))]
    assert search(64, tables, [512] * 4) == [([0, 2], 1)]


def test_the_cut_that_spares_most(search):
    """Four share one split, two of these share six more."""
    long = table(range(28), [70])
    tables = [long, table(range(28), [71]), table(range(4), [72]), table(range(4), [73])]
    found = search(64, tables, [1793, 1793, 257, 257])
    assert found == [([0, 1], 7), ([2, 3], 1)]
    many = [table(range(4), range(100 * s, 100 * s + 5)) for s in range(1, 9)]
    assert search(64, [*tables[:2], *many], [1793] * 2 + [576] * 8)[0] == (list(range(10)), 1)


def test_only_few_rows(search):
    tables = [table(range(4), [10 + s]) for s in range(3)]
    assert search(64, tables, [300] * 3, counts=[1, 17, 1]) == [([0, 2], 1)]
    assert search(64, tables, [300] * 3, counts=[1, 4, 1], group_size=8) == [([0, 2], 1)]
    assert search(64, tables, [300] * 3, counts=[0, 1, 1]) == [([1, 2], 1)]


def test_options_that_hide_tokens(search):
    tables = [table(range(8), [10 + s]) for s in range(2)]
    assert search(64, tables, [540, 540], window=540) == [([0, 1], 2)]
    assert search(64, tables, [540, 540], window=539) == []
    places = np.array([538, 100], np.int32)
    assert search(64, tables, [540, 540], window=540, positions=places.ctypes.data) == []
    # Bottom-right aligned, the first of four new tokens sees 509 of the 512.
    assert search(64, tables, [512, 512], counts=[4, 4]) == [([0, 1], 1)]
    assert search(64, tables, [515, 515], counts=[4, 4], non_causal=1) == [([0, 1], 1)]
    assert search(64, tables, [516, 516], counts=[4, 4], non_causal=1) == [([0, 1], 2)]


@given(data=st.data())
def test_every_share_is_one(search, data):
    """Whatever is found exists: equal blocks, seen whole, each sequence in one share at most."""
    block_size = data.draw(st.sampled_from([16, 64, 256, 1024]))
    trunk = list(range(1200 // block_size + 1))
    tables, lengths = [], []
    for s in range(data.draw(st.integers(2, 12))):
        length = data.draw(st.integers(1, 1200))
        columns = -(-length // block_size)
        own = data.draw(st.integers(0, columns))
        branch = data.draw(st.integers(0, 2))
        tables.append(
            [t + 10_000 * (branch * (t > 2)) for t in trunk[: columns - own]]
            + [1000 * (s + 1) + t for t in range(own)]
        )
        lengths.append(length)
    found = search(block_size, tables, lengths)
    taken = [s for members, _ in found for s in members]
    assert len(taken) == len(set(taken))
    for members, num_splits in found:
        assert len(members) > 1
        assert num_splits > 0
        columns = -(-num_splits * SPLIT // block_size)
        for a, b in pairwise(members):
            assert tables[a][:columns] == tables[b][:columns]
        assert all(lengths[s] > num_splits * SPLIT for s in members)
