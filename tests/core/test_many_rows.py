"""Many query rows at once against the same rows one token at a time: other code, the same bits."""

from __future__ import annotations

import numpy as np
import pytest

from core.library import ISAS, OK, Step, attend, machine
from core.test_attend_kernels import Case

#: Rows of a tile and of a block of scores, and what a call needs to have many (kernels.h).
TILE, BLOCK, MANY = 240, 48, 16


def together(case: Case, **options) -> tuple[np.ndarray, np.ndarray]:
    """All new tokens; with `exact`, as bf16 may otherwise have bits of its own for many tokens."""
    out = np.full((*case.q.shape[:2], case.v.shape[3]), 7, np.float32)
    lse = np.full(case.q.shape[:2], 7, np.float32)
    assert attend(case.step, case.q, case.k, case.v, case.scale, out, lse, exact=1, **options) == OK
    return out, lse


def alone(case: Case, t: int, **options) -> tuple[np.ndarray, np.ndarray]:
    """New token t of the only sequence, as if the later ones were not there yet."""
    [(stored, _)] = case.lengths
    out = np.full((1, case.q.shape[1], case.v.shape[3]), 5, np.float32)
    lse = np.full((1, case.q.shape[1]), 5, np.float32)
    step = Step(case.block_size, [1], [stored + t + 1], case.rows)
    q = case.q[t : t + 1]
    assert attend(step, q, case.k, case.v, case.scale, out, lse, **options) == OK
    return out, lse


def assert_the_same(case: Case, tokens, **options) -> None:
    """Options that keep their meaning for one token alone."""
    assert case.group < MANY <= case.q.shape[0] * case.group
    out, lse = together(case, **options)
    for t in tokens:
        one, one_lse = alone(case, t, **options)
        assert one.tobytes() == out[t : t + 1].tobytes(), t
        assert one_lse.tobytes() == lse[t : t + 1].tobytes(), t


def with_format(fmt: str, stored: int, new: int, **shape) -> Case:
    return Case([(stored, new)], heads=1, k_format=fmt, v_format=fmt, **shape)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    "dims",
    [(8, 8), (16, 64), (24, 40), (40, 72), (64, 80), (96, 24), (128, 128), (256, 256), (576, 512)],
    ids=lambda dims: f"{dims[0]}-{dims[1]}",
)
def test_head_dims(isa: str, fmt: str, dims: tuple[int, int]) -> None:
    case = with_format(fmt, 245, 30, group=3, dim=dims[0], dim_v=dims[1], block_size=32)
    with machine(isa):
        assert_the_same(case, range(30))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [MANY, 17, 31, 32, 33, 47, BLOCK, 49, 239, TILE, 241, 256])
def test_rows_at_the_edges_of_tiles(isa: str, rows: int) -> None:
    case = with_format("fp32", 250, rows, dim=32)
    with machine(isa):
        assert_the_same(case, {0, 1, 5, 6, rows // 2, rows - 2, rows - 1})


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block_size", [16, 64, 4096])
def test_block_sizes_and_split_edges(isa: str, block_size: int) -> None:
    case = with_format("bf16", 0, 530, group=2, dim=48, block_size=block_size)
    with machine(isa):
        assert_the_same(case, [0, 15, 16, 31, 254, 255, 256, 257, 300, 511, 512, 529])


OPTIONS = {
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": np.array([0.5, 0.0, 0.03125], np.float32)},
    "window": {"window": 37},
    "long window": {"window": 300},
    "sinks": {"sinks": np.array([0.3, -2.0, 4.0], np.float32)},
    "all": {
        "softcap": 2.0,
        "alibi_slopes": np.array([0.5, 0.25, 0.125], np.float32),
        "window": 150,
        "sinks": np.array([1.0, 0.0, -1.0], np.float32),
    },
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", ["fp32", "fp16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(isa: str, fmt: str, name: str) -> None:
    case = with_format(fmt, 200, 400, group=3, dim=40, block_size=16)
    with machine(isa):
        assert_the_same(case, range(0, 400, 13), **OPTIONS[name])


def packed(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of bits, least first, each on its own bytes; and where they start."""
    return np.packbits(mask, axis=1, bitorder="little"), np.zeros(1, np.int64)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["scattered", "stretches", "prefix"])
def test_masks_and_what_they_hide(isa: str, fmt: str, kind: str) -> None:
    """NaN in the keys and values that nobody sees, and rows that see nothing."""
    stored, new = 300, 120
    case = with_format(fmt, stored, new, group=2, dim=56, dim_v=48)
    rng = np.random.default_rng(3)
    if kind == "scattered":
        mask = rng.random((new, stored + new)) < 0.4
    elif kind == "stretches":
        mask = np.repeat(rng.random((new // 4, (stored + new) // 20)) < 0.5, 4, 0).repeat(20, 1)
    else:
        mask = np.arange(stored + new) <= np.maximum(310, stored + np.arange(new))[:, None]
    unseen = [3, 64, 65, 66, 67, 200, 419]
    mask[:, unseen] = False
    mask[[7, 50]] = False
    for j in unseen:
        block, offset = case.rows[0][j // case.block_size], j % case.block_size
        case.k[block, :, offset] = np.nan
        case.v[block, :, offset] = np.nan
    bits, start = packed(mask)
    with machine(isa):
        given = {"mask": bits, "mask_size": bits.size, "mask_offsets": start}
        out, lse = together(case, **given)
        assert not np.isnan(out).any()
        assert not out[[7, 50]].any() and np.isneginf(lse[[7, 50]]).all()
        for t in range(0, new, 7):
            row = np.ascontiguousarray(bits[t : t + 1])
            step = Step(case.block_size, [1], [stored + new], case.rows)
            one, one_lse = np.empty_like(out[:1]), np.empty_like(lse[:1])
            given = {"mask": row, "mask_size": row.size, "mask_offsets": start}
            q = case.q[t : t + 1]
            assert attend(step, q, case.k, case.v, case.scale, one, one_lse, **given) == OK
            assert one.tobytes() == out[t : t + 1].tobytes()
            assert one_lse.tobytes() == lse[t : t + 1].tobytes()


@pytest.mark.parametrize("isa", ISAS)
def test_a_later_token_cannot_reach_a_row(isa: str) -> None:
    """Tiles reach beyond what their first rows see: NaN and infinity there stay out."""
    case = with_format("fp32", 100, 130, dim=64)
    with machine(isa):
        clean, _ = together(case)
        for t, value in ((60, np.nan), (129, np.inf)):
            j = 100 + t
            case.k[case.rows[0][j // 16], 0, j % 16] = value
            case.v[case.rows[0][j // 16], 0, j % 16] = value
        out, _ = together(case)
    assert out[:60].tobytes() == clean[:60].tobytes()
    assert np.isnan(out[60:]).all()
