"""Blocks seen one by one: two sequences grow in turns, and one's blocks serve the next."""

import numpy as np

import kvcore

BLOCK_SIZE = 16
spec = kvcore.CacheSpec(1, num_kv_heads=1, head_dim=8, block_size=BLOCK_SIZE)
cache = kvcore.KVCache(spec, num_blocks=6)


def grow(sequence, num_new):
    rows = np.zeros((num_new, 1, 8), np.float32)
    with cache.step([(sequence, num_new)]) as step:
        step.append(0, rows, rows)


def show(what):
    owner = ["."] * cache.num_blocks[0]
    for name, sequence in (("a", a), ("b", b), ("c", c)):
        if not sequence.is_freed:
            for block in sequence.blocks():
                owner[block] = name
    print(f"{what:<24} {' '.join(owner)}")


a, b, c = (cache.sequence() for _ in range(3))
show("empty")
for name, sequence in (("a", a), ("b", b)) * 2:
    grow(sequence, 20)
    show(f"{name} holds {len(sequence)} tokens")
    assert len(sequence.blocks()) == -(-len(sequence) // BLOCK_SIZE)
assert set(a.blocks()).isdisjoint(b.blocks())
assert cache.stats().free == 0

# Blocks are handed out one at a time, so that c may be put together from any that are free.
try:
    grow(c, 20)
except kvcore.errors.OutOfBlocks as shortage:
    print("c waits:", shortage)
    assert (shortage.needed, shortage.available) == (2, 0)
freed = set(a.blocks().tolist())
a.free()
show("a is freed")
grow(c, 20)
show("c holds 20 tokens")
assert set(c.blocks().tolist()) < freed
cache.check()
