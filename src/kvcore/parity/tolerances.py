"""How far from the exact result attention may lie: docs/numerics.md and docs/numerics_gpu.md."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvcore.formats import get_format
from kvcore.parity.oracle import Reference
from kvcore.parity.subject import Subject
from kvcore.spec import LayerSpec

RELATIVE = 2e-6
OUT_ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
#: Half of float16's smallest step, which values below 2^-14 are rounded to.
FLOAT16_STEP = 2.0**-25
#: Scores up to here, in terms of what they are summed from, cost nothing beside the rounding.
FREE_TERMS = 8

#: From here on a sequence of bf16 takes dot products on "avx512_bf16".
DOTS_FROM = 32
#: Up to here query rows read encoded rows in place.
ROWS_IN_PLACE = 16


@dataclass(frozen=True)
class Tolerance:
    """What an out and lse in float32 may be off by, beside float32's own rounding.

    Attributes:
        spread: of the values' mean norm.
        lse: absolute.
        grows: both grow with the terms of a score.
    """

    spread: float = 0.0
    lse: float = 0.0
    grows: bool = False


EXACT = Tolerance()


def tolerance(
    subject: Subject, layer: LayerSpec, num_new: int, group: int, exact: bool
) -> Tolerance:
    """Of a sequence with `num_new` new tokens and `group` query heads a KV head."""
    formats = [get_format(name) for name in (layer.k_format, layer.v_format)]
    if subject.backend == "cuda":
        return _on_cuda([form.name for form in formats])
    byte_dots = subject.device in ("avx512_vnni", "avx512_bf16") and not exact
    if any(form.is_quantized for form in formats):
        in_place = byte_dots and num_new * group <= ROWS_IN_PLACE
        return Tolerance(2e-4, 4e-4, grows=True) if in_place else EXACT
    takes_dots = subject.device == "avx512_bf16" and num_new >= DOTS_FROM and not exact
    if takes_dots and {form.name for form in formats} == {"bf16"}:
        return Tolerance(2e-3, 2e-3)
    return EXACT


def _on_cuda(formats: list[str]) -> Tolerance:
    if set(formats) <= {"fp32"}:
        return EXACT
    if set(formats) <= {"fp32", "fp16"}:
        return Tolerance(3e-4, 3e-4, grows=True)
    return Tolerance(2e-3, 2e-3, grows=True)


def excess(
    out: NDArray[np.generic],
    lse: NDArray[np.float32],
    reference: Reference,
    allowed: Tolerance,
) -> float:
    """The largest error of out [n, Hq, Dv] and lse [n, Hq] as a share of what is allowed.

    Infinite where a NaN or a row that sees nothing is not where it belongs.
    """
    growth = np.maximum(1.0, reference.terms / FREE_TERMS)
    scale = growth if allowed.grows else np.ones_like(growth)
    dtype = out.dtype.name
    error = np.linalg.norm(out.astype(np.float64) - reference.out, axis=-1)
    norm = np.linalg.norm(reference.out, axis=-1)
    limit = (RELATIVE * growth + OUT_ROUNDING[dtype]) * norm
    limit = limit + allowed.spread * scale * reference.length
    if dtype == "float16":
        limit = limit + FLOAT16_STEP * out.shape[-1] ** 0.5
    nothing = np.isneginf(reference.lse)
    if not np.array_equal(np.isneginf(lse), nothing):
        return np.inf
    exact = np.where(nothing, 0.0, reference.lse)
    lse_error = np.abs(np.where(nothing, 0.0, lse.astype(np.float64)) - exact)
    lse_limit = (RELATIVE * growth) + 2.0**-23 * np.abs(exact) + allowed.lse * scale
    return max(
        _largest(error / _above_0(limit), np.isnan(reference.out), np.isnan(out)),
        _largest(lse_error / lse_limit, np.isnan(reference.lse), np.isnan(lse)),
    )


def _above_0(limit: NDArray[np.float64]) -> NDArray[np.float64]:
    """A limit of 0, of rows that are 0, as one that any error exceeds."""
    return np.where(limit == 0, np.finfo(np.float64).tiny, limit)


def _largest(
    ratio: NDArray[np.float64], is_nan: NDArray[np.bool_], came_nan: NDArray[np.bool_]
) -> float:
    """The largest ratio of rows without NaN; infinity if NaN came elsewhere than expected."""
    if not np.array_equal(is_nan, came_nan):
        return np.inf
    return float(np.nan_to_num(ratio, nan=0.0).max(initial=0.0))
