"""Attention in float64 NumPy, from the formula, and the distances that docs/numerics.md allows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import special

#: docs/numerics.md, "Tolerances".
RELATIVE = 2e-6
OUT_ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
FLOAT16_SUBNORMAL_ROUNDING = 2.0**-25


@dataclass
class Reference:
    """Attention of one sequence's new tokens, all float64.

    Attributes:
        out: [n, Hq, Dv].
        lse: [n, Hq], natural logarithm.
        max_score: [n, Hq], the largest abs(score) that the row sees.
        max_terms: [n, Hq], the largest scaled sum over d of abs(q_d * k_d) that it sees.
    """

    out: np.ndarray
    lse: np.ndarray
    max_score: np.ndarray
    max_terms: np.ndarray


def attention(q, k, v, scale=None) -> Reference:
    """Causal attention, bottom-right aligned: the last query sees every key.

    Args:
        q: [n, Hq, D], the new tokens' queries.
        k, v: [m, H, D] and [m, H, Dv], every token that the sequence holds, m >= n.
    """
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    n, num_heads, head_dim = q.shape
    m, num_kv_heads, _ = k.shape
    scale = head_dim**-0.5 if scale is None else scale
    visible = np.arange(m) <= np.arange(m - n, m)[:, None]
    out = np.empty((n, num_heads, v.shape[2]))
    lse = np.empty((n, num_heads))
    max_score = np.empty((n, num_heads))
    max_terms = np.empty((n, num_heads))
    for head in range(num_heads):
        source = head // (num_heads // num_kv_heads)
        scores = (q[:, head] @ k[:, source].T) * scale
        max_score[:, head] = np.where(visible, np.abs(scores), 0).max(axis=1)
        terms = np.abs(q[:, head]) @ np.abs(k[:, source]).T * abs(scale)
        max_terms[:, head] = np.where(visible, terms, 0).max(axis=1)
        scores = np.where(visible, scores, -np.inf)
        lse[:, head] = special.logsumexp(scores, axis=1)
        out[:, head] = special.softmax(scores, axis=1) @ v[:, source]
    return Reference(out, lse, max_score, max_terms)


def merge(outs, lses) -> tuple[np.ndarray, np.ndarray]:
    """Attention over disjoint parts of the keys, joined: outs [P, R, D], lses [P, R]."""
    outs, lses = np.asarray(outs, np.float64), np.asarray(lses, np.float64)
    lse = special.logsumexp(lses, axis=0)
    weights = np.where(np.isneginf(lses), 0.0, np.exp(lses - np.where(np.isneginf(lse), 0.0, lse)))
    seen = weights[..., None] > 0
    return (np.where(seen, outs, 0.0) * weights[..., None]).sum(axis=0), lse


def assert_close(out, lse, reference: Reference, *, cancels: bool = False) -> None:
    """Asserts out [n, Hq, Dv] and lse [n, Hq] (or None) to be within the promised distance.

    `cancels`: q . k may be far smaller than its terms, which then take the place of the score.
    """
    growth = np.maximum(1.0, (reference.max_terms if cancels else reference.max_score) / 8)
    error = np.linalg.norm(np.asarray(out).astype(np.float64) - reference.out, axis=-1)
    length = np.linalg.norm(reference.out, axis=-1)
    allowed = (RELATIVE * growth + OUT_ROUNDING[out.dtype.name]) * length
    if out.dtype.name == "float16":
        allowed = allowed + FLOAT16_SUBNORMAL_ROUNDING * out.shape[-1] ** 0.5
    assert_within(error, allowed, "out")
    if lse is not None:
        error = np.abs(lse.astype(np.float64) - reference.lse)
        assert_within(error, RELATIVE * growth + 2.0**-23 * np.abs(reference.lse), "lse")


def assert_within(error, allowed, what: str) -> None:
    """Asserts error <= allowed everywhere; NaN is over any limit."""
    over = ~(error <= allowed)
    if over.any():
        worst = np.unravel_index(np.argmax(np.where(over, error / allowed, 0)), error.shape)
        raise AssertionError(
            f"{what}{list(map(int, worst))}: error {error[worst]:.3g}, "
            f"allowed {allowed[worst]:.3g}; {int(over.sum())} of {over.size} are over"
        )
