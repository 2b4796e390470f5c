"""kvcore by its public face, and the machine's limit over the very same memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bench.cases import Case
from bench.formats import is_quantized
from bench.machine import Waits
from bench.measure import Cursor, Task, Timing
from bench.peers import Workload
from bench.roof import Roof
from kvcore import KVCache, Sequence, set_num_threads
from kvcore.spec import RAW_BLOCK_SIZE

#: New tokens of a step while a cache is filled: raw rows take blocks for all of them.
FILL_TOKENS = 2048


def prepare(workload: Workload, roof: Roof) -> dict[str, Task]:
    """The tasks "kvcore" and "roof".

    Also "kvcore-private" for a case that shares tokens, and "kvcore-bf16" beside quantized formats.
    """
    set_num_threads(workload.num_threads, oversubscribe=True)
    case, cache = workload.case, _new_cache(workload)
    cursor = Cursor(workload.num_layers)
    if case.kind == "append":
        return {
            "kvcore": AppendTask(workload, cache),
            "roof": ReadTask(roof, workload, cache, cursor),
        }
    tasks: dict[str, Task] = {"kvcore": AttendTask(workload, cache, cursor)}
    if case.shared:
        tasks["kvcore-private"] = _other(replace(workload, case=replace(case, shared=0)))
    if is_quantized(workload.kv_format):
        tasks["kvcore-bf16"] = _other(replace(workload, kv_format="bf16"))
    if case.kind == "prefill":
        return tasks | {"roof": ComputeTask(roof, case)}
    return tasks | {"roof": ReadTask(roof, workload, cache, cursor)}


class AttendTask(Task):
    """`Step.attend` in a step whose layers have all been appended."""

    def __init__(self, workload: Workload, cache: KVCache, cursor: Cursor) -> None:
        case, data = workload.case, workload.data
        self._cursor, self._layer = cursor, 0
        self._q = data.q
        self._out = np.empty_like(data.q)
        sequences = _fill(cache, workload)
        self._step = cache.step(list(zip(sequences, case.new, strict=True)))
        k, v = data.new(case)
        for layer in range(workload.num_layers):
            self._step.append(layer, k, v)

    def prepare(self) -> None:
        self._layer = self._cursor.next()

    def run(self) -> None:
        self._step.attend(self._layer, self._q, out=self._out)

    def output(self) -> np.ndarray:
        self.run()
        return self._out

    def close(self) -> None:
        self._step.rollback()


class AppendTask(Task):
    """`Step.append` of layer after layer; a step that is full is rolled back for the next."""

    def __init__(self, workload: Workload, cache: KVCache) -> None:
        case = workload.case
        self._cache = cache
        self._num_layers = workload.num_layers
        self._k, self._v = workload.data.new(case)
        self._entries = list(zip(_fill(cache, workload), case.new, strict=True))
        self._step = cache.step(self._entries)
        for layer in range(self._num_layers):  # the system gives pages when they are first written
            self._step.append(layer, self._k, self._v)
        self._layer = self._num_layers - 1

    def prepare(self) -> None:
        self._layer += 1
        if self._layer == self._num_layers:
            self._step.rollback()
            self._step = self._cache.step(self._entries)
            self._layer = 0

    def run(self) -> None:
        self._step.append(self._layer, self._k, self._v)

    def close(self) -> None:
        self._step.rollback()


class ReadTask(Task):
    """Reads as many bytes of kvcore's own storage as the call must touch.

    The same memory, because which pages a buffer got can decide how fast it is read.
    """

    def __init__(self, roof: Roof, workload: Workload, cache: KVCache, cursor: Cursor) -> None:
        self._roof, self._cursor = roof, cursor
        case, kv_format = workload.case, workload.kv_format
        self._layers = []
        for layer in range(cache.spec.num_layers):
            sides = zip(cache.blocks(layer), case.stored_bytes(kv_format), strict=True)
            arrays = [array.reshape(-1).view(np.uint8)[:nbytes] for array, nbytes in sides]
            # The cache does not show where its raw rows lie: other memory stands for them.
            arrays.append(np.ones(case.raw_bytes(kv_format), np.uint8))
            self._layers.append(arrays)
        self._arrays = self._layers[0]

    def prepare(self) -> None:
        self._arrays = self._layers[self._cursor.next()]

    def run(self) -> None:
        self._roof.read(self._arrays)

    def time(self, waits: Waits) -> Timing:
        return self._roof.read(self._arrays)


class ComputeTask(Task):
    """Multiplies and adds on registers, as many times as the call must."""

    def __init__(self, roof: Roof, case: Case) -> None:
        self._roof, self._flops = roof, case.flops

    def run(self) -> None:
        self._roof.compute(self._flops)

    def time(self, waits: Waits) -> Timing:
        return self._roof.compute(self._flops)


def _other(workload: Workload) -> AttendTask:
    """A task with a cache of its own."""
    return AttendTask(workload, _new_cache(workload), Cursor(workload.num_layers))


def _new_cache(workload: Workload) -> KVCache:
    case = workload.case
    shared_blocks = case.shared // case.block_size
    num_blocks = sum(-(-n // case.block_size) - shared_blocks for n in case.seq_lens)
    num_blocks += -(-case.shared // case.block_size)  # a partial block is copied for each fork
    spec = case.spec(workload.kv_format, workload.num_layers, workload.data)
    num_raw_blocks = None
    if spec.raw_groups:  # for every token: those of a step, and while blocks are shuffled
        num_raw_blocks = num_blocks * max(1, case.block_size // RAW_BLOCK_SIZE)
    cache = KVCache(spec, num_blocks=num_blocks, num_raw_blocks=num_raw_blocks)
    _scatter(cache)
    return cache


def _scatter(cache: KVCache) -> None:
    """Shuffles the free blocks, as they are in a cache that has been in use for a while."""
    sequences = [cache.sequence() for _ in range(cache.num_blocks[0])]
    steps = [cache.step([(sequence, 1)]) for sequence in sequences]
    for place in np.random.default_rng(1).permutation(len(steps)):
        steps[place].rollback()
    for sequence in sequences:
        sequence.free()


def _fill(cache: KVCache, workload: Workload) -> list[Sequence]:
    """Sequences with the case's stored tokens; every layer holds the same."""
    case, data = workload.case, workload.data
    prefix = cache.sequence()
    _extend(cache, prefix, data.k[0][: case.shared], data.v[0][: case.shared])
    sequences = []
    for k, v, count in zip(data.k, data.v, case.stored, strict=True):
        sequences.append(prefix.fork())
        _extend(cache, sequences[-1], k[case.shared : count], v[case.shared : count])
    prefix.free()
    return sequences


def _extend(cache: KVCache, sequence: Sequence, k: np.ndarray, v: np.ndarray) -> None:
    for start in range(0, len(k), FILL_TOKENS):
        part = slice(start, min(start + FILL_TOKENS, len(k)))
        with cache.step([(sequence, part.stop - start)]) as step:
            for layer in range(cache.spec.num_layers):
                step.append(layer, k[part], v[part])
