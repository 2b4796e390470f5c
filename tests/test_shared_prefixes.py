"""Prefixes that sequences share are read once for all, which no output bit shows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcore
from kvcore import ops
from strategies import FORMATS, seeds
from support import FORMAT_DTYPES, assert_same_bits, machine

ISAS = kvcore.available_isas()


class Forest:
    """Blocks and tables of sequences that grow from common trunks; NaN where nobody's token is."""

    def __init__(self, rng, lengths, shared, *, num_heads, head_dim, block_size, dtype):
        columns = [-(-n // block_size) for n in lengths]
        kept = [n // block_size for n in shared]
        trunk = max(kept)
        count = trunk + sum(columns)
        shape = (count, num_heads, block_size, head_dim)
        self.k, self.v = ((4 * rng.random(shape, np.float32) - 2).astype(dtype) for _ in "kv")
        self.tables = np.full((len(lengths), max(columns)), -1, np.int32)
        self.lengths = np.array(lengths, np.int32)
        used, free = np.zeros((count, block_size), bool), trunk
        for s, (length, total, of_trunk) in enumerate(zip(lengths, columns, kept, strict=True)):
            row = [*range(of_trunk), *range(free, free + total - of_trunk)]
            free += total - of_trunk
            self.tables[s, :total] = row
            used[row, :] |= (np.arange(total * block_size) < length).reshape(total, block_size)
        for blocks in (self.k, self.v):
            blocks.transpose(0, 2, 1, 3)[~used] = np.nan

    def attend(self, q, starts, rows, **options):
        """(out, lse) of the sequences `rows` in one call."""
        news = np.diff(starts)[rows]
        cut = np.concatenate([[0], np.cumsum(news)]).astype(np.int32)
        queries = np.concatenate([q[starts[s] : starts[s + 1]] for s in rows])
        return ops.paged_attention(
            queries,
            self.k,
            self.v,
            self.tables[rows],
            self.lengths[rows],
            cut,
            return_lse=True,
            **options,
        )


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25)
@given(data=st.data(), seed=seeds, format=st.sampled_from(FORMATS))
def test_together_as_alone(isa, data, seed, format):
    rng = np.random.default_rng(seed)
    num_heads, ratio = data.draw(st.sampled_from([(8, 1), (4, 2), (3, 4), (2, 16)]))
    block_size = data.draw(st.sampled_from([16, 64, 512]))
    count = data.draw(st.integers(2, 9))
    news = [data.draw(st.sampled_from([1, 1, 1, 2, 5, 20])) for _ in range(count)]
    shared = [data.draw(st.sampled_from([0, 512, 768, 1024, 1500])) for _ in range(count)]
    lengths = [m + n + data.draw(st.integers(0, 300)) for m, n in zip(shared, news, strict=True)]
    forest = Forest(
        rng,
        lengths,
        shared,
        num_heads=num_heads,
        head_dim=64,
        block_size=block_size,
        dtype=FORMAT_DTYPES[format],
    )
    starts = np.concatenate([[0], np.cumsum(news)]).astype(np.int32)
    q = rng.standard_normal((starts[-1], num_heads * ratio, 64), np.float32)
    options = data.draw(
        st.sampled_from(
            [
                {},
                {"softcap": 20.0, "sinks": rng.standard_normal(num_heads * ratio)},
                {"alibi_slopes": rng.uniform(0, 0.1, num_heads * ratio)},
                {"window": 1400},
                {"causal": False},
            ]
        )
    )
    with machine(isa, data.draw(st.integers(1, 4))):
        out, lse = forest.attend(q, starts, np.arange(count), **options)
    with machine(isa, 1):
        for s in range(count):
            alone, alone_lse = forest.attend(q, starts, np.array([s]), **options)
            assert_same_bits(out[starts[s] : starts[s + 1]], alone, f"out of sequence {s}")
            assert_same_bits(lse[starts[s] : starts[s + 1]], alone_lse, f"lse of sequence {s}")


def test_forks_of_a_cache():
    rng = np.random.default_rng(3)
    spec = kvcore.CacheSpec(1, num_kv_heads=8, head_dim=64, block_size=64, k_format="fp32")
    cache = kvcore.KVCache(spec, num_blocks=64)
    first = cache.sequence()
    with cache.step([(first, 700)]) as step:
        step.append(0, *rng.standard_normal((2, 700, 8, 64), np.float32))
    sequences = [first, *(first.fork() for _ in range(4))]
    k, v = rng.standard_normal((2, 5, 8, 64), np.float32)
    q = rng.standard_normal((5, 16, 64), np.float32)
    apart = []
    for s, sequence in enumerate(sequences):
        with cache.step([(sequence, 1)]) as step:
            step.append(0, k[s : s + 1], v[s : s + 1])
            apart.append(step.attend(0, q[s : s + 1]))
        sequence.truncate(700)
    with cache.step([(sequence, 1) for sequence in sequences]) as step:
        step.append(0, k, v)
        together = step.attend(0, q)
    assert_same_bits(together, np.concatenate(apart))


def test_more_sharers_than_a_tile_has_rows():
    rng = np.random.default_rng(4)
    forest = Forest(
        rng, [600] * 40, [512] * 40, num_heads=2, head_dim=64, block_size=64, dtype=np.float32
    )
    starts = np.arange(41, dtype=np.int32)
    q = rng.standard_normal((40, 32, 64), np.float32)
    out, lse = forest.attend(q, starts, np.arange(40))
    for s in range(40):
        alone, alone_lse = forest.attend(q, starts, np.array([s]))
        assert_same_bits(out[s : s + 1], alone)
        assert_same_bits(lse[s : s + 1], alone_lse)
