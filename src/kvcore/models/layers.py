"""The small operations of a decoder layer, on arrays of any array module `xp`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from kvcore.models.config import Activation, ClampedSwiglu
from kvcore.models.device import Device
from kvcore.models.parallel import MANY_ROWS, cut, for_each


class Rows:
    """R rows of one forward call: how arrays for them are made and work on them is done.

    Attributes:
        device: where they lie.
        xp: its array module.
        count: R.
    """

    def __init__(self, device: Device, count: int) -> None:
        self.device = device
        self.xp = device.xp
        self.count = count
        self.linear = device.linear.apply
        self.linear_by_head = device.linear.apply_by_head
        self._parts = cut(count, MANY_ROWS // 2 if device.is_host else count)

    def empty(self, *shape: int) -> Any:
        """An unfilled float32 array [R, *shape]."""
        return self.xp.empty((self.count, *shape), self.xp.float32)

    def each(self, work: Callable[[slice], None]) -> None:
        """Does `work` for parts of the rows, shared among threads."""
        for_each(work, self._parts)


def rms_norm(xp: Any, x: Any, weight: Any, eps: float, out: Any) -> None:
    """Writes x / sqrt(mean(x^2) + eps) * weight over the last axis to `out`, which may be x."""
    mean = _dot_rows(xp, x)
    mean /= x.shape[-1]
    mean += eps
    xp.sqrt(mean, out=mean)
    xp.divide(x, mean[..., None], out=out)
    out *= weight


def layer_norm(xp: Any, x: Any, weight: Any, eps: float, out: Any) -> None:
    """Writes (x - mean) / sqrt(variance + eps) * weight[0] + weight[1] to `out`, which may be x."""
    xp.subtract(x, xp.mean(x, axis=-1, keepdims=True), out=out)
    rms_norm(xp, out, weight[0], eps, out)
    out += weight[1]


NORMS = {"rms": rms_norm, "layer": layer_norm}


def _dot_rows(xp: Any, x: Any) -> Any:
    """The sum of squares over the last axis, in an order that the rows beside it do not change."""
    if xp is not np:
        return xp.square(x).sum(axis=-1)
    # vecdot is new in NumPy 2; on a few rows it takes a quarter of the time of einsum.
    if hasattr(np, "vecdot"):
        return np.vecdot(x, x)
    return np.einsum("...i,...i->...", x, x)


def activate(xp: Any, activation: Activation, x: Any, out: Any) -> None:
    """Writes activation(x) to `out`, which is another array: x * sigmoid(y) for some y of x."""
    match activation:
        case "silu":
            xp.negative(x, out=out)
        case "gelu_tanh":
            # (1 + tanh(z)) / 2 = sigmoid(2 z), z = sqrt(2 / pi) * (x + 0.044715 x^3).
            xp.multiply(x, x, out=out)
            out *= -2 * math.sqrt(2 / math.pi) * 0.044715
            out -= 2 * math.sqrt(2 / math.pi)
            out *= x
        case ClampedSwiglu(alpha=alpha):
            xp.multiply(x, -alpha, out=out)
    # An exp that overflows gives the right limit, 0.
    with np.errstate(over="ignore"):
        xp.exp(out, out=out)
    out += 1.0
    xp.divide(x, out, out=out)


def gated(xp: Any, activation: Activation, gate: Any, up: Any, out: Any) -> None:
    """Writes activation(gate) * up to `out`; gate and up are scratch."""
    if isinstance(activation, ClampedSwiglu):
        xp.minimum(gate, activation.limit, out=gate)
        xp.clip(up, -activation.limit, activation.limit, out=up)
        up += 1.0
    activate(xp, activation, gate, out)
    out *= up


def softcap(xp: Any, x: Any, cap: float) -> None:
    """Replaces x by cap * tanh(x / cap)."""
    x /= cap
    xp.tanh(x, out=x)
    x *= cap
