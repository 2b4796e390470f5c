"""An engine that keeps its own books: its own pool of blocks, only the operations are kvcore's."""

import numpy as np

import kvcore
from kvcore import ops

NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, NUM_HEADS, HEAD_DIM = 12, 16, 2, 8, 64

k_blocks, v_blocks = np.zeros((2, NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM), np.float16)
free = list(np.random.default_rng(1).permutation(NUM_BLOCKS))
tables, lengths = [[], []], [0, 0]


def step(counts, q, k, v):
    """Appends counts[s] new tokens to each sequence and attends."""
    slots = []
    for s, count in enumerate(counts):
        for position in range(lengths[s], lengths[s] + count):
            if position == len(tables[s]) * BLOCK_SIZE:
                tables[s].append(free.pop())
            slots.append(tables[s][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        lengths[s] += count
    width = max(map(len, tables))
    block_tables = np.array([row + [-1] * (width - len(row)) for row in tables], np.int32)
    ops.append_kv(k, v, k_blocks, v_blocks, np.array(slots, np.int32))
    query_starts = np.cumsum([0, *counts], dtype=np.int32)
    seq_lens = np.array(lengths, np.int32)
    return ops.paged_attention(
        q, k_blocks, v_blocks, block_tables, seq_lens, query_starts, return_lse=True
    )


# The same tokens through KVCache, which keeps the books itself.
spec = kvcore.CacheSpec(
    1, NUM_KV_HEADS, HEAD_DIM, block_size=BLOCK_SIZE, k_format="fp16", v_format="fp16"
)
cache = kvcore.KVCache(spec, NUM_BLOCKS)
sequences = [cache.sequence(), cache.sequence()]

rng = np.random.default_rng(0)
for counts in ([50, 20], [1, 1], [1, 30]):
    q = rng.standard_normal((sum(counts), NUM_HEADS, HEAD_DIM), np.float32)
    k, v = rng.standard_normal((2, sum(counts), NUM_KV_HEADS, HEAD_DIM), dtype=np.float32)
    out, lse = step(counts, q, k, v)
    with cache.step(list(zip(sequences, counts, strict=True))) as cache_step:
        cache_step.append(0, k, v)
        expected, expected_lse = cache_step.attend(0, q, return_lse=True)
    assert np.array_equal(out, expected) and np.array_equal(lse, expected_lse)
    print(f"{counts} new tokens: lengths {lengths}, blocks {[len(row) for row in tables]}")
assert len(free) == NUM_BLOCKS - sum(map(len, tables)) == cache.stats().free
