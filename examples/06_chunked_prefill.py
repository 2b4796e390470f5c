"""A long prompt in chunks gives, to the bit, what it gives in one piece."""

import numpy as np

import kvcore

NUM_TOKENS = 700
spec = kvcore.CacheSpec(1, num_kv_heads=2, head_dim=64, k_format="fp32", v_format="fp32")
cache = kvcore.KVCache(spec, num_blocks=32)

rng = np.random.default_rng(0)
q = rng.standard_normal((NUM_TOKENS, 6, 64), np.float32)
k, v = rng.standard_normal((2, NUM_TOKENS, 2, 64), dtype=np.float32)


def prefill(chunk_size):
    """Attention of all tokens, `chunk_size` new ones a step."""
    sequence, outs = cache.sequence(), []
    for begin in range(0, NUM_TOKENS, chunk_size):
        rows = slice(begin, min(begin + chunk_size, NUM_TOKENS))
        with cache.step([(sequence, rows.stop - begin)]) as step:
            step.append(0, k[rows], v[rows])
            outs.append(step.attend(0, q[rows]))
    sequence.free()
    return np.concatenate(outs), len(outs)


whole, _ = prefill(NUM_TOKENS)
for chunk_size in (512, 256, 100, 7, 1):
    chunked, num_steps = prefill(chunk_size)
    assert np.array_equal(chunked, whole)
    print(f"{num_steps:>3} chunks of up to {chunk_size:>3} tokens: the same bits")
