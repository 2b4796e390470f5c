"""Attention in float64, from its formula; docs/numerics.md says what each option means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Reference:
    """The exact attention of n queries.

    Attributes:
        out: [n, Hq, Dv].
        lse: [n, Hq], natural logarithm.
        terms: [n, Hq], the largest magnitude of what a score that the row sees is summed from: the
            scaled sum of abs(q_d * k_d), the score with ALiBi, or the sink.
        length: [n, Hq], the mean norm of the values, weighted as in `out`.
    """

    out: Array
    lse: Array
    terms: Array
    length: Array

    @classmethod
    def concatenate(cls, parts: list[Reference]) -> Reference:
        names = ("out", "lse", "terms", "length")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def visible_tokens(
    first: int,
    num_new: int,
    num_keys: int,
    *,
    causal: bool = True,
    window: int | None = None,
    mask: NDArray[np.bool_] | None = None,
    positions: NDArray[np.integer] | None = None,
) -> tuple[NDArray[np.bool_], NDArray[np.integer]]:
    """Which keys the queries see, and how far behind each query a key stands: [n, m] both.

    Args:
        first: the token that the first query is.
        num_new, num_keys: n and m; the keys are tokens 0 .. m - 1.
        causal, window, mask, positions: as `Step.attend` has them, for one sequence.
    """
    tokens = np.arange(first, first + num_new)
    keys = np.arange(num_keys)
    places = tokens if positions is None else np.asarray(positions, np.int64)
    key_places = keys.copy()
    inside = tokens < num_keys
    key_places[tokens[inside]] = places[inside]
    if mask is not None:
        visible = np.asarray(mask, bool)
    elif causal:
        visible = keys <= tokens[:, None]
    else:
        visible = np.ones((num_new, num_keys), bool)
    distance = places[:, None] - key_places
    if window is not None:
        visible = visible & (distance >= 0) & (distance < window)
    return visible, distance


def attention(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    visible: NDArray[np.bool_],
    distance: NDArray[np.integer],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: NDArray[Any] | None = None,
    sinks: NDArray[Any] | None = None,
) -> Reference:
    """The exact result of q [n, Hq, D] over k [m, H, D] and v [m, H, Dv].

    NaN in k and v reaches the rows that see it, and no others.
    """
    num_heads, head_dim = q.shape[1:]
    group = num_heads // k.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    # [H, group, n, D] beside [H, 1, m, D]: the query heads of a KV head share its rows.
    queries = q.astype(np.float64).swapaxes(0, 1).reshape(-1, group, len(q), head_dim)
    keys, values = (x.astype(np.float64).swapaxes(0, 1)[:, None] for x in (k, v))
    shape = num_heads, len(q), len(k)
    scores = (queries @ keys.swapaxes(2, 3) * scale).reshape(shape)
    sizes = np.nan_to_num(np.abs(keys)).swapaxes(2, 3)
    terms = (np.abs(queries) @ sizes * abs(scale)).reshape(shape)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores - np.asarray(alibi_slopes, np.float64)[:, None, None] * distance
        terms = np.maximum(terms, np.nan_to_num(np.abs(scores)))
    scores = np.where(visible, scores, -np.inf)
    largest = np.where(visible, terms, 0).max(axis=2, initial=0)
    extra = np.full((num_heads, len(q)), -np.inf)
    if sinks is not None:
        extra[:] = np.asarray(sinks, np.float64)[:, None]
        largest = np.maximum(largest, np.abs(extra))
    lse, weights = _softmax(scores, extra)
    out, length = _average(weights.reshape(-1, group, *shape[1:]), values, visible)
    return Reference(out.swapaxes(0, 1), lse.T, largest.T, length.T)


def _softmax(scores: Array, extra: Array) -> tuple[Array, Array]:
    """lse [Hq, n] and weights [Hq, n, m], with one more logit a row; 0 where nothing is seen."""
    top = np.maximum(scores.max(axis=2, initial=-np.inf), extra)
    base = np.where(np.isneginf(top), 0.0, top)
    powers = np.exp(scores - base[..., None])
    total = powers.sum(axis=2) + np.exp(extra - base)
    with np.errstate(divide="ignore"):
        lse = base + np.log(total)
    return lse, powers / np.where(total == 0, 1.0, total)[..., None]


def _average(weights: Array, values: Array, visible: NDArray[np.bool_]) -> tuple[Array, Array]:
    """sum of w * v [Hq, n, Dv], and of w * norm(v) [Hq, n]; NaN only where a row sees one.

    Args:
        weights: [H, group, n, m].
        values: [H, 1, m, Dv].
    """
    bad = np.isnan(values)
    clean = np.where(bad, 0.0, values)
    out = weights @ clean
    if bad.any():
        out = np.where(visible.astype(np.float64) @ bad > 0, np.nan, out)
    length = weights @ np.linalg.norm(clean, axis=3)[..., None]
    num_heads, num_new = weights.shape[0] * weights.shape[1], weights.shape[2]
    return out.reshape(num_heads, num_new, -1), length.reshape(num_heads, num_new)


def merge(outs: Array, lses: Array) -> tuple[Array, Array]:
    """Attention over disjoint parts of the keys, joined: outs [P, R, D] and lses [P, R]."""
    top = lses.max(axis=0)
    base = np.where(np.isneginf(top), 0.0, top)
    weights = np.exp(lses - base)
    total = weights.sum(axis=0)
    with np.errstate(divide="ignore"):
        lse = base + np.log(total)
    weights = weights / np.where(total == 0, 1.0, total)
    seen = np.where(weights[..., None] > 0, outs, 0.0)
    return (seen * weights[..., None]).sum(axis=0), lse
