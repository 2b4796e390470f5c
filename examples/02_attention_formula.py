"""Attention out of the cache is the formula: softmax(q k^T / sqrt(d)) v, causal, grouped heads."""

import numpy as np

import kvcore

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, NUM_TOKENS = 8, 2, 64, 100


def formula(q, k, v):
    """q [n, Hq, D], k and v [n, H, D] -> [n, Hq, D], in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, NUM_HEADS // NUM_KV_HEADS, axis=1) for x in (k, v))
    scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(HEAD_DIM)
    scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hij,jhd->ihd", weights, v)


rng = np.random.default_rng(0)
q = rng.standard_normal((NUM_TOKENS, NUM_HEADS, HEAD_DIM), np.float32)
k = rng.standard_normal((NUM_TOKENS, NUM_KV_HEADS, HEAD_DIM), np.float32)
v = rng.standard_normal((NUM_TOKENS, NUM_KV_HEADS, HEAD_DIM), np.float32)

expected = formula(q, k, v)
for kv_format, tolerance in (("fp32", 1e-6), ("fp16", 1e-3), ("bf16", 1e-2)):
    spec = kvcore.CacheSpec(1, NUM_KV_HEADS, HEAD_DIM, k_format=kv_format, v_format=kv_format)
    cache = kvcore.KVCache(spec, num_blocks=2)
    with cache.step([(cache.sequence(), NUM_TOKENS)]) as step:
        step.append(0, k, v)
        out = step.attend(0, q)
    error = np.linalg.norm(out - expected) / np.linalg.norm(expected)
    print(f"{kv_format}: {spec.bytes_per_token} bytes a token, error {error:.1e}")
    assert error < tolerance
