"""Attention in float64 NumPy, from the formula, and the distances that docs/numerics.md allows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import special

#: docs/numerics.md, "Tolerances".
RELATIVE = 2e-6
OUT_ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
DOTS = 2e-3
FLOAT16_SUBNORMAL_ROUNDING = 2.0**-25


@dataclass
class Reference:
    """Attention of one sequence's new tokens, all float64.

    Attributes:
        out: [n, Hq, Dv].
        lse: [n, Hq], natural logarithm.
        max_score: [n, Hq], the largest abs(score) that the row sees, before softcap, after ALiBi,
            or its sink.
        max_terms: [n, Hq], the largest scaled sum over d of abs(q_d * k_d) that it sees.
        mean_length: [n, Hq], the average length of the values, weighted as in `out`.
    """

    out: np.ndarray
    lse: np.ndarray
    max_score: np.ndarray
    max_terms: np.ndarray
    mean_length: np.ndarray


def token_places(n, m, positions=None) -> tuple[np.ndarray, np.ndarray]:
    """Where the last n of m tokens stand as queries, and all m as keys."""
    queries, keys = np.arange(m - n, m), np.arange(m)
    if positions is not None:
        queries = np.asarray(positions, np.int64)
        if m >= n:
            keys[m - n :] = queries
    return queries, keys


def visible_tokens(n, m, *, window=None, causal=True, mask=None, positions=None) -> np.ndarray:
    """Which of m stored tokens the last n see: [n, m] booleans."""
    if mask is not None:
        visible = np.asarray(mask)
    else:
        order = np.arange(m) <= np.arange(m - n, m)[:, None]
        visible = order if causal else np.ones((n, m), bool)
    if window is not None:
        queries, keys = token_places(n, m, positions)
        distance = queries[:, None] - keys
        visible = visible & (distance >= 0) & (distance < window)
    return visible


def attention(
    q, k, v, scale=None, *, softcap=None, alibi_slopes=None, positions=None, sinks=None, **sight
) -> Reference:
    """Attention of a sequence's new tokens; causal and bottom-right aligned by default.

    Args:
        q: [n, Hq, D], the new tokens' queries.
        k, v: [m, H, D] and [m, H, Dv], every token that the sequence holds.
        scale, softcap, alibi_slopes, positions, sinks, sight: as Step.attend has them, with the
            mask and positions of this sequence.
    """
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    n, num_heads, head_dim = q.shape
    m, num_kv_heads, _ = k.shape
    scale = head_dim**-0.5 if scale is None else scale
    visible = visible_tokens(n, m, positions=positions, **sight)
    queries, keys = token_places(n, m, positions)
    distance = queries[:, None] - keys
    out = np.zeros((n, num_heads, v.shape[2]))
    lse = np.full((n, num_heads), -np.inf)
    max_score = np.zeros((n, num_heads))
    max_terms = np.zeros((n, num_heads))
    mean_length = np.zeros((n, num_heads))

    def largest(x):
        return np.where(visible, np.abs(x), 0).max(axis=1, initial=0)

    for head in range(num_heads):
        source = head // (num_heads // num_kv_heads)
        scores = (q[:, head] @ k[:, source].T) * scale
        max_score[:, head] = largest(scores)
        terms = np.abs(q[:, head]) @ np.abs(k[:, source]).T * abs(scale)
        max_terms[:, head] = np.where(visible, terms, 0).max(axis=1, initial=0)
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        if alibi_slopes is not None:
            scores = scores - float(alibi_slopes[head]) * distance
            max_score[:, head] = np.maximum(max_score[:, head], largest(scores))
        values = v[:, source]
        if sinks is not None:
            scores = np.concatenate([scores, np.full((n, 1), float(sinks[head]))], axis=1)
            values = np.concatenate([values, np.zeros((1, v.shape[2]))])
            max_score[:, head] = np.maximum(max_score[:, head], abs(float(sinks[head])))
        seen = np.pad(visible, ((0, 0), (0, scores.shape[1] - m)), constant_values=True)
        scores = np.where(seen, scores, -np.inf)
        some = seen.any(axis=1)
        if some.any():
            top = scores[some].max(axis=1, keepdims=True)
            powers = np.exp(scores[some] - top)
            total = powers.sum(axis=1, keepdims=True)
            lse[some, head] = (top + np.log(total))[:, 0]
            weights = powers / total
            # What is not seen takes no part, though it be NaN.
            out[some, head] = [w[s] @ values[s] for w, s in zip(weights, seen[some], strict=True)]
            lengths = np.linalg.norm(values, axis=-1)
            mean_length[some, head] = np.where(seen[some], weights * lengths, 0).sum(axis=1)
    return Reference(out, lse, max_score, max_terms, mean_length)


def merge(outs, lses) -> tuple[np.ndarray, np.ndarray]:
    """Attention over disjoint parts of the keys, joined: outs [P, R, D], lses [P, R]."""
    outs, lses = np.asarray(outs, np.float64), np.asarray(lses, np.float64)
    lse = special.logsumexp(lses, axis=0)
    weights = np.where(np.isneginf(lses), 0.0, np.exp(lses - np.where(np.isneginf(lse), 0.0, lse)))
    seen = weights[..., None] > 0
    return (np.where(seen, outs, 0.0) * weights[..., None]).sum(axis=0), lse


def assert_close(
    out, lse, reference: Reference, *, cancels: bool = False, dots: bool = False
) -> None:
    """Asserts out [n, Hq, Dv] and lse [n, Hq] (or None) to be within the promised distance.

    `cancels`: q . k may be far smaller than its terms, which then take the place of the score.
    `dots`: by dot products of bf16 pairs.
    """
    growth = np.maximum(1.0, (reference.max_terms if cancels else reference.max_score) / 8)
    error = np.linalg.norm(np.asarray(out).astype(np.float64) - reference.out, axis=-1)
    length = np.linalg.norm(reference.out, axis=-1)
    allowed = (RELATIVE * growth + OUT_ROUNDING[out.dtype.name]) * length
    if dots:
        allowed = allowed + DOTS * reference.mean_length
    if out.dtype.name == "float16":
        allowed = allowed + FLOAT16_SUBNORMAL_ROUNDING * out.shape[-1] ** 0.5
    assert_within(error, allowed, "out")
    if lse is not None:
        nothing = np.isneginf(reference.lse)
        assert np.array_equal(np.isneginf(lse), nothing), "lse of rows that see nothing"
        exact = np.where(nothing, 0, reference.lse)
        error = np.abs(np.where(nothing, 0, lse).astype(np.float64) - exact)
        allowed = RELATIVE * growth + 2.0**-23 * np.abs(exact) + (DOTS if dots else 0)
        assert_within(error, allowed, "lse")


def assert_within(error, allowed, what: str) -> None:
    """Asserts error <= allowed everywhere; NaN is over any limit."""
    over = ~(error <= allowed)
    if over.any():
        worst = np.unravel_index(np.argmax(np.where(over, error / allowed, 0)), error.shape)
        raise AssertionError(
            f"{what}{list(map(int, worst))}: error {error[worst]:.3g}, "
            f"allowed {allowed[worst]:.3g}; {int(over.sum())} of {over.size} are over"
        )
