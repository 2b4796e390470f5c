"""The small operations of a decoder layer, on arrays of any array module `xp`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kvcore import ops

# (x [R, K], weight [N, K], bias [N] or None, out [R, N]): writes x @ weight.T + bias to out.
Linear = Callable[[Any, Any, Any, Any], None]

# Up to this many rows `ops.linear` is faster than NumPy's BLAS, which packs the whole weight
# matrix once per call, however few rows use it.
FEW_ROWS = 16


def cpu_linear(x: Any, weight: Any, bias: Any, out: Any) -> None:
    """The linear layer on the CPU: kvcore's kernel for few rows, NumPy's BLAS for many."""
    if x.shape[0] <= FEW_ROWS:
        ops.linear(x, weight, bias, out=out)
        return
    np.matmul(x, weight.T, out=out)
    if bias is not None:
        out += bias


def rms_norm(xp: Any, x: Any, weight: Any, eps: float, out: Any) -> None:
    """Writes x / sqrt(mean(x^2) + eps) * weight over the last axis to `out`, which may be x."""
    mean = _dot_rows(xp, x)
    mean /= x.shape[-1]
    mean += eps
    xp.sqrt(mean, out=mean)
    xp.divide(x, mean[..., None], out=out)
    out *= weight


def _dot_rows(xp: Any, x: Any) -> Any:
    """The sum of squares over the last axis, in an order that the rows beside it do not change."""
    # vecdot is new in NumPy 2; on a few rows it takes a quarter of the time of einsum.
    if hasattr(xp, "vecdot"):
        return xp.vecdot(x, x)
    return xp.einsum("...i,...i->...", x, x)


def swiglu(xp: Any, gate: Any, up: Any, out: Any) -> None:
    """Writes silu(gate) * up to `out`. Where exp may overflow the caller silences the warning."""
    # silu(g) = g / (1 + exp(-g)); an exp that overflows gives the right limit, 0.
    xp.negative(gate, out=out)
    xp.exp(out, out=out)
    out += 1.0
    xp.divide(gate, out, out=out)
    out *= up
