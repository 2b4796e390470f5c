"""The choice of experts, against its definition one token at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.errors import InvalidArgument
from kvcore.models.config import Experts
from kvcore.models.moe import route


@st.composite
def experts(draw: st.DrawFn) -> Experts:
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    size = draw(st.integers(2, 4))
    per_group = draw(st.integers(1, groups))
    return Experts(
        count=groups * size,
        per_token=draw(st.integers(1, size * per_group)),
        intermediate_size=8,
        scoring=draw(st.sampled_from(["softmax", "sigmoid"])),
        groups=groups,
        groups_per_token=per_group,
        group_score=draw(st.sampled_from(["max", "top2"])),
        normalized=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
    )


def expected_shares(experts: Experts, logits: np.ndarray, bias: np.ndarray) -> dict[int, float]:
    """The share of each expert that one token takes, in float64 and plain Python."""
    if experts.scoring == "sigmoid":
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    else:
        total = sum(math.exp(x) for x in logits)
        scores = [math.exp(x) / total for x in logits]
    worth = [score + float(b) for score, b in zip(scores, bias, strict=True)]
    size = experts.count // experts.groups
    groups = [range(g * size, (g + 1) * size) for g in range(experts.groups)]
    top = 1 if experts.group_score == "max" else 2
    groups.sort(key=lambda group: -sum(sorted((worth[e] for e in group), reverse=True)[:top]))
    allowed = [e for group in groups[: experts.groups_per_token] for e in group]
    chosen = sorted(allowed, key=lambda e: -worth[e])[: experts.per_token]
    total = sum(scores[e] for e in chosen) if experts.normalized else 1.0
    return {e: scores[e] / total * experts.scale for e in chosen}


@given(experts=experts(), seed=st.integers(0, 2**32 - 1), biased=st.booleans())
def test_shares(experts: Experts, seed: int, biased: bool) -> None:
    rng = np.random.default_rng(seed)
    logits = (2 * rng.standard_normal((5, experts.count))).astype(np.float32)
    bias = (biased * rng.standard_normal(experts.count)).astype(np.float32)
    chosen, shares = route(np, experts, logits, bias if biased else None)
    assert chosen.shape == shares.shape == (5, experts.per_token)
    for row in range(5):
        expected = expected_shares(experts, logits[row].astype(np.float64), bias)
        got = dict(zip(chosen[row].tolist(), shares[row].tolist(), strict=True))
        assert got == pytest.approx(expected, rel=1e-5)


def test_softmax_of_the_chosen() -> None:
    experts = Experts(4, 2, 8, scoring="softmax_of_chosen")
    chosen, shares = route(np, experts, np.array([[1.0, 5.0, 2.0, 4.0]], np.float32), None)
    assert chosen.tolist() == [[1, 3]]
    np.testing.assert_allclose(shares, [[1 / (1 + math.exp(-1)), 1 / (1 + math.e)]], rtol=1e-6)


def test_extreme_logits_stay_finite() -> None:
    logits = np.array([[-200.0, 200.0, 0.0, 1.0]], np.float32)
    for scoring in ("softmax", "sigmoid", "softmax_of_chosen"):
        _, shares = route(np, Experts(4, 2, 8, scoring=scoring), logits, None)
        assert np.isfinite(shares).all()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("count", {"count": 0}),
        ("groups", {"groups": 3}),
        ("groups", {"groups": 2, "groups_per_token": 3}),
        ("groups", {"groups": 8, "group_score": "top2"}),
        ("per_token", {"per_token": 9}),
        ("per_token", {"groups": 4, "per_token": 3}),
    ],
)
def test_impossible_experts(name: str, changes: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument, match=f"experts.{name}"):
        Experts(**({"count": 8, "per_token": 2, "intermediate_size": 4} | changes))  # type: ignore[arg-type]
