"""A cache, a sequence, three steps: write keys and values, read them back, give the blocks back."""

import numpy as np

import kvcore

spec = kvcore.CacheSpec(
    num_layers=2, num_kv_heads=3, head_dim=64, block_size=16, k_format="fp32", v_format="fp32"
)
cache = kvcore.KVCache(spec, num_blocks=8)
print(cache)

rng = np.random.default_rng(0)
sequence = cache.sequence()
written = []

# A step reserves slots for new tokens; leaving the `with` block makes them part of the sequence.
for num_new in (20, 1, 1):
    with cache.step([(sequence, num_new)]) as step:
        for layer in range(spec.num_layers):
            k, v = rng.standard_normal((2, num_new, 3, 64), dtype=np.float32)
            step.append(layer, k, v)
            if layer == 0:
                written.append(k)
    print(f"{num_new:>2} new tokens: {sequence}")

keys, values = sequence.read(layer=0)
assert len(sequence) == 22
assert keys.shape == values.shape == (22, 3, 64)
assert np.array_equal(keys, np.concatenate(written))  # an fp32 cache keeps every bit

sequence.truncate(16)
assert cache.stats().in_use == 1
sequence.free()
assert cache.stats().free == cache.stats().total == 8
cache.check()
print(cache)
