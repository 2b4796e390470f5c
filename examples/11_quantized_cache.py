"""A cache of about four bits an element: what it takes, what it loses, and its raw rows."""

import numpy as np

import kvcore


def cache_of(k_format, v_format):
    spec = kvcore.CacheSpec(
        num_layers=1, num_kv_heads=2, head_dim=128, k_format=k_format, v_format=v_format
    )
    return kvcore.KVCache(spec, num_blocks=64)


def attention_over(cache, k, v, q):
    """The last token's attention over all of them."""
    sequence = cache.sequence()
    for new in (slice(0, len(k) - 1), slice(len(k) - 1, len(k))):
        with cache.step([(sequence, len(k[new]))]) as step:
            step.append(0, k[new], v[new])
            out = step.attend(0, q[new])
    return sequence, out[-1]


rng = np.random.default_rng(0)
k, v = (rng.standard_normal((1000, 2, 128)).astype(np.float32) for _ in range(2))
q = rng.standard_normal((1000, 8, 128)).astype(np.float32)
_, exact = attention_over(cache_of("fp32", "fp32"), k, v, q)

for pair in (("bf16", "bf16"), ("rot8", "rot8"), ("chan4", "rot4")):
    cache = cache_of(*pair)
    sequence, out = attention_over(cache, k, v, q)
    spec = cache.spec
    error = np.linalg.norm(out - exact) / np.linalg.norm(exact)
    print(
        f"{'/'.join(pair):<12}{spec.bits_per_element():6.3f} bits an element, "
        f"{spec.bits_per_element(32_768):6.3f} with the raw rows of a text of 32,768 tokens; "
        f"error {error:.4f}"
    )
    assert error < {"bf16": 0.01, "rot8": 0.02, "chan4": 0.2}[pair[0]]

# The first tokens and the last 32 to 63 are read in bf16; what lies between is encoded.
keys, _ = sequence.read(0)
loss = np.linalg.norm(keys - k, axis=(1, 2)) / np.linalg.norm(k, axis=(1, 2))
print(f"keys: raw {loss[:4].max():.4f} and {loss[-40:].max():.4f}, encoded {loss[200]:.4f}")
assert loss[:4].max() < 0.01 and loss[-40:].max() < 0.01 and loss[200] > 0.02

# Truncating to where only encoded rows are left: they are decoded for the next token, and counted.
sequence.truncate(500)
with cache.step([(sequence, 1)]) as step:
    step.append(0, k[:1], v[:1])
raw_rows = cache.stats().groups[1]
print(f"restored after truncate: {raw_rows.reencoded_rows} rows")
assert raw_rows.reencoded_rows == 500 - 448
