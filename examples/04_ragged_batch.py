"""Four prompts of different lengths in one step, without padding; each gets what it gets alone."""

from itertools import pairwise

import numpy as np

import kvcore

LENGTHS = [8, 5, 10, 3]
spec = kvcore.CacheSpec(1, num_kv_heads=2, head_dim=32, k_format="fp32", v_format="fp32")
cache = kvcore.KVCache(spec, num_blocks=16)

rng = np.random.default_rng(0)
q = rng.standard_normal((sum(LENGTHS), 4, 32), np.float32)
k, v = rng.standard_normal((2, sum(LENGTHS), 2, 32), dtype=np.float32)

with cache.step([(cache.sequence(), n) for n in LENGTHS]) as step:
    step.append(0, k, v)
    together = step.attend(0, q)
    starts = step.query_starts.tolist()  # where each sequence's rows begin
    batch = step.sequences
assert starts == [0, 8, 13, 23, 26]

for sequence, (begin, end) in zip(batch, pairwise(starts), strict=True):
    assert len(sequence) == end - begin
    with cache.step([(cache.sequence(), end - begin)]) as step:
        step.append(0, k[begin:end], v[begin:end])
        alone = step.attend(0, q[begin:end])
    assert np.array_equal(alone, together[begin:end])  # to the bit
    print(f"rows {begin:>2} to {end:>2}: the same bits alone and in the batch")

# The same batch as a padded array [S, n, H, D]: what stands in the padding does not matter.
padded_q = np.full((4, 10, 4, 32), np.nan, np.float32)
padded_k, padded_v = np.full((2, 4, 10, 2, 32), np.nan, np.float32)
for s, (begin, end) in enumerate(pairwise(starts)):
    for target, source in ((padded_q, q), (padded_k, k), (padded_v, v)):
        target[s, : end - begin] = source[begin:end]
with cache.step([(cache.sequence(), n) for n in LENGTHS]) as step:
    step.append(0, padded_k, padded_v, layout="BSHD")
    out = step.attend(0, padded_q, layout="BSHD")
for s, (begin, end) in enumerate(pairwise(starts)):
    assert np.array_equal(out[s, : end - begin], together[begin:end])
    assert not out[s, end - begin :].any()
print("and in a padded batch")
