"""kernels/append.cu and read.cu beside the CPU: the bytes of blocks and raw rows, and what is read.

Each case is a life of some sequences, played with BothBackends, which does every operation on both
and compares.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

import kvcore
import kvcore.backend
from both_backends import BothBackends
from cuda_emulator.runtime import EmulatedRuntime
from kvcore import CacheSpec, GroupSpec, KVCache
from support import BFLOAT16, to_layout

# Every format once or more, with head_dims of K and V.
PAIRS = [
    ("chan4", "rot4", 64, 64), ("chan2", "int8", 64, 64), ("int8_static", "rot3", 80, 192),
    ("rot8", "int4", 96, 64), ("rot6", "fp8_e4m3", 64, 64), ("fp32", "fp16", 80, 8),
    ("bf16", "rot2", 64, 64),
]  # fmt: skip
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), BFLOAT16]
HEADS = 3


def make_spec(rng: np.random.Generator, pair: tuple[str, str, int, int], **options: Any) -> Any:
    k_format, v_format, head_dim, head_dim_v = pair
    if k_format == "int8_static":
        options["key_scales"] = np.exp(rng.standard_normal((1, HEADS, head_dim)) - 4)
    return CacheSpec(
        1, HEADS, head_dim, head_dim_v, k_format=k_format, v_format=v_format, **options
    )


def make_cache(
    monkeypatch: pytest.MonkeyPatch, runtime: EmulatedRuntime, spec: Any
) -> tuple[KVCache, BothBackends]:
    backend = BothBackends(runtime)
    monkeypatch.setitem(kvcore.backend._loaded, "cpu", backend)
    return KVCache(spec, num_blocks=40), backend


def rows(rng: np.random.Generator, count: int, head_dim: int, dtype: np.dtype) -> np.ndarray:
    """Of all magnitudes that float16 has, with single large elements."""
    x = rng.standard_normal((count, HEADS, head_dim)) * 10.0 ** rng.uniform(
        -5, 2, (count, HEADS, 1)
    )
    x[rng.integers(count), rng.integers(HEADS), rng.integers(head_dim)] = 3e4
    return x.astype(dtype)


def grow(
    cache: KVCache,
    entries: list[tuple[Any, int]],
    rng: np.random.Generator,
    dtype: np.dtype = DTYPES[0],
    layout: str = "NHD",
) -> None:
    layer = cache.spec.layers[0]
    with cache.step(entries) as step:
        given = [
            to_layout(rows(rng, step.num_tokens, d, dtype), layout, step.query_starts, extra=1)
            for d in (layer.head_dim, layer.head_dim_v)
        ]
        step.append(0, given[0], None if layer.v_in_k else given[1], layout=layout)


def live(cache: KVCache, rng: np.random.Generator) -> None:
    """Prompts, tokens one by one over the end of a group, a fork, a cut into sealed groups."""
    a, b, c = (cache.sequence() for _ in range(3))
    grow(cache, [(a, 70), (b, 3), (c, 29)], rng)
    for i in range(4):
        grow(cache, [(c, 1), (a, 1)], rng, DTYPES[i % 3])
    d = a.fork()
    grow(cache, [(d, 40), (a, 2), (b, 45)], rng, DTYPES[2])
    for sequence in (a, b, c, d):
        sequence.read(0)
    d.truncate(50)
    d.read(0)
    grow(cache, [(d, 20)], rng, DTYPES[1])
    d.read(0)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(map(str, pair)))
def test_a_life_of_sequences(
    monkeypatch: pytest.MonkeyPatch, runtime: EmulatedRuntime, pair: tuple[str, str, int, int]
) -> None:
    rng = np.random.default_rng(pair[2])
    cache, backend = make_cache(monkeypatch, runtime, make_spec(rng, pair))
    live(cache, rng)
    assert backend.mirror.not_finite[0] == 0
    assert (cache.stats().reencoded_rows > 0) == (cache.spec.raw_last > 0)


@pytest.mark.parametrize("layout", ["NHD", "HND", "BSHD", "BHSD"])
def test_layouts(monkeypatch: pytest.MonkeyPatch, runtime: EmulatedRuntime, layout: str) -> None:
    rng = np.random.default_rng(1)
    cache, _ = make_cache(monkeypatch, runtime, make_spec(rng, PAIRS[0]))
    a, b, c = (cache.sequence() for _ in range(3))
    for dtype in DTYPES:
        grow(cache, [(a, 1), (b, 33), (c, 12)], rng, dtype, layout)


@pytest.mark.parametrize(
    ("raw_first", "raw_last", "block_size"), [(0, 0, 32), (1, 64, 256), (32, 32, 64)]
)
def test_raw_rows(
    monkeypatch: pytest.MonkeyPatch,
    runtime: EmulatedRuntime,
    raw_first: int,
    raw_last: int,
    block_size: int,
) -> None:
    rng = np.random.default_rng(2)
    spec = make_spec(
        rng, PAIRS[0], raw_first=raw_first, raw_last=raw_last, block_size=block_size
    )  # fmt: skip
    cache, _ = make_cache(monkeypatch, runtime, spec)
    live(cache, rng)
    almost = cache.sequence()
    grow(cache, [(almost, 63)], rng)
    almost.read(0)  # with its last group unsealed


def test_a_bias_and_a_retention(monkeypatch: pytest.MonkeyPatch, runtime: EmulatedRuntime) -> None:
    rng = np.random.default_rng(3)
    bias = rng.standard_normal((1, HEADS, 64))
    spec = make_spec(rng, PAIRS[0], key_bias=bias, groups=[GroupSpec(32, 40)])
    cache, _ = make_cache(monkeypatch, runtime, spec)
    a = cache.sequence()
    for count in (100, 1, 30, 1):
        grow(cache, [(a, count)], rng)
        a.read(0)


def test_v_in_k(monkeypatch: pytest.MonkeyPatch, runtime: EmulatedRuntime) -> None:
    rng = np.random.default_rng(4)
    cache, _ = make_cache(monkeypatch, runtime, CacheSpec(1, HEADS, 576, v_in_k=512))
    a = cache.sequence()
    grow(cache, [(a, 17)], rng, DTYPES[0])
    grow(cache, [(a, 1)], rng, DTYPES[2])
    a.read(0)


@pytest.mark.parametrize("saturate", [False, True])
def test_what_is_not_finite_saturates_and_is_flagged(
    monkeypatch: pytest.MonkeyPatch, runtime: EmulatedRuntime, saturate: bool
) -> None:
    rng = np.random.default_rng(5)
    spec = make_spec(rng, PAIRS[0], saturate=saturate)
    cache, backend = make_cache(monkeypatch, runtime, spec)
    k, v = (rows(rng, 40, 64, DTYPES[0]) for _ in range(2))
    wild = k.copy()
    for t, value, instead in [(3, np.nan, 0), (35, np.inf, 65504), (36, -np.inf, -65504)]:
        wild[t, 1, 7], k[t, 1, 7] = value, instead
    with cache.step([(cache.sequence(), 40)]) as step:
        step.append(0, k, v)
        assert backend.mirror.not_finite[0] == 0
        backend.cuda.append(backend.mirror, 0, step.plan(), wild, v, "NHD")
    backend.compare(cache._storage, "append of NaN")
    assert backend.mirror.not_finite[0] == (0 if saturate else 1)


def test_slots_of_minus_one_are_skipped(
    monkeypatch: pytest.MonkeyPatch, runtime: EmulatedRuntime
) -> None:
    rng = np.random.default_rng(6)
    cache, backend = make_cache(monkeypatch, runtime, make_spec(rng, PAIRS[6]))
    with cache.step([(cache.sequence(), 5)]) as step:
        k, v = (rows(rng, 5, 64, DTYPES[0]) for _ in range(2))
        step.append(0, k, v)
        plan = step.plan()
        for address in (plan.device.slots, plan.device.raw_slots):
            (ctypes.c_int32 * 5).from_address(address)[:] = [-1] * 5
        backend.cuda.append(backend.mirror, 0, plan, -k, -v, "NHD")
    backend.compare(cache._storage, "append to nowhere")


def test_no_races_in_any_order(monkeypatch: pytest.MonkeyPatch, checked: EmulatedRuntime) -> None:
    rng = np.random.default_rng(7)
    cache, _ = make_cache(monkeypatch, checked, make_spec(rng, PAIRS[0]))
    a, b = cache.sequence(), cache.sequence()
    grow(cache, [(a, 33), (b, 5)], rng)
    a.read(0)
