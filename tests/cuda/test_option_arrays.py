"""Slopes, sinks, positions and masks: sent once while they stay as they are, and else anew."""

from __future__ import annotations

import numpy as np
import pytest

import kvcore
from cuda_emulator.stand_in import StandIn
from kvcore import backend

LAYERS, HEADS, DIM = 2, 4, 64
SPEC = kvcore.CacheSpec(LAYERS, 2, DIM, k_format="fp32", v_format="fp32", block_size=16)
LENGTHS = [20, 7]


def step_outs(cache, sequences, rng, **options):
    """One more token of each sequence: the outs of the layers."""
    rows = rng.standard_normal((3, len(sequences), HEADS, DIM)).astype(np.float32)
    k, v, q = rows[0, :, :2], rows[1, :, :2], rows[2]
    with cache.step([(sequence, 1) for sequence in sequences]) as step:
        outs = []
        for layer in range(LAYERS):
            step.append(layer, k, v)
            outs.append(np.asarray(step.attend(layer, q, **options)).copy())
    return outs


@pytest.fixture
def caches(cuda_emulated):
    """A cache on the CPU and one on the emulator with the same texts, and their sequences."""
    found = []
    for name in ("cpu", "cuda"):
        cache, rng = kvcore.KVCache(SPEC, 16, backend=name), np.random.default_rng(0)
        sequences = [cache.sequence() for _ in LENGTHS]
        with cache.step(list(zip(sequences, LENGTHS, strict=True))) as step:
            for layer in range(LAYERS):
                rows = rng.standard_normal((2, sum(LENGTHS), 2, DIM)).astype(np.float32)
                step.append(layer, *rows)
        found.append((cache, sequences))
    return found


def masks(lengths, rng):
    return [rng.random((1, length)) < 0.7 for length in lengths]


def given(name, lengths, rng):
    """An option's value for a step after which sequences are so long."""
    if name == "mask":
        return masks(lengths, rng)
    if name == "positions":
        return rng.integers(0, 40, len(lengths)).astype(np.int32)
    return rng.standard_normal(HEADS).astype(np.float32)


def change(name, value):
    """Other contents in the same memory."""
    if name == "mask":
        for entry in value:
            entry ^= True
    elif name == "positions":
        value += 3
    else:
        value *= -1


@pytest.mark.parametrize("name", ["sinks", "alibi_slopes", "positions", "mask"])
def test_what_changes_in_place_is_seen(caches, name):
    rng = np.random.default_rng(1)
    extra = {"alibi_slopes": np.full(HEADS, 0.25, np.float32)} if name == "positions" else {}
    lengths = [n + 1 for n in LENGTHS]
    value = given(name, lengths, rng)
    seen = []
    for turn in range(4):
        if turn % 2:
            change(name, value)
        # The same lengths each time: what the step has appended is dropped again.
        results = []
        for cache, sequences in caches:
            step_rng = np.random.default_rng(7)
            results.append(step_outs(cache, sequences, step_rng, **{name: value}, **extra))
            for sequence, length in zip(sequences, LENGTHS, strict=True):
                sequence.truncate(length)
        for mine, theirs in zip(*results, strict=True):
            np.testing.assert_allclose(theirs, mine, rtol=2e-5, atol=2e-6)
        seen.append(results[1][1])
    assert not np.array_equal(seen[0], seen[1]) and np.array_equal(seen[1], seen[2])


def test_masks_of_other_lengths_are_refused_again(caches):
    """The bits of a mask that was taken once do not stand for another sequence's."""
    cache, sequences = caches[1]
    value = masks([n + 1 for n in LENGTHS], np.random.default_rng(1))
    step_outs(cache, sequences, np.random.default_rng(7), mask=value)
    with pytest.raises(kvcore.InvalidArgument, match=r"^mask\[0\]"):
        step_outs(cache, sequences, np.random.default_rng(7), mask=value)


class TestOnADevice:
    """Over the stand-in for a driver, which counts."""

    @pytest.fixture
    def stand_in(self, monkeypatch):
        pytest.importorskip("cupy")
        from kvcore_gpu.backend import CudaBackend
        from kvcore_gpu.cupy_runtime import CupyRuntime

        stand_in = StandIn(monkeypatch)
        monkeypatch.setitem(backend._loaded, "cuda", CudaBackend(CupyRuntime()))
        return stand_in

    def attend_all(self, stand_in, cache, sequence, **options):
        k, q = stand_in.array((1, 2, DIM)), stand_in.array((1, HEADS, DIM))
        out = stand_in.array((1, HEADS, DIM))
        step = cache.step([(sequence, 1)])
        for layer in range(LAYERS):
            step.append(layer, k, k)
        stand_in.copies.clear()
        allocations = stand_in.allocations
        for layer in range(LAYERS):
            step.attend(layer, q, out=out, **options)
        step.rollback()
        return len(stand_in.copies), stand_in.allocations - allocations

    @pytest.mark.parametrize(
        ("options", "copies"),
        [
            ({"positions": np.zeros(1, np.int32)}, 1),
            ({"mask": [np.ones((1, 1), bool)]}, 1),
            ({"mask": [None]}, 0),
            ({"sinks": np.zeros(HEADS, np.float32)}, 0),
            ({"alibi_slopes": [0.5] * HEADS}, 0),
        ],
        ids=["positions", "mask", "no mask", "sinks", "slopes"],
    )
    def test_layers_share_what_is_sent(self, stand_in, options, copies):
        cache = kvcore.KVCache(SPEC, 16, backend="cuda")
        sequence = cache.sequence()
        first, _ = self.attend_all(stand_in, cache, sequence, **options)
        assert first == copies
        assert self.attend_all(stand_in, cache, sequence, **options) == (0, 0)

    def test_a_graph_takes_nothing_that_goes_with_the_next_call(self, stand_in):
        cache = kvcore.KVCache(SPEC, 16, backend="cuda")
        sequence, positions = cache.sequence(), np.zeros(1, np.int32)
        k, q = stand_in.array((1, 2, DIM)), stand_in.array((1, HEADS, DIM))
        with cache.step([(sequence, 1)]) as step:
            for layer in range(LAYERS):
                step.append(layer, k, k)
                step.attend(layer, q, out=q, positions=positions)
            stand_in.capturing = True
            with pytest.raises(kvcore.StepError, match="as arrays of the device"):
                step.attend(0, q, out=q, positions=positions)
            stand_in.capturing = False
