"""Sampling against distributions worked out by hand, and what must hold for any logits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvcore.errors import InvalidArgument, InvalidType
from kvcore.models.sampling import Sampler, SamplingParams, candidates, penalize, sample_batch

# Logits whose softmax is 8/15, 4/15, 2/15, 1/15, in the order 1, 3, 0, 2.
LOGITS = np.log(np.array([2, 8, 1, 4], np.float32))

rows = arrays(
    np.float32,
    st.integers(1, 700),
    elements=st.floats(-30, 30, width=32, allow_nan=False),
)


def distribution(logits, **params):
    params.setdefault("temperature", 1.0)
    ids, probabilities = candidates(logits, SamplingParams(**params))
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)
    return dict(zip(ids.tolist(), probabilities.tolist(), strict=True))


def close(expected):
    return pytest.approx(expected, rel=1e-6)


def test_temperature_one_is_the_softmax():
    assert distribution(LOGITS) == close({0: 2 / 15, 1: 8 / 15, 2: 1 / 15, 3: 4 / 15})


def test_temperature_divides_the_logits():
    # At 1/2 the odds are squared: 4, 64, 1, 16; at 2 their roots are taken.
    assert distribution(LOGITS, temperature=0.5) == close(
        {0: 4 / 85, 1: 64 / 85, 2: 1 / 85, 3: 16 / 85}
    )
    roots = np.sqrt([2, 8, 1, 4])
    expected = dict(enumerate(roots / roots.sum()))
    assert distribution(LOGITS, temperature=2.0) == close(expected)


def test_a_tiny_temperature_does_not_overflow():
    assert distribution(LOGITS, temperature=1e-300) == {0: 0.0, 1: 1.0, 2: 0.0, 3: 0.0}


def test_top_k_keeps_the_largest():
    assert distribution(LOGITS, top_k=2) == close({1: 8 / 12, 3: 4 / 12})
    assert distribution(LOGITS, top_k=99) == distribution(LOGITS)


def test_top_k_keeps_ties_with_the_last():
    assert set(distribution(np.array([3, 1, 2, 2, 0], np.float32), top_k=2)) == {0, 2, 3}


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.5, [1]),
        (0.53, [1]),
        (0.54, [1, 3]),
        (0.79, [1, 3]),
        (0.81, [1, 3, 0]),
        (0.95, [1, 3, 0, 2]),
    ],
)
def test_top_p_keeps_the_smallest_nucleus(top_p, kept):
    # The cumulative probabilities are 0.533, 0.8, 0.933, 1.
    odds = [2, 8, 1, 4]
    total = sum(odds[token] for token in kept)
    assert distribution(LOGITS, top_p=top_p) == close({t: odds[t] / total for t in kept})


def test_top_p_comes_after_top_k():
    # Of {1: 2/3, 3: 1/3} token 1 alone holds 0.6; of the whole softmax it holds 0.533.
    assert set(distribution(LOGITS, top_k=2, top_p=0.6)) == {1}
    assert set(distribution(LOGITS, top_p=0.6)) == {1, 3}


def test_top_p_comes_after_temperature():
    # At temperature 1/2 token 1 holds 64/85 = 0.75.
    assert set(distribution(LOGITS, temperature=0.5, top_p=0.7)) == {1}


def test_min_p_is_a_share_of_the_most_likely():
    assert distribution(LOGITS, min_p=0.2) == close({0: 2 / 14, 1: 8 / 14, 3: 4 / 14})
    assert set(distribution(LOGITS, min_p=1.0)) == {1}


def test_equal_logits_in_the_nucleus_go_by_id():
    assert set(distribution(np.zeros(1000, np.float32), top_p=0.25)) == set(range(250))


def test_penalty_divides_positive_and_multiplies_negative_logits():
    logits = np.array([2.0, -2.0, 3.0, 0.0], np.float32)
    penalized = penalize(logits, np.array([0, 1, 3]), 2.0)
    np.testing.assert_array_equal(penalized, np.array([1.0, -4.0, 3.0, 0.0], np.float32))
    assert logits[0] == 2.0


def test_penalty_counts_prompt_and_generated_tokens():
    sampler = Sampler(SamplingParams(repetition_penalty=4.0), prompt=[0])
    logits = np.array([4.0, 3.0, 2.0, 0.5], np.float32)
    assert [sampler.sample(logits) for _ in range(3)] == [1, 2, 0]


def test_greedy_takes_the_first_of_equals_and_draws_nothing():
    logits = np.array([[1, 5, 5], [7, 0, 7]], np.float32)
    samplers = [Sampler(SamplingParams()) for _ in logits]
    assert sample_batch(logits, samplers) == [1, 0]
    assert [s.sample(row) for s, row in zip(samplers, logits, strict=True)] == [1, 0]


def test_draws_follow_the_distribution():
    sampler = Sampler(SamplingParams(temperature=1.0, seed=7))
    draws = np.bincount([sampler.sample(LOGITS) for _ in range(20_000)], minlength=4)
    expected = np.array([2, 8, 1, 4]) / 15
    error = np.sqrt(expected * (1 - expected) / draws.sum())
    assert (np.abs(draws / draws.sum() - expected) < 4.5 * error).all()


def test_a_seed_gives_the_same_draws_alone_and_beside_others():
    params = SamplingParams(temperature=1.5, seed=3)
    logits = np.random.default_rng(0).normal(size=(40, 5, 300)).astype(np.float32)
    alone = Sampler(params)
    expected = [alone.sample(step[2]) for step in logits]
    warm, best = SamplingParams(temperature=1.0), SamplingParams(top_k=3)
    batch = [Sampler(p) for p in (SamplingParams(), warm, params, params, best)]
    together = [sample_batch(step, batch)[2] for step in logits]
    assert together == expected
    assert len(set(expected)) > 10


@given(rows, st.integers(1, 800))
def test_top_k_invariants(logits, k):
    kept = distribution(logits, top_k=k)
    assert len(kept) >= min(k, logits.size)
    threshold = np.sort(logits)[::-1][min(k, logits.size) - 1]
    assert set(kept) == set(np.flatnonzero(logits >= threshold).tolist())


@given(rows, st.floats(0.01, 1.0), st.sampled_from([0.3, 1.0, 4.0]))
def test_top_p_invariants(logits, top_p, temperature):
    full = distribution(logits, temperature=temperature)
    kept = distribution(logits, top_p=top_p, temperature=temperature)
    mass = sum(full[token] for token in kept)
    assert mass >= top_p - 1e-9
    smallest = min(kept, key=full.__getitem__)
    if top_p < 1:
        assert mass - full[smallest] < top_p + 1e-9, "one token fewer would hold top_p as well"
    dropped = set(full) - set(kept)
    assert all(full[token] <= full[smallest] for token in dropped)


@given(rows, st.floats(0, 1))
def test_min_p_invariants(logits, min_p):
    full = distribution(logits)
    kept = distribution(logits, min_p=min_p)
    top = max(full.values())
    assert int(logits.argmax()) in kept
    for token, probability in full.items():
        if abs(probability - min_p * top) > 1e-12:
            assert (token in kept) == (probability > min_p * top)


@given(rows, st.integers(0, 50), st.floats(0.05, 1.0), st.floats(0, 1), st.integers(0, 2**32))
def test_a_draw_is_one_of_the_candidates(logits, top_k, top_p, min_p, seed):
    params = SamplingParams(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    assert Sampler(params).sample(logits) in candidates(logits, params)[0]


def test_a_nucleus_wider_than_the_first_guess():
    logits = np.random.default_rng(1).normal(size=50_000).astype(np.float32)
    ids, _ = candidates(logits, SamplingParams(temperature=1.0, top_p=0.9))
    weights = np.exp(logits.astype(np.float64))
    order = np.argsort(-weights, kind="stable")
    count = np.searchsorted(np.cumsum(weights[order]), 0.9 * weights.sum()) + 1
    assert count > 2048
    np.testing.assert_array_equal(ids, order[:count])


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("temperature", -0.1, InvalidArgument),
        ("temperature", float("nan"), InvalidArgument),
        ("temperature", float("inf"), InvalidArgument),
        ("temperature", "hot", InvalidType),
        ("temperature", True, InvalidType),
        ("top_k", -1, InvalidArgument),
        ("top_k", 1.5, InvalidType),
        ("top_p", 0.0, InvalidArgument),
        ("top_p", 1.01, InvalidArgument),
        ("min_p", -0.5, InvalidArgument),
        ("min_p", 2, InvalidArgument),
        ("repetition_penalty", 0, InvalidArgument),
        ("repetition_penalty", None, InvalidType),
        ("seed", -1, InvalidArgument),
        ("seed", "x", InvalidType),
    ],
)
def test_bad_values_are_named(name, value, error):
    with pytest.raises(error, match=f"^{name}: expected .* got "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(bad, temperature):
    logits = np.array([[0, bad, 1]], np.float32)
    sampler = Sampler(SamplingParams(temperature=temperature))
    with pytest.raises(InvalidArgument, match="logits"):
        sample_batch(logits, [sampler])


def test_masked_logits_are_never_drawn():
    logits = np.array([0, -np.inf, 0, -np.inf], np.float32)
    sampler = Sampler(SamplingParams(temperature=5.0, seed=0))
    assert {sampler.sample(logits) for _ in range(100)} == {0, 2}
