"""Caches, arrays and the machine's settings, as the tests need them."""

from __future__ import annotations

import contextlib
import gc

import ml_dtypes
import numpy as np
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

import kvcore

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": BFLOAT16}
LANES = {"scalar": 4, "neon": 4, "avx2": 8, "avx512": 16, "avx512_vnni": 16, "avx512_bf16": 16}
FORMAT_DTYPES = {
    "fp32": DTYPES["float32"],
    "fp16": DTYPES["float16"],
    "bf16": DTYPES["bfloat16"],
}


def takes_dots(isa, layer, num_new, exact=False):
    """Whether a sequence's attention is rounded more than elsewhere: docs/numerics.md."""
    bf16 = layer.k_format == layer.v_format == "bf16"
    return isa == "avx512_bf16" and bf16 and num_new >= 32 and not exact


@contextlib.contextmanager
def machine(isa=None, num_threads=None):
    """Runs the body on one ISA and number of threads, more than there are CPUs if need be."""
    before = kvcore.get_isa()
    try:
        if isa is not None:
            kvcore.set_isa(isa)
        if num_threads is not None:
            kvcore.set_num_threads(num_threads, oversubscribe=True)
        yield
    finally:
        kvcore.set_isa(before)
        kvcore.set_num_threads(0)


def make_cache(num_blocks=16, *, poisoned=True, **spec):
    """A small cache, NaN all over unless `poisoned` is False."""
    shape = {
        "num_layers": 1,
        "num_kv_heads": 2,
        "head_dim": 16,
        "block_size": 16,
        "k_format": "fp32",
        "v_format": "fp32",
    }
    cache = kvcore.KVCache(kvcore.CacheSpec(**{**shape, **spec}), num_blocks=num_blocks)
    if poisoned:
        poison(cache)
    return cache


def stored(cache, layer):
    """The arrays [N, H, B, D] of a layer's K and V; bf16 as bfloat16."""
    return [a.view(BFLOAT16) if a.dtype == np.uint16 else a for a in cache.blocks(layer)]


def poison(cache, sequences=()):
    """NaN in every slot that none of `sequences` has a token in."""
    for layer, spec in enumerate(cache.spec.layers):
        block_size = cache.spec.groups[spec.group].block_size
        owned = np.zeros((cache.num_blocks[spec.group], block_size), bool)
        for sequence in sequences:
            position = np.arange(sequence.first_kept(spec.group), len(sequence))
            blocks = sequence.blocks(spec.group)
            owned[blocks[position // block_size], position % block_size] = True
        for array in stored(cache, layer):
            array.transpose(0, 2, 1, 3)[~owned] = np.nan


def random_kv(rng, num_tokens, spec, dtype="float32", magnitude=1.0):
    """K [T, H, D] and V [T, H, Dv] for a layer."""
    k = rng.standard_normal((num_tokens, spec.num_kv_heads, spec.head_dim)) * magnitude
    v = rng.standard_normal((num_tokens, spec.num_kv_heads, spec.head_dim_v))
    return k.astype(DTYPES[dtype]), v.astype(DTYPES[dtype])


def random_q(rng, num_tokens, num_heads, head_dim, dtype="float32", magnitude=1.0):
    q = rng.standard_normal((num_tokens, num_heads, head_dim)) * magnitude
    return q.astype(DTYPES[dtype])


def append_all(step, rng):
    """Appends random K and V to every layer that owns storage."""
    for layer, spec in enumerate(step.cache.spec.layers):
        if spec.kv_source == layer:
            step.append(layer, *random_kv(rng, step.num_tokens, spec))


def grow(cache, entries, rng):
    """One step of random contents."""
    with cache.step(entries) as step:
        append_all(step, rng)


def bits(array):
    """The array's bytes as unsigned ints, so that NaN and the sign of zero count."""
    array = np.ascontiguousarray(array)
    return array.view(np.dtype(f"u{array.itemsize}"))


def assert_same_bits(actual, expected, what=""):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    if not np.array_equal(bits(actual), bits(expected)):
        different = np.argwhere(bits(actual) != bits(expected))
        raise AssertionError(
            f"{what}: {len(different)} of {actual.size} elements differ, first at "
            f"{different[0].tolist()}: {actual[tuple(different[0])]!r} "
            f"instead of {expected[tuple(different[0])]!r}"
        )


def snapshot(cache, sequences):
    """Everything about idle sequences that a call which fails must leave alone."""
    gc.collect()
    cache.check()
    stats = cache.stats()
    counts = [(g.in_use, g.cached, g.free) for g in stats.groups]
    contents = []
    for sequence in sequences:
        groups = range(len(cache.spec.groups))
        contents.append([len(sequence), *(sequence.blocks(g).tolist() for g in groups)])
        for layer in range(cache.spec.num_layers):
            contents[-1] += [bits(array).tobytes() for array in sequence.read(layer)]
    return stats.num_sequences, stats.open_steps, counts, contents


def run_machines(*machines, examples, steps, until=lambda: True, rounds=5):
    """Runs state machines in rounds until `until()` holds; says whether it does.

    Chance decides which events a round brings, so that a rare one can be missing from any of them.
    """
    for _ in range(rounds):
        for machine in machines:
            run_state_machine_as_test(
                machine, settings=settings(max_examples=examples, stateful_step_count=steps)
            )
        if until():
            return True
    return False


def assert_balanced(cache):
    """in use + cached + free = total in every group, and the books recounted."""
    cache.check()
    counts = (*cache.num_blocks, *cache.num_raw_blocks)
    for total, group in zip(counts, cache.stats().groups, strict=True):
        assert group.in_use + group.cached + group.free == group.total == total
        assert min(group.in_use, group.cached, group.free) >= 0


def to_layout(rows, layout, query_starts, extra=0, padding=np.nan):
    """Ragged rows [T, H, D] in a layout; padded ones to the longest and `extra` more."""
    if layout in ("NHD", "HND"):
        return rows if layout == "NHD" else np.ascontiguousarray(rows.transpose(1, 0, 2))
    counts = np.diff(query_starts)
    padded = np.full((len(counts), counts.max() + extra, *rows.shape[1:]), padding, rows.dtype)
    for s, count in enumerate(counts):
        padded[s, :count] = rows[query_starts[s] : query_starts[s + 1]]
    return padded if layout == "BSHD" else np.ascontiguousarray(padded.transpose(0, 2, 1, 3))


def from_layout(array, layout, query_starts):
    """The ragged rows [T, H, D] of an array in a layout; its padding must be zero to the bit."""
    if layout in ("NHD", "HND"):
        return array if layout == "NHD" else array.transpose(1, 0, 2)
    array = array if layout == "BSHD" else array.transpose(0, 2, 1, 3)
    counts = np.diff(query_starts)
    for s, count in enumerate(counts):
        assert not bits(array[s, count:]).any(), f"padding of sequence {s}"
    return np.concatenate([array[s, :count] for s, count in enumerate(counts)])
