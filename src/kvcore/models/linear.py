"""The linear layers of a decoder, on the CPU and over the arrays of any other module."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from kvcore import ops
from kvcore.models.parallel import MANY_ROWS, cut, for_each

# Up to this many rows `ops.linear` is faster than NumPy's BLAS, which packs the whole weight
# matrix once per call, however few rows use it.
FEW_ROWS = 16


class Linear(Protocol):
    """Linear layers over arrays of one module."""

    def apply(self, x: Any, weight: Any, bias: Any, out: Any) -> None:
        """Writes x @ weight.T + bias to `out`, which is another array.

        Args:
            x: [R, K].
            weight: [N, K].
            bias: [N] or None.
            out: [R, N].
        """

    def apply_by_head(self, x: Any, weights: Any, out: Any) -> None:
        """Writes x[:, h] @ weights[h].T to out[:, h], for every head h.

        Args:
            x: [R, H, K].
            weights: [H, N, K].
            out: [R, H, N].
        """


class HostLinear:
    """On the CPU: kvcore's kernel for few rows, NumPy's BLAS for more.

    From MANY_ROWS on threads share the outputs, and want `one_blas_thread` around.
    """

    def apply(self, x: Any, weight: Any, bias: Any, out: Any) -> None:
        if x.shape[0] <= FEW_ROWS:
            ops.linear(x, weight, bias, out=out)
            return

        def multiply(outputs: slice) -> None:
            np.matmul(x, weight[outputs].T, out=out[:, outputs])
            if bias is not None:
                out[:, outputs] += bias[outputs]

        # Outputs rather than rows, so that no two threads pack the same weights.
        for_each(multiply, cut(weight.shape[0], 1) if x.shape[0] >= MANY_ROWS else [slice(None)])

    def apply_by_head(self, x: Any, weights: Any, out: Any) -> None:
        for head, weight in enumerate(weights):
            self.apply(x[:, head], weight, None, out[:, head])


class ArrayLinear:
    """By the matrix product of an array module, as CuPy's by cuBLAS.

    Args:
        xp: the array module.
    """

    def __init__(self, xp: Any) -> None:
        self._xp = xp

    def apply(self, x: Any, weight: Any, bias: Any, out: Any) -> None:
        self._xp.matmul(x, weight.T, out=out)
        if bias is not None:
            out += bias

    def apply_by_head(self, x: Any, weights: Any, out: Any) -> None:
        # The weights come first, as they lie: as a right factor they would be copied each time.
        product = self._xp.matmul(weights, x.transpose(1, 2, 0))
        out[...] = product.transpose(2, 0, 1)
