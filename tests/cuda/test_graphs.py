"""Decode steps as CUDA graphs: launches recorded once serve later steps of the same key."""

from __future__ import annotations

import numpy as np
import pytest

import kvcore
from support import assert_same_bits

SPEC = kvcore.CacheSpec(2, 2, 64, k_format="rot8", v_format="bf16", block_size=16)
LENGTHS = [100, 37, 5]
STEPS = 8


class Tape:
    """Stands for a captured graph: launches with the parameters that they had, run again."""

    def __init__(self, runtime, monkeypatch):
        self.launches = []
        self._runtime, self._monkeypatch = runtime, monkeypatch

    def __enter__(self):
        self._patch = self._monkeypatch.context()
        patch = self._patch.__enter__()
        self._launch = self._runtime.launch
        patch.setattr(self._runtime, "launch", self._record)
        patch.setattr(self._runtime, "stage", self._refuse)
        patch.setattr(self._runtime, "to_host", self._refuse)

    def __exit__(self, *error):
        self._patch.__exit__(*error)

    def _record(self, function, grid, block, shared_bytes, params):
        self.launches.append((function, grid, block, shared_bytes, type(params), bytes(params)))

    def _refuse(self, *_):
        raise AssertionError("a capture neither sends nor waits")

    def replay(self):
        for function, grid, block, shared_bytes, kind, data in self.launches:
            self._launch(function, grid, block, shared_bytes, kind.from_buffer_copy(data))


def prefill(cache, rng):
    sequences = [cache.sequence() for _ in LENGTHS]
    with cache.step(list(zip(sequences, LENGTHS, strict=True))) as step:
        for layer in range(2):
            rows = rng.standard_normal((2, step.num_tokens, 2, 64)).astype(np.float32)
            step.append(layer, *map(cache.backend.xp.asarray, rows))
    return sequences


class Decode:
    """One decode step over arrays at fixed addresses, as a captured model has them."""

    def __init__(self, cache):
        empty = cache.backend.xp.zeros
        count = len(LENGTHS)
        self.kv = empty((2, 2, count, 2, 64), np.float32)
        self.q = empty((2, count, 4, 64), np.float32)
        self.out = empty((2, count, 4, 64), np.float32)

    def run(self, step):
        for layer in range(2):
            step.append(layer, *self.kv[layer])
            step.attend(layer, self.q[layer], out=self.out[layer])


def inputs(xp, seed):
    rng = np.random.default_rng(seed)
    shapes = (2, 2, len(LENGTHS), 2, 64), (2, len(LENGTHS), 4, 64)
    return [xp.asarray(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]


def play(cache, sequences, graphs, capture):
    """STEPS decode steps; each replays the graph of its key or makes one. The outs, and replays."""
    decode = Decode(cache)
    outs, replays = [], 0
    for number in range(STEPS):
        decode.kv[...], decode.q[...] = inputs(cache.backend.xp, number)
        with cache.step([(sequence, 1) for sequence in sequences]) as step:
            graph = graphs.get(step.graph_key) if graphs is not None else None
            if graph is not None:
                replays += 1
                step.mark_appended()
            elif graphs is not None and number > 0:  # the first step compiles and allocates
                graph = graphs[step.graph_key] = capture(lambda step=step: decode.run(step))
            if graph is None:
                decode.run(step)
            else:
                graph()
            outs.append(decode.out.copy())
    return outs, replays


def test_replayed_launches_give_the_same_bits(cuda_emulated, monkeypatch):
    def capture(body):
        tape = Tape(cuda_emulated.runtime, monkeypatch)
        with tape:
            body()
        return tape.replay

    rng = np.random.default_rng(0)
    cache = kvcore.KVCache(SPEC, 64, backend="cuda")
    sequences = prefill(cache, rng)
    twins = [sequence.fork() for sequence in sequences]
    expected, _ = play(cache, twins, None, None)
    graphs = {}
    outs, replays = play(cache, sequences, graphs, capture)
    assert replays >= STEPS - 3 and len(graphs) >= 1
    for actual, wanted in zip(outs, expected, strict=True):
        assert_same_bits(actual, wanted)
    for sequence, twin in zip(sequences, twins, strict=True):
        for layer in range(2):
            for held, wanted in zip(sequence.read(layer), twin.read(layer), strict=True):
                assert_same_bits(held, wanted)


@pytest.mark.gpu
def test_captured_graphs_give_the_same_bits():
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)

    def capture(body):
        stream.begin_capture()
        body()
        graph = stream.end_capture()
        return lambda: graph.launch(stream)

    rng = np.random.default_rng(0)
    with stream:
        cache = kvcore.KVCache(SPEC, 64, backend="cuda")
        sequences = prefill(cache, rng)
        twins = [sequence.fork() for sequence in sequences]
        expected, _ = play(cache, twins, None, None)
        outs, replays = play(cache, sequences, {}, capture)
        assert replays >= STEPS - 3
        for actual, wanted in zip(outs, expected, strict=True):
            assert_same_bits(actual.get(), wanted.get())
