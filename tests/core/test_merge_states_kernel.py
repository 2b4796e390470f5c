"""Joining partial attention results."""

from __future__ import annotations

import numpy as np
import pytest

from core.library import ISAS, NULL, OK, VALUE, lib, machine


def merge(outs: np.ndarray, lses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    out = np.full(outs.shape[1:], 7, np.float32)
    lse = np.full(lses.shape[1:], 7, np.float32)
    assert (
        lib.kv_merge_states(
            outs.ctypes.data, lses.ctypes.data, *outs.shape, out.ctypes.data, lse.ctypes.data
        )
        == OK
    )
    return out, lse


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", [8, 24, 64, 136])
def test_matches_float64(isa: str, dim: int) -> None:
    rng = np.random.default_rng(dim)
    outs = rng.standard_normal((9, 400, dim), np.float32)
    lses = (5 * rng.standard_normal((9, 400))).astype(np.float32)
    with machine(isa):
        out, lse = merge(outs, lses)
    w = np.exp(lses - lses.max(0)).astype(np.float64)
    exact = (w[..., None] * outs).sum(0) / w.sum(0)[:, None]
    assert np.abs(out - exact).max() <= 1e-6 * np.abs(outs).max()
    exact_lse = lses.max(0) + np.log(w.sum(0))
    assert (np.abs(lse - exact_lse) <= 2e-7 + 2.0**-23 * np.abs(exact_lse)).all()
    with machine(isa, 3):
        assert merge(outs, lses)[0].tobytes() == out.tobytes()


@pytest.mark.parametrize("isa", ISAS)
def test_empty_partials_are_neutral(isa: str) -> None:
    rng = np.random.default_rng(0)
    outs = rng.standard_normal((3, 4, 16), np.float32)
    lses = rng.standard_normal((3, 4)).astype(np.float32)
    lses[1] = -np.inf
    outs[1] = np.nan
    lses[:, 3] = -np.inf
    with machine(isa):
        out, lse = merge(outs, lses)
        two, two_lse = merge(np.ascontiguousarray(outs[::2]), np.ascontiguousarray(lses[::2]))
        one, one_lse = merge(outs[:1], lses[:1])
    assert out.tobytes() == two.tobytes() and lse.tobytes() == two_lse.tobytes()
    assert not out[3].any() and np.isneginf(lse[3])
    assert one[:3].tobytes() == outs[0, :3].tobytes()
    assert one_lse[:3].tobytes() == lses[0, :3].tobytes()


@pytest.mark.parametrize("isa", ISAS)
def test_nan_marks_its_row(isa: str) -> None:
    outs = np.ones((2, 3, 8), np.float32)
    lses = np.zeros((2, 3), np.float32)
    lses[0, 1] = np.nan
    with machine(isa):
        out, lse = merge(outs, lses)
    assert np.isnan(out[1]).all() and np.isnan(lse[1])
    assert (out[[0, 2]] == 1).all()


def test_rejects_bad_arguments() -> None:
    x = np.zeros(64, np.float32)
    p = x.ctypes.data
    for args, status in [
        ((None, p, 1, 1, 8, p, p), NULL),
        ((p, None, 1, 1, 8, p, p), NULL),
        ((p, p, 1, 1, 8, None, p), NULL),
        ((p, p, 0, 1, 8, p, p), VALUE),
        ((p, p, 1, -1, 8, p, p), VALUE),
        ((p, p, 1, 1, 9, p, p), VALUE),
    ]:
        assert lib.kv_merge_states(*args) == status
