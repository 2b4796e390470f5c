"""Divergence, loss and agreement against scipy in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr

from kvcore.evaluation.metrics import Reference, perplexity, relative_change


@given(
    st.integers(1, 40), st.integers(2, 300), st.sampled_from([1e-3, 0.1, 3.0]), st.integers(0, 99)
)
def test_comparison_equals_scipy(positions, vocab, distance, seed):
    random = np.random.default_rng(seed)
    logits = (6 * random.standard_normal((positions, vocab))).astype(np.float32)
    others = (logits + distance * random.standard_normal(logits.shape)).astype(np.float32)
    targets = random.integers(0, vocab, positions)
    got = Reference(logits, targets).compare(others)
    p, q = (log_softmax(z.astype(np.float64), -1) for z in (logits, others))
    np.testing.assert_allclose(got.kl, rel_entr(np.exp(p), np.exp(q)).sum(-1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.nll, -q[np.arange(positions), targets], rtol=1e-6, atol=1e-5)
    assert (got.agrees == (p.argmax(-1) == q.argmax(-1))).all()
    assert (got.hits == (q.argmax(-1) == targets)).all()


def test_divergence_does_not_see_a_shift_of_all_logits():
    logits = np.random.default_rng(0).standard_normal((5, 1000), np.float32)
    got = Reference(logits, np.zeros(5, np.int64)).compare(logits + np.float32(16))
    np.testing.assert_allclose(got.kl, 0, atol=1e-6)


def test_a_run_does_not_differ_from_itself():
    logits = 5 * np.random.default_rng(1).standard_normal((20, 777), np.float32)
    got = Reference(logits, np.zeros(20, np.int64)).compare(logits)
    assert (got.kl == 0).all() and got.agrees.all()


def test_huge_logits():
    logits = np.array([[1e4, 0, -1e30], [0, 0, 0]], np.float32)
    others = np.array([[1e4, -1, -2e30], [0, 0, 0]], np.float32)
    got = Reference(logits, np.array([0, 2])).compare(others)
    np.testing.assert_allclose(got.nll, [0, np.log(3)])
    assert (got.kl == 0).all()


def test_perplexity_and_its_change():
    nll = np.log([2.0, 8.0])
    assert perplexity(nll) == pytest.approx(4)
    change, error = relative_change(nll + np.array([0.01, 0.03]), nll)
    assert change == pytest.approx(100 * np.expm1(0.02))
    assert error == pytest.approx(100 * 0.01)
