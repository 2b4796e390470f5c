"""Scales of any sign and size: what softmax.cuh makes of scores, beside the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import kvcore
from support import random_kv, random_q

CONTEXT = 100


def attention(backend: str, form: str, num_new: int, scale: float) -> tuple[Any, Any]:
    rng = np.random.default_rng(1)
    spec = kvcore.CacheSpec(1, 2, 64, k_format=form, v_format=form)
    cache = kvcore.KVCache(spec, num_blocks=8, backend=backend)
    sequence = cache.sequence()
    for count in (CONTEXT, num_new):
        with cache.step([(sequence, count)]) as step:
            step.append(0, *random_kv(rng, count, cache.spec.layers[0]))
            q = random_q(rng, count, 8, 64)
            out, lse = step.attend(0, q, scale=scale, return_lse=True)
    return np.asarray(out), np.asarray(lse)


@pytest.mark.parametrize("num_new", [1, 40], ids=["decode", "prefill"])
@pytest.mark.parametrize("form", ["fp16", "bf16", "rot8"])
@pytest.mark.parametrize("scale", [-1e30, -0.3, 0.0, 1e-30, 1e8, 1e30])
@pytest.mark.usefixtures("cuda_emulated")
def test_scales(form: str, num_new: int, scale: float) -> None:
    out, lse = attention("cuda", form, num_new, scale)
    expected, expected_lse = attention("cpu", form, num_new, scale)
    np.testing.assert_allclose(out, expected, rtol=0, atol=0.01)
    size = max(1.0, float(np.abs(expected_lse).max()))
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=1e-3 * size)
