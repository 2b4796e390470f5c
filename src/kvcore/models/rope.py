"""Rotary position embedding: frequencies, their published rescalings, and the rotation.

Heads are rotated in the split-half order of Hugging Face checkpoints: element i of the first half
is paired with element i of the second half.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcore.errors import InvalidArgument


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (Chen et al., 2023): every frequency is divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """The rescaling of Llama 3.1 (Meta, 2024).

    Wavelengths longer than original_context / low_freq_factor are stretched by `factor`, those
    shorter than original_context / high_freq_factor are kept, and those between are blended.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., 2023), "NTK-by-parts" with an attention temperature.

    `beta_fast` and `beta_slow` are rotations over the original context: dimensions that turn more
    often than beta_fast are kept, those that turn less often than beta_slow are divided by
    `factor`, those between are blended. `attention_factor` multiplies cos and sin.
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class FrequencyFactors:
    """One divisor per frequency, as GGUF's `rope_freqs.weight` or LongRoPE have them.

    `attention_factor` multiplies cos and sin.
    """

    factors: tuple[float, ...]
    attention_factor: float = 1.0


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | FrequencyFactors


@dataclass(frozen=True)
class Rope:
    """A rotary embedding of the first `dim` elements of each head, with base `theta`."""

    dim: int
    theta: float
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        try:
            with np.errstate(all="ignore"):
                inv_freq, factor = inverse_frequencies(self)
        except (ArithmeticError, ValueError) as error:
            raise InvalidArgument(f"rope: computable frequencies expected of {self}") from error
        if not (np.isfinite(inv_freq).all() and (inv_freq > 0).all() and 0 < factor < math.inf):
            raise InvalidArgument(f"rope: positive, finite frequencies expected of {self}")


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """What cos and sin are multiplied with: YaRN's temperature, or DeepSeek's ratio of two."""
    if mscale and mscale_all_dim:
        return yarn_temperature(factor, mscale) / yarn_temperature(factor, mscale_all_dim)
    return yarn_temperature(factor)


def yarn_temperature(factor: float, mscale: float = 1.0) -> float:
    """0.1 mscale ln(factor) + 1, or 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def inverse_frequencies(rope: Rope) -> tuple[npt.NDArray[np.float64], float]:
    """Angles per position, float64 [dim / 2], and the factor that multiplies cos and sin."""
    inv_freq = np.power(rope.theta, -np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)
    match rope.scaling:
        case None:
            return inv_freq, 1.0
        case LinearScaling(factor=factor):
            return inv_freq / factor, 1.0
        case FrequencyFactors(factors=factors, attention_factor=attention_factor):
            return inv_freq / np.asarray(factors, np.float64), attention_factor
        case Llama3Scaling() as scaling:
            return _llama3(inv_freq, scaling), 1.0
        case YarnScaling() as scaling:
            return _yarn(inv_freq, rope, scaling), scaling.attention_factor


def _llama3(inv_freq: npt.NDArray[np.float64], scaling: Llama3Scaling) -> npt.NDArray[np.float64]:
    rotations = scaling.original_context * inv_freq / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = np.clip((rotations - scaling.low_freq_factor) / span, 0.0, 1.0)
    return keep * inv_freq + (1 - keep) * inv_freq / scaling.factor


def _yarn(
    inv_freq: npt.NDArray[np.float64], rope: Rope, scaling: YarnScaling
) -> npt.NDArray[np.float64]:
    def dimension_of(rotations: float) -> float:
        wavelength = scaling.original_context / (rotations * 2 * math.pi)
        return rope.dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    # The published ramp widens an empty range, so that it never divides by zero.
    span = high - low if high != low else 0.001
    keep = 1 - np.clip((np.arange(rope.dim // 2) - low) / span, 0.0, 1.0)
    return np.asarray(keep * inv_freq + (1 - keep) * inv_freq / scaling.factor)


class Rotation:
    """The rotation of one step's tokens, made once and applied in every layer.

    Args:
        xp: the array module.
        positions: int array [T].
        inv_freq: float64 [dim / 2], from `inverse_frequencies`.
        attention_factor: multiplies cos and sin.
    """

    def __init__(self, xp: Any, positions: Any, inv_freq: Any, attention_factor: float) -> None:
        self._xp = xp
        # float64: a float32 product of position and frequency is off by 0.006 at 100k tokens.
        angles = positions[:, None] * inv_freq
        cos = (xp.cos(angles) * attention_factor).astype(xp.float32)
        sin = (xp.sin(angles) * attention_factor).astype(xp.float32)
        self._cos = cos[:, None, None, :]
        self._sin = xp.stack((-sin, sin), axis=1)[:, None, :, :]

    def part(self, rows: slice) -> Rotation:
        """The rotation of some of the tokens."""
        part = copy.copy(self)
        part._cos, part._sin = self._cos[rows], self._sin[rows]
        return part

    def apply(self, x: Any, out: Any, rows: slice = slice(None)) -> None:
        """Writes rows of x [T, H, D], of which `dim` elements turn, to `out` of the same shape.

        Those of x are used up as scratch.
        """
        tokens, heads, head_dim = x.shape
        dim = 2 * self._cos.shape[-1]
        if dim < head_dim:
            out[rows, :, dim:] = x[rows, :, dim:]
            x, out = x[..., :dim], out[..., :dim]
        halves = x.reshape(tokens, heads, 2, dim // 2)[rows]
        rotated = out.reshape(tokens, heads, 2, dim // 2)[rows]
        self._xp.multiply(halves[:, :, ::-1], self._sin[rows], out=rotated)
        halves *= self._cos[rows]
        rotated += halves
