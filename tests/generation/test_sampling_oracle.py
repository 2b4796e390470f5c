"""Sampling against transformers' logits processors, one after the other."""

from __future__ import annotations

import numpy as np
import pytest

from kvcore.models.sampling import SamplingParams, candidates, penalize

pytestmark = pytest.mark.oracle


def transformers_distribution(logits, seen, params):
    import torch
    from transformers.generation import logits_process as hf

    processors = [hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)]
    processors.append(hf.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        processors.append(hf.MinPLogitsWarper(params.min_p))
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    for processor in processors:
        scores = processor(torch.from_numpy(seen)[None], scores)
    return torch.softmax(scores, -1)[0].numpy()


@pytest.mark.parametrize("seed", range(20))
def test_the_distribution_is_transformers(seed):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=rng.integers(20, 3000)) * 3).astype(np.float32)
    seen = rng.integers(0, logits.size, 15)
    params = SamplingParams(
        temperature=float(rng.uniform(0.3, 2)),
        top_k=int(rng.choice([0, 5, 50])),
        top_p=float(rng.choice([1.0, 0.95, 0.6])),
        min_p=float(rng.choice([0.0, 0.02, 0.2])),
        repetition_penalty=float(rng.choice([1.0, 1.3])),
    )
    expected = transformers_distribution(logits, seen, params)
    ids, probabilities = candidates(penalize(logits, seen, params.repetition_penalty), params)
    actual = np.zeros(logits.size)
    actual[ids] = probabilities
    np.testing.assert_array_equal(actual > 0, expected > 0)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
