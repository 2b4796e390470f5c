"""The errors of attention's outputs, recomputed in float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np

import kvcore
from attention_oracle import attention
from kvcore.evaluation.witness import OutputErrors, Witness

LAYERS, HEADS, KV_HEADS, DIM = 2, 4, 2, 16


def make_cache(form):
    spec = kvcore.CacheSpec(LAYERS, KV_HEADS, DIM, k_format=form, v_format=form)
    return kvcore.KVCache(spec, num_blocks=2)


def test_errors_are_those_of_the_format():
    random = np.random.default_rng(3)
    caches = [make_cache(form) for form in ("fp32", "bf16", "fp16")]
    sequences = [cache.sequence() for cache in caches]
    errors = [OutputErrors(LAYERS), OutputErrors(LAYERS)]
    shape = (LAYERS, 90)
    q = random.standard_normal((*shape, HEADS, DIM), np.float32)
    k, v = random.standard_normal((2, *shape, KV_HEADS, DIM), np.float32)
    for part in (slice(0, 50), slice(50, 51), slice(51, 90)):
        steps = [
            cache.step([(sequence, part.stop - part.start)])
            for cache, sequence in zip(caches, sequences, strict=True)
        ]
        witness = Witness(steps[0], steps[1:], errors)
        for layer in range(LAYERS):
            witness.append(layer, k[layer, part], v[layer, part])
            out = witness.attend(layer, q[layer, part], scale=0.5)
            want = attention(q[layer, part], k[layer, : part.stop], v[layer, : part.stop], 0.5).out
            np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
        for step in steps:
            step.commit()
    for error, dtype in zip(errors, (ml_dtypes.bfloat16, np.float16), strict=True):
        for layer in range(LAYERS):
            exact = attention(q[layer], k[layer], v[layer], 0.5).out
            rounded = (x[layer].astype(dtype).astype(np.float32) for x in (k, v))
            out = attention(q[layer], *rounded, 0.5).out
            relative = np.linalg.norm(out - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
            np.testing.assert_allclose(error.mean[layer], relative.mean(), rtol=1e-2)
            np.testing.assert_allclose(error.largest[layer], relative.max(), rtol=1e-2)


def test_an_output_of_zeros_is_right_or_infinitely_wrong():
    errors = OutputErrors(1)
    errors.add(0, np.zeros((3, 1, 8), np.float32), np.zeros((3, 1, 8), np.float32))
    assert errors.largest[0] == errors.mean[0] == 0
    with np.errstate(divide="ignore"):
        errors.add(0, np.ones((1, 1, 8), np.float32), np.zeros((1, 1, 8), np.float32))
    assert errors.largest[0] == np.inf
