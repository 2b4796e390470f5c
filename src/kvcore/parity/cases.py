"""The contract: every case that a backend must pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from kvcore import GroupSpec
from kvcore.formats import FORMATS
from kvcore.parity.attention_cases import attention_case, merge_case, paged_case
from kvcore.parity.cache_case import CacheCase
from kvcore.parity.codec_cases import codec_case
from kvcore.parity.found import Case
from kvcore.parity.options import NAMES, WINDOW
from kvcore.parity.trace import (
    Begin,
    Fork,
    Free,
    Trace,
    Truncate,
    fill,
    rolled_back,
    step,
)

FLOATS = ("fp32", "fp16", "bf16")
LAYOUTS = ("HND", "BSHD", "BHSD")
#: What K of a channel format is paired with, and pairs of two formats that are recommended.
CHANNEL_V = "rot4"
MIXED = (("rot6", "rot4"), ("bf16", "rot4"), ("chan4", "rot3"), ("rot8", "fp32"))

# Long prompts reach beyond the first splits, short ones end inside a tile.
PREFILL: Trace = (step(a=75), step(a=70, b=33))
DECODE: Trace = (fill(a=530, b=5, c=130), step(a=1, b=1, c=1), step(c=1, a=1))
CHUNK: Trace = (fill(a=530, b=200), step(a=70, b=2))
RAGGED: Trace = (
    step(a=32, b=17),
    step(b=30, a=1, c=3),
    step(c=1, a=32, b=1),
    step(a=32, b=20),
    step(b=1, c=1, a=1),
)
APPEND: Trace = (fill(a=31), fill(a=1, b=100), fill(b=1, a=33), fill(a=30, b=27))


def pair(name: str) -> tuple[str, str]:
    """K's and V's format where one name stands for both."""
    return name, CHANNEL_V if FORMATS[name].kind == "channel" else name


def own_dtype(k: str) -> str:
    """The dtype that q, k and v have in a model whose cache is of this format."""
    return {"fp32": "float32", "fp16": "float16"}.get(k, "bfloat16")


def formats(k: str, v: str | None = None) -> dict[str, Any]:
    k, v = pair(k) if v is None else (k, v)
    return {"k_format": k, "v_format": v}


def _formats() -> Iterator[Case]:
    pairs = [pair(name) for name in FORMATS] + list(MIXED)
    for k, v in pairs:
        name = k if k == v else f"{k}+{v}"
        spec = formats(k, v)
        yield CacheCase(f"append/{name}", APPEND, spec)
        yield CacheCase(f"decode/{name}", DECODE, spec)
        shape = {**spec, "block_size": 64}
        yield CacheCase(f"prefill/{name}", PREFILL, spec, dtype=own_dtype(k))
        yield CacheCase(f"ragged/{name}", RAGGED, shape)
    for name in ("fp32", "bf16", "rot8", "chan4"):
        yield CacheCase(f"chunk/{name}", CHUNK, formats(name))
    bias = np.random.default_rng(0).normal(0, 3, (1, 2, 64))
    for name in ("int8", "fp8_e4m3", "int4", "rot8", "rot3", "chan4", "chan2"):
        shape = {**formats(name), "key_bias": bias}
        yield CacheCase(f"key-bias/{name}", RAGGED, shape)


def _options() -> Iterator[Case]:
    trace: Trace = (step(a=100, b=37, c=20), step(c=1, b=2, a=33), step(a=1, b=1, c=1))
    for name in NAMES:
        for spec in ("fp32", "bf16", "rot8"):
            yield CacheCase(f"options/{name}-{spec}", trace, formats(spec), options=(name,),
                            dtype=own_dtype(spec))  # fmt: skip
    shorter: Trace = (step(a=70, b=20, c=9), step(c=1, b=2, a=33))
    for two in itertools.combinations(NAMES, 2):
        yield CacheCase(f"options/{'+'.join(two)}", shorter, formats("fp16"), options=two)
    for spec in ("fp32", "bf16", "rot4", "chan4"):
        yield CacheCase(f"options/all-{spec}", trace, formats(spec), options=NAMES)


def _shapes() -> Iterator[Case]:
    trace: Trace = (step(a=70, b=5), step(a=1, b=20), step(b=1, a=1))
    for layout in LAYOUTS:
        for spec in ("fp16", "rot8"):
            yield CacheCase(f"layouts/{layout}-{spec}", trace, formats(spec), layout=layout,
                            dtype=own_dtype(spec))  # fmt: skip
    yield CacheCase("layouts/BHSD-all-options", trace, formats("bf16"), layout="BHSD",
                    options=NAMES)  # fmt: skip
    for group in (1, 3, 4, 8):
        for spec in ("fp32", "bf16", "rot4"):
            yield CacheCase(f"heads/{group}-{spec}", trace, formats(spec), group=group)
    for dim in (72, 80, 96, 128, 256):
        specs = ("fp32", "bf16", "rot8", "chan4") if dim == 128 else ("bf16",)
        for spec in specs:
            shape = {**formats(spec), "head_dim": dim}
            yield CacheCase(f"dims/{dim}-{spec}", trace, shape, dtype=own_dtype(spec))
    yield CacheCase("dims/96-64", trace, {**formats("bf16"), "head_dim": 96, "head_dim_v": 64},
                    dtype="bfloat16")  # fmt: skip
    for dtype in ("float32", "float16", "bfloat16"):
        for spec in ("fp32", "fp16", "bf16", "rot8"):
            yield CacheCase(f"dtypes/{dtype}-{spec}", trace, formats(spec), dtype=dtype)
    latent = {"num_kv_heads": 1, "head_dim": 576, "v_in_k": 512}
    for spec in FLOATS:
        yield CacheCase(f"latent/{spec}", (fill(a=80), step(a=1, b=9), step(a=2, b=1)),
                        {**latent, **formats(spec)}, group=16)  # fmt: skip
    yield CacheCase("latent/128-heads", (fill(a=33), step(a=1)), {**latent, **formats("bf16")},
                    group=128)  # fmt: skip
    # Many splits, then few, then many: what counts them must start anew.
    splits: Trace = (fill(a=1100, b=20), step(a=1, b=1), step(b=1), step(a=2))
    for spec in ("fp32", "bf16", "rot4", "chan4"):
        yield CacheCase(f"splits/{spec}", splits, formats(spec), dtype=own_dtype(spec))
    for size in (16, 256):
        yield CacheCase(f"blocks/{size}", RAGGED, {**formats("fp16"), "block_size": size})


def _sequences() -> Iterator[Case]:
    fork: Trace = (
        step(a=75),
        Fork("a", "b", 75),
        Fork("a", "c", 41),
        step(a=1, b=2, c=30),
        Truncate("a", 50),
        step(a=40, b=1),
        Free("b"),
        step(d=70, c=1),
    )
    lost: Trace = (fill(a=200), Truncate("a", 70), step(a=3), Fork("a", "b", 66), step(b=30, a=1))
    undone: Trace = (step(a=40), rolled_back(a=50, b=20), step(a=33), Fork("a", "c", 60),
                     rolled_back(c=1, a=1), step(c=2, a=1))  # fmt: skip
    for spec in ("fp32", "bf16", "rot8", "rot4", "chan4"):
        dtype = own_dtype(spec)
        yield CacheCase(f"sequences/fork-{spec}", fork, formats(spec), dtype=dtype)
        yield CacheCase(f"sequences/rolled-back-{spec}", undone, formats(spec), dtype=dtype)
    for spec in ("rot8", "rot4", "int4", "chan4", "chan2"):
        yield CacheCase(f"raw-rows/restored-{spec}", lost, {**formats(spec), "block_size": 64})
        for first, last in ((0, 0), (4, 64), (32, 0)):
            shape = {**formats(spec), "raw_first": first, "raw_last": last}
            yield CacheCase(f"raw-rows/{first}+{last}-{spec}", RAGGED, shape)
    for spec in ("bf16", "rot4"):
        kept = {**formats(spec), "groups": [GroupSpec(32, retention=WINDOW, slack=2)]}
        kept["layer_groups"] = [0]
        yield CacheCase(f"retention/{spec}", (step(a=70), step(a=60, b=45), Truncate("b", 44),
                        step(b=1, a=1)), kept, options=("window",))  # fmt: skip
    layers = {
        "num_layers": 3,
        "layer_formats": {0: ("bf16", "rot4"), 1: ("fp32", "fp32")},
        "kv_sources": {2: 0},
    }
    yield CacheCase("layers/formats-and-sources", RAGGED, layers)


def _unseen() -> Iterator[Case]:
    """NaN in tokens that some rows see and others do not."""
    trace: Trace = (step(a=100, b=33), step(b=1, a=1))
    nans = tuple(("a", token, 1, kind) for token in (57, 80) for kind in "kv")
    for spec in FLOATS:
        yield CacheCase(f"nan/causal-{spec}", trace, formats(spec), nans=nans)
        yield CacheCase(f"nan/only-v-{spec}", trace, formats(spec), nans=nans[1::2])
        for options in (("window",), ("mask",)):
            yield CacheCase(f"nan/{options[0]}-{spec}", trace, formats(spec), options=options,
                            nans=nans)  # fmt: skip


def _invariances() -> Iterator[Case]:
    """The bits of a token's output do not depend on company, sharing or, if exact, on chunks."""
    tails: Trace = (fill(a=540, b=40), step(a=1, b=2, c=20))
    alone: tuple[Trace, ...] = (
        (fill(a=540), step(a=1)),
        (fill(b=40), step(b=2)),
        (step(c=20),),
        (fill(a=540), fill(b=40), step(c=20, b=2, a=1)),
    )
    # Forks that lose no raw rows: these would come back decoded.
    shared: Trace = (fill(a=290), Fork("a", "b", 290), Fork("a", "c", 288), step(a=1, b=2, c=25))
    own: Trace = (
        *(Begin("a", name, length) for name, length in (("b", 290), ("c", 288))),
        fill(a=290),
        fill(b=290),
        fill(c=288),
        step(c=25, a=1, b=2),
    )
    whole: Trace = (step(a=110),)
    chunks: tuple[Trace, ...] = (
        (step(a=64), step(a=1), step(a=45)),
        (step(a=33), step(a=31), step(a=40), step(a=5), step(a=1)),
    )
    for spec in ("fp32", "fp16", "bf16", "fp8_e4m3", "rot4", "chan4"):
        shape = formats(spec)
        yield CacheCase(f"invariant/batch-{spec}", tails, shape, same=alone)
        yield CacheCase(f"invariant/sharing-{spec}", shared, shape, same=(own,))
        yield CacheCase(f"invariant/chunks-{spec}", whole, shape, exact=True, same=chunks)
    for spec in ("fp32", "bf16", "rot8"):
        yield CacheCase(f"invariant/prompts-{spec}", (step(a=70, b=40, c=1),), formats(spec),
                        same=((step(b=40),), (step(c=1, a=70),)))  # fmt: skip


def _arrays() -> Iterator[Case]:
    for name in FORMATS:
        yield codec_case(name, 128)
    for name in ("rot3", "rot6", "chan2"):  # units of another size than at 128
        yield codec_case(name, 64)
    for count, dim in ((1, 64), (5, 128), (70, 8)):
        yield merge_case(count, dim)
    for name, layout in itertools.product(FLOATS, ("HND", "NHD")):
        yield paged_case(name, layout)
    for dtype, layout in (("float32", "NHD"), ("float16", "HND"), ("bfloat16", "BSHD"),
                          ("float32", "BHSD")):  # fmt: skip
        yield attention_case(dtype, layout)


def _all() -> tuple[Case, ...]:
    topics = (_formats, _options, _shapes, _sequences, _unseen, _invariances, _arrays)
    return tuple(itertools.chain.from_iterable(topic() for topic in topics))


CASES: tuple[Case, ...] = _all()
