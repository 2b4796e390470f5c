"""The CPU at hand as a Device, measured live."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np

import kvcore
from kvcore import ops
from kvcore.planner.cost import decode_attention
from kvcore.planner.device import Device
from kvcore.planner.model import Model
from kvcore.spec import CacheSpec
from kvcore.units import available_memory

#: More than any last level cache holds of one array.
READ_BYTES = 512 << 20
MATRIX = 1536
MIN_ROUNDS, SECONDS = 7, 0.3
#: Tokens of the caches that attention is measured on, by their bytes in one layer.
ATTENTION_BYTES = 256 << 20


def measure_cpu(model: Model, spec: CacheSpec) -> Device:
    """This machine, with the threads that kvcore uses.

    Reading is measured by one row through `ops.linear`, which reads each weight once; arithmetic by
    a float32 matrix product; and how near decode attention comes to the first by a step over one
    layer of `spec`, a cache of `model`. A few seconds, and the better the quieter the machine.
    """
    bandwidth = _read_rate()
    flops = _matmul_rate()
    layer = CacheSpec(
        1,
        spec.layers[0].num_kv_heads,
        spec.layers[0].head_dim,
        v_in_k=spec.layers[0].v_in_k or None,
        block_size=spec.groups[0].block_size,
        k_format=spec.layers[0].k_format,
        v_format=spec.layers[0].v_format,
    )
    tokens = max(2048, min(65536, ATTENTION_BYTES // layer.bytes_per_token))
    seconds = _attention_seconds(layer, model.num_heads, tokens)
    one = Model(
        "layer", 1, model.hidden_size, model.num_heads, model.num_kv_heads, model.head_dim,
        model.intermediate_size, model.vocab_size, model.max_context, latent=model.latent,
    )  # fmt: skip
    share = decode_attention(one, layer, tokens).nbytes / bandwidth / seconds
    memory = available_memory()
    return Device(
        "cpu",
        memory=memory,
        bandwidth=bandwidth,
        fp16_flops=flops,
        fp8_flops=None,
        multiprocessors=kvcore.get_num_threads(),
        shared_memory=0,
        l2=0,
        link_bandwidth=bandwidth,
        host_bandwidth=bandwidth,
        source=f"measured: {kvcore.get_num_threads()} threads, {kvcore.get_isa()} kernels",
        attention_share=min(1.0, share),
    )


def _best(work: Callable[[], object]) -> float:
    """Seconds of the best of several rounds: others' load takes from it and adds nothing."""
    return min(_rounds(work))


def _rounds(work: Callable[[], object]) -> list[float]:
    work()
    found: list[float] = []
    while len(found) < MIN_ROUNDS or sum(found) < SECONDS:
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return found


def _read_rate() -> float:
    columns = 4096
    weights = np.ones((READ_BYTES // 4 // columns, columns), np.float32)
    x = np.ones((1, columns), np.float32)
    return weights.nbytes / _best(lambda: ops.linear(x, weights))


def _matmul_rate() -> float:
    a = np.random.default_rng(0).standard_normal((MATRIX, MATRIX), np.float32)
    return 2 * MATRIX**3 / _best(lambda: a @ a)


def _attention_seconds(spec: CacheSpec, num_heads: int, tokens: int) -> float:
    """A decode step over one layer, the median."""
    layer = spec.layers[0]
    rng = np.random.default_rng(0)
    chunk = 2048
    blocks = -(-(tokens + 1) // spec.groups[0].block_size)
    cache = kvcore.KVCache(spec, blocks)
    sequence = cache.sequence()
    k = rng.standard_normal((chunk, layer.num_kv_heads, layer.head_dim), np.float32)
    v = None if layer.v_in_k else k[..., : layer.head_dim_v]
    for begin in range(0, tokens, chunk):
        n = min(chunk, tokens - begin)
        with cache.step([(sequence, n)]) as step:
            step.append(0, k[:n], None if v is None else v[:n])
    q = rng.standard_normal((1, num_heads, layer.head_dim), np.float32)
    with cache.step([(sequence, 1)]) as step:
        step.append(0, k[:1], None if v is None else v[:1])
        return median(_rounds(lambda: step.attend(0, q)))
