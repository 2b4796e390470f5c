"""Append, read and copy on every layout, and what each refuses."""

from __future__ import annotations

import ctypes as ct

import numpy as np
import pytest

from core.library import (
    DTYPES,
    NULL,
    OK,
    OVERFLOW,
    RANGE,
    RELEASED,
    VALUE,
    AttendOptions,
    Blocks,
    Step,
    append,
    attend,
    blocks_of,
    lib,
    machine,
    read,
    rows_of,
)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("fmt", ["fp32", "fp16", "bf16"])
def test_append_writes_its_slots_and_no_others(fmt: str, dtype: str, threads: int) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((7000, 3, 48)).astype(DTYPES[dtype])
    blocks = np.full((500, 3, 16, 48), np.nan, DTYPES[fmt])
    slots = rng.permutation(8000)[:7000].astype(np.int32)
    slots[::50] = -1
    step = Step(16, [7000], [7000], slots=slots)
    with machine("scalar", threads):
        assert append(step, rows, blocks) == OK
    expected = np.full_like(blocks, np.nan)
    used = slots >= 0
    expected[slots[used] // 16, :, slots[used] % 16] = (
        rows[used].astype(np.float32).astype(blocks.dtype)
    )
    assert blocks.tobytes() == expected.tobytes()


def test_append_padded_and_strided() -> None:
    rng = np.random.default_rng(1)
    counts = [3, 0, 5]
    padded = rng.standard_normal((3, 2, 6, 8), np.float32).swapaxes(1, 2)  # BHSD seen as BSHD
    ragged = np.concatenate([padded[s, :n] for s, n in enumerate(counts)])
    slots = np.arange(8)[::-1]
    step = Step(16, counts, counts, slots=slots)
    one = np.zeros((1, 2, 16, 8), np.float32)
    two = np.zeros((1, 16, 2, 8), np.float32).swapaxes(1, 2)  # [N, B, H, D]
    assert append(step, padded, one) == OK
    assert append(step, ragged, two) == OK
    assert (one == two).all()
    assert (one[0, :, 7] == ragged[0]).all()


@pytest.mark.parametrize("fmt", ["fp32", "fp16", "bf16"])
def test_read(fmt: str) -> None:
    rng = np.random.default_rng(2)
    blocks = rng.standard_normal((9, 2, 32, 24)).astype(DTYPES[fmt])
    row = np.array([5, 0, 8], np.int32)
    whole = blocks[row].swapaxes(1, 2).reshape(96, 2, 24)
    for start, stop in [(0, 96), (31, 33), (40, 40), (7, 90)]:
        out = np.full((stop - start, 2, 24), np.nan, np.float32)
        assert read(blocks, row, 3, start, stop, out) == OK
        assert (out == whole[start:stop].astype(np.float32)).all()
    out = np.zeros((4, 2, 24), np.float32)
    for start, stop in [(-1, 3), (3, 2), (95, 97)]:
        assert read(blocks, row, 3, start, stop, out) == RANGE
    row[1] = 9
    assert read(blocks, row, 3, 30, 34, out) == RANGE
    assert not out.any()


@pytest.mark.parametrize("swap", [False, True])
def test_copy(swap: bool) -> None:
    blocks = np.random.default_rng(3).standard_normal((6, 4, 32, 8), np.float32)
    if swap:
        blocks = np.ascontiguousarray(blocks.swapaxes(1, 2)).swapaxes(1, 2)
    before = blocks.copy()
    assert (
        lib.kv_copy_blocks(
            Step(32, [], [], copies=[[1, 4, 20], [2, 0, 32]]).plan, blocks_of(blocks)
        )
        == OK
    )
    assert (blocks[4, :, :20] == before[1, :, :20]).all()
    assert (blocks[4, :, 20:] == before[4, :, 20:]).all()
    assert (blocks[0] == before[2]).all()
    after = blocks.copy()
    for bad in ([1, 6, 1], [-1, 0, 1], [1, 2, 33], [1, 2, -1], [3, 3, 1]):
        assert (
            lib.kv_copy_blocks(Step(32, [], [], copies=[[0, 1, 4], bad]).plan, blocks_of(blocks))
            == RANGE
        )
    assert (blocks == after).all()


def test_blocks_init() -> None:
    blocks = Blocks()
    assert lib.kv_blocks_init(blocks, None, 2, 10, 3, 64, 128) == OK
    assert (blocks.token_stride, blocks.head_stride, blocks.block_stride) == (256, 16384, 49152)
    assert lib.kv_blocks_nbytes(blocks) == 491520
    for bad in [
        (3, 1, 1, 16, 8),
        (0, 0, 1, 16, 8),
        (0, 1, 0, 16, 8),
        (0, 1, 1, 24, 8),
        (0, 1, 1, 8, 8),
        (0, 1, 1, 16, 12),
        (0, 1, 1, 16, 1032),
        (0, 1, 1, 16, 0),
    ]:
        assert lib.kv_blocks_init(blocks, None, *bad) == VALUE
    big = 2**31 - 1
    assert lib.kv_blocks_init(blocks, None, 0, big, big, 2**30, 1024) == OVERFLOW
    assert lib.kv_blocks_init(None, None, 0, 1, 1, 16, 8) == NULL


@pytest.mark.parametrize("nbytes", [1, 100, 1 << 20, 2 << 20, (5 << 20) + 3])
def test_memory_is_aligned_and_zero(nbytes: int) -> None:
    memory = ct.c_void_p()
    assert lib.kv_memory_allocate(nbytes, memory) == OK
    assert memory.value is not None and memory.value % 64 == 0
    array = np.ctypeslib.as_array((ct.c_ubyte * nbytes).from_address(memory.value))
    assert not array.any()
    array[:] = 255
    lib.kv_memory_free(memory, nbytes)


def test_memory_refuses() -> None:
    memory = ct.c_void_p()
    assert lib.kv_memory_allocate(0, memory) == VALUE
    assert lib.kv_memory_allocate(2**64 - 1, memory) == OVERFLOW
    assert lib.kv_memory_allocate(1, None) == NULL
    lib.kv_memory_free(None, 64)


def good_blocks() -> np.ndarray:
    return np.zeros((4, 2, 16, 8), np.float32)


def changed(structure: ct.Structure, **fields: int) -> ct.Structure:
    other = type(structure).from_buffer_copy(structure)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


BAD_BLOCKS = [
    ({"data": None}, NULL),
    ({"format": 3}, VALUE),
    ({"format": -1}, VALUE),
    ({"num_blocks": 0}, VALUE),
    ({"num_heads": -1}, VALUE),
    ({"block_size": 24}, VALUE),
    ({"block_size": 8}, VALUE),
    ({"head_dim": 12}, VALUE),
    ({"head_dim": 2048}, VALUE),
    ({"block_stride": 16}, VALUE),
    ({"head_stride": -512}, VALUE),
    ({"token_stride": 31}, VALUE),
    ({"token_stride": 34}, VALUE),
    ({"block_stride": 2**62}, OVERFLOW),
]


@pytest.mark.parametrize(("fields", "status"), BAD_BLOCKS, ids=str)
def test_bad_blocks(fields: dict[str, int], status: int) -> None:
    array, rows = good_blocks(), np.ones((2, 2, 8), np.float32)
    step = Step(16, [2], [2], [[0]], slots=[0, 1])
    bad = changed(blocks_of(array), **fields)
    options = AttendOptions(ct.sizeof(AttendOptions), 1.0, 0)
    out = np.full((2, 2, 8), 3, np.float32)
    assert lib.kv_append(step.plan, rows_of(rows), bad) == status
    assert (
        lib.kv_attend(step.plan, rows_of(rows), bad, blocks_of(array), options, rows_of(out), None)
        == status
    )
    assert (
        lib.kv_attend(step.plan, rows_of(rows), blocks_of(array), bad, options, rows_of(out), None)
        == status
    )
    assert not array.any() and (out == 3).all()


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"data": None}, NULL),
        ({"dtype": 3}, VALUE),
        ({"num_heads": 0}, VALUE),
        ({"num_heads": 3}, VALUE),
        ({"head_dim": 16}, VALUE),
        ({"head_dim": 9}, VALUE),
        ({"padded_length": -1}, VALUE),
        ({"padded_length": 1}, RANGE),
        ({"token_stride": 2**61}, OVERFLOW),
        ({"head_stride": -(2**62)}, OVERFLOW),
    ],
    ids=str,
)
def test_bad_rows(fields: dict[str, int], status: int) -> None:
    array, rows = good_blocks(), np.ones((2, 2, 8), np.float32)
    step = Step(16, [2], [2], [[0]], slots=[0, 1])
    bad = changed(rows_of(rows), **fields)
    options = AttendOptions(ct.sizeof(AttendOptions), 1.0, 0)
    out = np.full((2, 2, 8), 3, np.float32)
    assert lib.kv_append(step.plan, bad, blocks_of(array)) == status
    for q, to in [(bad, rows_of(out)), (rows_of(rows), changed(rows_of(out), **fields))]:
        assert (
            lib.kv_attend(step.plan, q, blocks_of(array), blocks_of(array), options, to, None)
            == status
        )
    assert not array.any() and (out == 3).all()


@pytest.mark.parametrize("slots", [[0, 64], [-2, 0], [2**31 - 1, 0]])
def test_bad_slots(slots: list[int]) -> None:
    array, rows = good_blocks(), np.ones((2, 2, 8), np.float32)
    assert append(Step(16, [2], [2], slots=slots), rows, array) == RANGE
    assert not array.any()


@pytest.mark.parametrize(
    ("starts", "lengths", "row"),
    [
        ([1, 2], [2], [0]),
        ([0, 1], [2], [0]),
        ([0, 3, 2], [3, 3], [0]),
        ([0, -1, 2], [3, 3], [0]),
        ([0, 2], [1], [0]),
        ([0, 2], [2], [4]),
        ([0, 2], [2], [-2]),
        ([0, 2], [17], [0, 4]),
        ([0, 2], [-(2**31)], [0]),
    ],
    ids=str,
)
def test_bad_plans(starts: list[int], lengths: list[int], row: list[int]) -> None:
    array, rows = good_blocks(), np.ones((2, 2, 8), np.float32)
    step = Step(16, [2] + [0] * (len(lengths) - 1), lengths, [row] * len(lengths))
    step.query_starts[:] = starts
    out = np.full((2, 2, 8), 3, np.float32)
    assert attend(step, rows, array, array, 1.0, out) == RANGE
    assert (out == 3).all()


def test_released_blocks() -> None:
    """-1 stands for a block that is gone: it may be in a row, but not among what is read."""
    array, q = good_blocks(), np.ones((1, 2, 8), np.float32)
    array[2:] = 5
    step = Step(16, [1], [60], [[-1, -7, 2, 3]])
    out = np.full_like(q, 3)
    for window, status in [(0, RELEASED), (60, RELEASED), (45, RELEASED), (29, RANGE)]:
        assert attend(step, q, array, array, 1.0, out, window=window) == status
        assert (out == 3).all()
    assert attend(step, q, array, array, 1.0, out, window=28) == OK
    assert (out == 5).all()

    rows = np.full((30, 2, 8), 3, np.float32)
    row = np.array([-1, 1, 2], np.int32)
    assert read(array, row, 3, 15, 45, rows) == RELEASED
    assert (rows == 3).all()
    assert read(array, row, 3, 16, 46, rows) == OK
    assert (rows[16:] == 5).all()


@pytest.mark.parametrize("fmt", ["fp32", "fp16", "bf16"])
def test_v_may_view_k(fmt: str) -> None:
    rng = np.random.default_rng(3)
    k = rng.standard_normal((4, 2, 16, 24)).astype(DTYPES[fmt])
    v = np.ascontiguousarray(k[..., :16])
    q = rng.standard_normal((3, 4, 24)).astype(np.float32)
    step = Step(16, [3], [40], [[2, 0, 3]])
    outs = [np.zeros((3, 4, 16), np.float32) for _ in range(2)]
    for out, values in zip(outs, (k[..., :16], v), strict=True):
        assert attend(step, q, k, values, 0.2, out) == OK
    assert outs[0].tobytes() == outs[1].tobytes() and outs[0].any()


def test_bad_options() -> None:
    array, rows = good_blocks(), np.ones((2, 2, 8), np.float32)
    step = Step(16, [2], [2], [[0]])
    for options, status in [
        (None, NULL),
        (AttendOptions(8, 1.0, 0), VALUE),
        (AttendOptions(16, float("nan"), 0), VALUE),
        (AttendOptions(16, float("inf"), 0), VALUE),
    ]:
        assert (
            lib.kv_attend(
                step.plan,
                rows_of(rows),
                blocks_of(array),
                blocks_of(array),
                options,
                rows_of(rows),
                None,
            )
            == status
        )


F32, I32, I64, U8 = (np.dtype(name) for name in ("f4", "i4", "i8", "u1"))


def offsets_of(*values: int) -> np.ndarray:
    return np.array(values, I64)


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({"window": -1}, VALUE),
        ({"softcap": -1.0}, VALUE),
        ({"softcap": float("nan")}, VALUE),
        ({"softcap": float("inf")}, VALUE),
        ({"alibi_slopes": np.array([1, np.nan], F32)}, VALUE),
        ({"sinks": np.array([np.inf, 1], F32)}, VALUE),
        ({"positions": np.array([0, -1], I32)}, RANGE),
        ({"mask": np.ones(2, U8), "mask_size": 2}, NULL),
        ({"mask": np.ones(2, U8), "mask_size": -1, "mask_offsets": offsets_of(0)}, VALUE),
        ({"mask": np.ones(2, U8), "mask_size": 1, "mask_offsets": offsets_of(0)}, RANGE),
        ({"mask": np.ones(2, U8), "mask_size": 2, "mask_offsets": offsets_of(1)}, RANGE),
        ({"mask": np.ones(2, U8), "mask_size": 2, "mask_offsets": offsets_of(-2)}, RANGE),
        ({"mask": np.ones(2, U8), "mask_size": 2, "mask_offsets": offsets_of(2**62)}, RANGE),
        ({"mask": np.ones(2, U8), "mask_size": 2, "mask_offsets": offsets_of(0)}, OK),
        ({"mask": np.ones(2, U8), "mask_size": 0, "mask_offsets": offsets_of(-1)}, OK),
    ],
    ids=str,
)
def test_options_are_checked(given: dict[str, float | np.ndarray], status: int) -> None:
    array, rows = good_blocks(), np.ones((2, 2, 8), np.float32)
    step = Step(16, [2], [2], [[0]])
    out = np.full((2, 2, 8), 3, np.float32)
    assert attend(step, rows, array, array, 1.0, out, **given) == status
    assert (out == 3).all() == (status != OK)


def test_options_of_an_older_caller_are_off() -> None:
    """A struct that ends earlier: what lies behind its end is not looked at."""
    array, rows = good_blocks(), np.ones((2, 2, 8), np.float32)
    array[0, :, :2] = np.arange(16).reshape(2, 8) / 16
    step = Step(16, [2], [2], [[0]])
    plain, old, new = (np.empty((2, 2, 8), np.float32) for _ in range(3))
    sinks = np.ones(2, np.float32)
    assert attend(step, rows, array, array, 1.0, plain) == OK
    assert attend(step, rows, array, array, 1.0, old, struct_size=16, window=1, sinks=sinks) == OK
    assert attend(step, rows, array, array, 1.0, new, window=1, sinks=sinks) == OK
    assert old.tobytes() == plain.tobytes() != new.tobytes()


def test_fewer_keys_than_queries_only_without_causality() -> None:
    array, rows = good_blocks(), np.ones((2, 2, 8), np.float32)
    out = np.full((2, 2, 8), 3, np.float32)
    for length, row in ((1, [0]), (0, [])):
        step = Step(16, [2], [length], [row])
        assert attend(step, rows, array, array, 1.0, out) == RANGE
        assert (out == 3).all()
    assert attend(Step(16, [2], [0], [[]]), rows, array, array, 1.0, out, non_causal=1) == OK
    assert (out == 0).all()
    step = Step(16, [2], [-1], [[0]])
    assert attend(step, rows, array, array, 1.0, out, non_causal=1) == RANGE


def test_nothing_to_do() -> None:
    array = good_blocks()
    rows = np.zeros((0, 2, 8), np.float32)
    for step in (Step(16, [], [], []), Step(16, [0, 0], [5, 0], [[0], []])):
        assert append(step, rows, array) == OK
        assert attend(step, rows, array, array, 1.0, rows) == OK
