"""The matrix product for few rows."""

from __future__ import annotations

import numpy as np
import pytest

from core.library import ISAS, NULL, OK, VALUE, lib, machine

LANES = {"scalar": 4, "neon": 4, "avx2": 8, "avx512": 16, "avx512_vnni": 16, "avx512_bf16": 16}


def linear(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    y = np.full((x.shape[0], w.shape[0]), np.nan, np.float32)
    status = lib.kv_linear(
        x.ctypes.data,
        x.strides[0] // 4,
        w.ctypes.data,
        w.strides[0] // 4,
        None if bias is None else bias.ctypes.data,
        y.ctypes.data,
        y.strides[0] // 4,
        x.shape[0],
        w.shape[0],
        w.shape[1],
    )
    assert status == OK
    return y


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(1, 1), (7, 5), (8, 16), (40, 576), (33, 531), (129, 1536)]
)
def test_matches_float64_within_its_bound(isa: str, outputs: int, inputs: int) -> None:
    rng = np.random.default_rng(outputs)
    w = rng.standard_normal((outputs, inputs), np.float32)
    bias = rng.standard_normal(outputs, np.float32)
    for rows in (1, 2, 3, 4, 7, 16, 19):
        x = rng.standard_normal((rows, inputs), np.float32)
        with machine(isa):
            y = linear(x, w, bias)
        exact = x.astype(np.float64) @ w.T.astype(np.float64)
        size = np.abs(x).astype(np.float64) @ np.abs(w).T.astype(np.float64)
        bound = (inputs / LANES[isa] + 6) * 2.0**-24 * size + 2.0**-24 * np.abs(exact + bias)
        assert (np.abs(y - (exact + bias)) <= bound).all()


@pytest.mark.parametrize("isa", ISAS)
def test_bits_depend_on_the_row_alone(isa: str) -> None:
    rng = np.random.default_rng(1)
    w = rng.standard_normal((203, 700), np.float32)
    x = rng.standard_normal((37, 700), np.float32)
    with machine(isa):
        y = linear(x, w)
        for rows in (1, 2, 3, 5, 8, 16):
            assert linear(x[:rows], w).tobytes() == y[:rows].tobytes()
            assert linear(x[5 : 5 + rows], w).tobytes() == y[5 : 5 + rows].tobytes()
    for threads in (2, 3, 7):
        with machine(isa, threads):
            assert linear(x, w).tobytes() == y.tobytes()


@pytest.mark.parametrize("isa", ISAS)
def test_reads_nothing_outside_its_rows(isa: str) -> None:
    rng = np.random.default_rng(2)
    x = np.full((3, 40), np.nan, np.float32)
    w = np.full((19, 50), np.nan, np.float32)
    x[:, :37] = rng.standard_normal((3, 37))
    w[:, :37] = rng.standard_normal((19, 37))
    with machine(isa):
        y = linear(x[:, :37], w[:, :37])
        dense = linear(np.ascontiguousarray(x[:, :37]), np.ascontiguousarray(w[:, :37]))
    assert np.isfinite(y).all()
    assert y.tobytes() == dense.tobytes()


def test_rejects_bad_arguments() -> None:
    x = np.zeros((4, 8), np.float32)
    p = x.ctypes.data
    good = [p, 8, p, 8, None, p, 8, 2, 4, 8]
    for place, value, status in [
        (0, None, NULL),
        (2, None, NULL),
        (5, None, NULL),
        (1, 7, VALUE),
        (3, 7, VALUE),
        (6, 3, VALUE),
        (7, -1, VALUE),
        (8, 0, VALUE),
        (9, 0, VALUE),
        (3, 2**62, VALUE),
    ]:
        bad = list(good)
        bad[place] = value
        assert lib.kv_linear(*bad) == status
    assert not x.any()
