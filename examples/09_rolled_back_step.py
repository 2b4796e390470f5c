"""A step is a transaction: when it fails, for whatever reason, nothing has happened."""

import numpy as np

import kvcore
from kvcore.errors import OutOfBlocks, StepIncomplete

spec = kvcore.CacheSpec(2, num_kv_heads=1, head_dim=16, block_size=16)
cache = kvcore.KVCache(spec, num_blocks=4)
a, b = cache.sequence(), cache.sequence()


def append_all(step, value):
    rows = np.full((step.num_tokens, 1, 16), value, np.float32)
    for layer in range(spec.num_layers):
        step.append(layer, rows, rows)


with cache.step([(a, 20), (b, 3)]) as step:
    append_all(step, 1.0)


def assert_unchanged(after):
    assert (len(a), len(b)) == (20, 3)
    assert cache.stats().in_use == 3
    for sequence in (a, b):
        assert all((rows == 1.0).all() for rows in sequence.read(layer=1))
    cache.check()
    print(f"unchanged after {after}")


# An exception in the middle, after one of two layers was written:
try:
    with cache.step([(a, 10), (b, 1)]) as step:
        step.append(0, np.full((11, 1, 16), 2.0, np.float32), np.full((11, 1, 16), 2.0, np.float32))
        raise KeyboardInterrupt
except KeyboardInterrupt:
    assert_unchanged("an interrupt")

# Too few blocks for all of the step, though enough for its first sequence:
try:
    cache.step([(a, 5), (b, 100)])
except OutOfBlocks as shortage:
    assert_unchanged(f"OutOfBlocks ({shortage.needed} needed, {shortage.available} available)")

# A layer forgotten:
try:
    with cache.step([(a, 1)]) as step:
        step.append(0, np.full((1, 1, 16), 2.0, np.float32), np.full((1, 1, 16), 2.0, np.float32))
except StepIncomplete as error:
    assert_unchanged(f"StepIncomplete ({error})")

# A draft that is not taken:
step = cache.step([(a, 4)])
append_all(step, 3.0)
step.rollback()
assert_unchanged("a rollback")
