"""The small operations of a decoder layer, on arrays of any array module `xp`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kvcore import ops
from kvcore.models.parallel import cut, for_each

# (x [R, K], weight [N, K], bias [N] or None, out [R, N]): writes x @ weight.T + bias to out.
Linear = Callable[[Any, Any, Any, Any], None]

# Up to this many rows `ops.linear` is faster than NumPy's BLAS, which packs the whole weight
# matrix once per call, however few rows use it.
FEW_ROWS = 16

# From this many rows on `parallel` shares all work; below, its hand-overs cost more than they save.
MANY_ROWS = 256


def cpu_linear(x: Any, weight: Any, bias: Any, out: Any) -> None:
    """The linear layer on the CPU: kvcore's kernel for few rows, NumPy's BLAS for more.

    From MANY_ROWS on threads share the outputs, and want `one_blas_thread` around.
    """
    if x.shape[0] <= FEW_ROWS:
        ops.linear(x, weight, bias, out=out)
        return

    def multiply(outputs: slice) -> None:
        np.matmul(x, weight[outputs].T, out=out[:, outputs])
        if bias is not None:
            out[:, outputs] += bias[outputs]

    # Outputs rather than rows, so that no two threads pack the same weights.
    for_each(multiply, cut(weight.shape[0], 1) if x.shape[0] >= MANY_ROWS else [slice(None)])


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
    """Writes silu(gate) * up to `out`."""
    # silu(g) = g / (1 + exp(-g)); an exp that overflows gives the right limit, 0.
    xp.negative(gate, out=out)
    with np.errstate(over="ignore"):
        xp.exp(out, out=out)
    out += 1.0
    xp.divide(gate, out, out=out)
    out *= up
