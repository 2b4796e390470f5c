"""Two continuations share a prompt's blocks; the block that both would write is copied, once."""

import numpy as np

import kvcore

spec = kvcore.CacheSpec(
    1, num_kv_heads=1, head_dim=8, block_size=16, k_format="fp32", v_format="fp32"
)
cache = kvcore.KVCache(spec, num_blocks=16)


def append(sequence, value, num_new):
    rows = np.full((num_new, 1, 8), value, np.float32)
    with cache.step([(sequence, num_new)]) as step:
        step.append(0, rows, rows)


prompt = cache.sequence()
append(prompt, 1.0, 40)  # two full blocks and half of a third
assert cache.stats().in_use == 3

fork = prompt.fork()
assert cache.stats().in_use == 3 and cache.stats().copies == 0
assert np.array_equal(fork.blocks(), prompt.blocks())
print("after the fork: ", prompt.blocks(), fork.blocks())

append(fork, 2.0, 1)  # into the half block, which `prompt` still reads: copy on write
assert cache.stats().in_use == 4 and cache.stats().copies == 1
assert np.array_equal(fork.blocks()[:2], prompt.blocks()[:2])
assert fork.blocks()[2] != prompt.blocks()[2]
print("after its write:", prompt.blocks(), fork.blocks())

append(prompt, 3.0, 1)  # nobody else reads that block now
assert cache.stats().copies == 1

for sequence, last in ((prompt, 3.0), (fork, 2.0)):
    keys, _ = sequence.read(layer=0)
    assert (keys[:40] == 1.0).all() and (keys[40:] == last).all()

prompt.free()
assert len(fork) == 41 and cache.stats().in_use == 3
fork.free()
assert cache.stats().free == 16
