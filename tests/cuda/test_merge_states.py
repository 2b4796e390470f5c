"""kernels/merge_states.cu against float64."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda_emulator.runtime import EmulatedRuntime
from kvcore_gpu.launcher import Launcher
from kvcore_gpu.params import MergeParams

F32 = NDArray[np.float32]


def merge(runtime: EmulatedRuntime, outs: F32, lses: F32) -> tuple[F32, F32]:
    num_partials, num_rows, head_dim = outs.shape
    out = runtime.empty((num_rows, head_dim), np.float32)
    lse = runtime.empty((num_rows,), np.float32)
    outs, lses = runtime.as_array(outs, "outs"), runtime.as_array(lses, "lses")
    kernel = Launcher(runtime).kernel("merge_states.cu", "merge_states", MergeParams)
    kernel.params.outs, kernel.params.lses = runtime.address(outs), runtime.address(lses)
    kernel.params.out, kernel.params.lse = runtime.address(out), runtime.address(lse)
    kernel.params.num_rows, kernel.params.num_partials = num_rows, num_partials
    kernel.params.head_dim = head_dim
    kernel.launch((-(-num_rows // 4), 1, 1), (128, 1, 1))
    return out, lse


@pytest.mark.parametrize(
    ("num_partials", "num_rows", "head_dim"), [(1, 1, 8), (3, 9, 64), (5, 7, 40), (2, 4, 512)]
)
def test_merges_as_float64_does(
    checked: EmulatedRuntime, num_partials: int, num_rows: int, head_dim: int
) -> None:
    rng = np.random.default_rng(head_dim)
    outs = rng.standard_normal((num_partials, num_rows, head_dim)).astype(np.float32)
    lses = (4 * rng.standard_normal((num_partials, num_rows))).astype(np.float32)
    outs.flags.writeable = lses.flags.writeable = False
    out, lse = merge(checked, outs, lses)
    weights = np.exp(lses.astype(float) - lses.max(axis=0))
    expected = (weights[..., None] * outs).sum(axis=0) / weights.sum(axis=0)[:, None]
    assert np.all(np.abs(out - expected) <= 1e-6 * np.abs(outs).max(axis=0))
    exact = lses.max(axis=0) + np.log(weights.sum(axis=0))
    np.testing.assert_allclose(lse, exact, rtol=2**-23, atol=1e-6)


def test_partials_that_saw_nothing_take_no_part(runtime: EmulatedRuntime) -> None:
    outs = np.full((2, 3, 8), np.nan, np.float32)
    lses = np.full((2, 3), -np.inf, np.float32)
    outs[1, 0], lses[1, 0] = 3, -200
    outs[0, 1], lses[0, 1] = np.arange(8), 5
    out, lse = merge(runtime, outs, lses)
    np.testing.assert_array_equal(out, [np.full(8, 3), np.arange(8), np.zeros(8)])
    np.testing.assert_array_equal(lse, [-200, 5, -np.inf])


def test_a_nan_stays_in_its_row(runtime: EmulatedRuntime) -> None:
    outs, lses = np.ones((2, 2, 8), np.float32), np.zeros((2, 2), np.float32)
    lses[:, 1] = np.nan
    out, lse = merge(runtime, outs, lses)
    assert np.all(out[0] == 1) and np.isfinite(lse[0])
    assert np.isnan(out[1]).all() and np.isnan(lse[1])
