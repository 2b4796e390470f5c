"""Linear layers, norms and activations against float64."""

from __future__ import annotations

import numpy as np
import pytest

from kvcore.models.config import ClampedSwiglu
from kvcore.models.layers import activate, gated, layer_norm, rms_norm, softcap
from kvcore.models.linear import FEW_ROWS, ArrayLinear, HostLinear, Linear

GATES = np.array([[-200.0, -20.0, -1.0, -0.01, 0.0, 0.5, 1.0, 20.0, 200.0]], np.float32)


LINEAR = [HostLinear(), ArrayLinear(np)]


@pytest.mark.parametrize("linear", LINEAR, ids=["host", "array"])
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 40])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_on_both_sides_of_the_row_limit(linear: Linear, rows: int, biased: bool) -> None:
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, 33), np.float32)
    weight = rng.standard_normal((21, 33), np.float32)
    bias = rng.standard_normal(21, np.float32) if biased else None
    out = np.full((rows, 21), np.nan, np.float32)
    linear.apply(x, weight, bias, out)
    expected = x.astype(np.float64) @ weight.T.astype(np.float64) + (0 if bias is None else bias)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("linear", LINEAR, ids=["host", "array"])
@pytest.mark.parametrize("rows", [1, FEW_ROWS + 1])
def test_linear_by_head_reads_and_writes_parts_of_rows(linear: Linear, rows: int) -> None:
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, 3, 20), np.float32)
    weights = rng.standard_normal((3, 8, 12), np.float32)
    out = np.full((rows, 3, 10), np.nan, np.float32)
    linear.apply_by_head(x[..., 4:16], weights, out[..., :8])
    expected = np.einsum("rhk,hnk->rhn", x[..., 4:16].astype(np.float64), weights)
    np.testing.assert_allclose(out[..., :8], expected, rtol=1e-5, atol=1e-5)
    assert np.isnan(out[..., 8:]).all()


def test_norms() -> None:
    rng = np.random.default_rng(8)
    x = (100 * rng.standard_normal((5, 3, 40)) + 20).astype(np.float32)
    weight = rng.standard_normal((2, 40), np.float32)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-3) * weight[0]
    out = x.copy()
    rms_norm(np, out, weight[0], 1e-3, out)
    np.testing.assert_allclose(out, expected, rtol=1e-6)

    centered = wide - wide.mean(-1, keepdims=True)
    deviation = np.sqrt(wide.var(-1, keepdims=True) + 1e-3)
    out = x.copy()
    layer_norm(np, out, weight, 1e-3, out)
    np.testing.assert_allclose(out, centered / deviation * weight[0] + weight[1], atol=2e-6)


def test_swiglu() -> None:
    up, out = np.full_like(GATES, 3.0), np.empty_like(GATES)
    gated(np, "silu", GATES.copy(), up, out)
    with np.errstate(over="ignore"):
        expected = 3 * GATES / (1 + np.exp(-GATES.astype(np.float64)))
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-30)


def test_gelu_by_tanh() -> None:
    out = np.empty_like(GATES)
    activate(np, "gelu_tanh", GATES, out)
    x = GATES.astype(np.float64)
    expected = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=1e-12)


def test_clamped_swiglu() -> None:
    up = np.linspace(-9, 9, GATES.size, dtype=np.float32)[None]
    out = np.empty_like(GATES)
    gated(np, ClampedSwiglu(1.702, 7.0), GATES.copy(), up.copy(), out)
    gate = np.minimum(GATES.astype(np.float64), 7)
    expected = gate / (1 + np.exp(-1.702 * gate)) * (np.clip(up, -7, 7) + 1)
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=1e-30)


def test_softcap() -> None:
    x = GATES.copy()
    softcap(np, x, 30.0)
    np.testing.assert_allclose(x, 30 * np.tanh(GATES.astype(np.float64) / 30), rtol=1e-6)
