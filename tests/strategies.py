"""What hypothesis draws: attention problems, cache specs, cuts of a prompt."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

import kvcore

FORMATS = ("fp32", "fp16", "bf16")
DTYPES = ("float32", "float16", "bfloat16")
LAYOUTS = ("NHD", "HND", "BSHD", "BHSD")

head_dims = st.integers(2, 32).map(lambda n: 8 * n)
block_sizes = st.sampled_from([16, 32, 64, 128, 256, 512, 1024])
seeds = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Problem:
    """A ragged step over sequences that already hold something.

    Attributes:
        contexts: tokens that each sequence holds before the step.
        news: tokens that the step adds to each.
    """

    num_kv_heads: int
    ratio: int
    head_dim: int
    head_dim_v: int
    block_size: int
    k_format: str
    v_format: str
    kv_dtype: str
    q_dtype: str
    contexts: tuple[int, ...]
    news: tuple[int, ...]
    magnitude: float
    scale: float | None
    layout: str
    num_threads: int
    seed: int

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.ratio

    @property
    def lengths(self) -> list[int]:
        return [c + n for c, n in zip(self.contexts, self.news, strict=True)]

    def spec(self, **changes) -> kvcore.CacheSpec:
        return kvcore.CacheSpec(
            1,
            self.num_kv_heads,
            self.head_dim,
            self.head_dim_v,
            **{
                "block_size": self.block_size,
                "k_format": self.k_format,
                "v_format": self.v_format,
                **changes,
            },
        )

    def blocks_needed(self, block_size=None) -> int:
        size = block_size or self.block_size
        return sum(-(-length // size) for length in self.lengths)


@st.composite
def problems(draw, max_context=3000, max_work=40_000_000) -> Problem:
    """Problems of at most `max_work` products q . k element by element."""
    count = draw(st.integers(1, 5))
    num_kv_heads = draw(st.integers(1, 4))
    head_dim = draw(head_dims)
    work = 0
    contexts, news = [], []
    ratio = draw(st.integers(1, 16))
    budget = max_work // (num_kv_heads * ratio * head_dim)
    for _ in range(count):
        context = draw(st.one_of(st.integers(0, 80), st.integers(0, max_context)))
        new = draw(st.one_of(st.just(1), st.integers(1, 16), st.integers(1, 300)))
        new = min(new, max(1, (budget - work) // (context + 300)))
        work += new * (context + new)
        contexts.append(context)
        news.append(new)
    return Problem(
        num_kv_heads=num_kv_heads,
        ratio=ratio,
        head_dim=head_dim,
        head_dim_v=draw(st.one_of(st.just(head_dim), head_dims)),
        block_size=draw(block_sizes),
        k_format=draw(st.sampled_from(FORMATS)),
        v_format=draw(st.sampled_from(FORMATS)),
        kv_dtype=draw(st.sampled_from(DTYPES)),
        q_dtype=draw(st.sampled_from(DTYPES)),
        contexts=tuple(contexts),
        news=tuple(news),
        # Beyond these, scores cancel: see test_scores_that_cancel in test_attention.py.
        magnitude=draw(st.sampled_from([1.0, 0.05])),
        scale=draw(st.sampled_from([None, None, 0.1, -0.1, 0.0])),
        layout=draw(st.sampled_from(LAYOUTS)),
        num_threads=draw(st.integers(1, 4)),
        seed=draw(seeds),
    )


#: Every option of attend beside scale; `options` draws from them.
OPTIONS = ("softcap", "alibi_slopes", "window", "causal", "mask", "positions", "sinks")


@st.composite
def options(draw, problem: Problem) -> dict[str, object]:
    """Options of attend for a problem, mostly two of them together."""
    count = draw(st.sampled_from([1, 2, 2, 2, 3, len(OPTIONS)]))
    chosen = draw(st.permutations(OPTIONS))[:count]
    rng = np.random.default_rng(draw(seeds))
    drawn: dict[str, object] = {}
    if "softcap" in chosen:
        drawn["softcap"] = draw(st.sampled_from([0.25, 1.0, 30.0, 50.0]))
    if "alibi_slopes" in chosen:
        drawn["alibi_slopes"] = rng.uniform(-0.01, 0.1, problem.num_heads)
    if "window" in chosen:
        drawn["window"] = draw(st.one_of(st.integers(1, 40), st.integers(1, 4000)))
    if "causal" in chosen:
        drawn["causal"] = False
    if "mask" in chosen:
        density = draw(st.sampled_from([0.0, 0.01, 0.5, 0.97, 1.0]))
        shapes = zip(problem.news, problem.lengths, strict=True)
        drawn["mask"] = [
            rng.random(shape) < density if draw(st.integers(0, 3)) else None for shape in shapes
        ]
    if "positions" in chosen:
        places = zip(problem.contexts, problem.news, strict=True)
        drawn["positions"] = np.concatenate([c + rng.integers(0, n, n) for c, n in places])
    if "sinks" in chosen:
        drawn["sinks"] = rng.uniform(-4, 4, problem.num_heads).astype("f4")
    return drawn


@st.composite
def cuts(draw, length: int, most=6) -> list[int]:
    """Sizes of consecutive chunks that make up `length`."""
    inner = draw(st.sets(st.integers(1, length - 1), max_size=most - 1)) if length > 1 else set()
    edges = [0, *sorted(inner), length]
    return [b - a for a, b in itertools.pairwise(edges)]


@st.composite
def specs(draw) -> kvcore.CacheSpec:
    """Specs of up to 6 layers and 3 groups, small enough to allocate."""
    num_layers = draw(st.integers(1, 6))
    num_groups = draw(st.integers(1, min(3, num_layers)))
    groups = [kvcore.GroupSpec(draw(st.sampled_from([16, 32, 64]))) for _ in range(num_groups)]
    owners = [*range(num_groups), *draw_list(draw, num_layers - num_groups, num_groups - 1)]
    heads, dims, dims_v = [], [], []
    sources = {}
    for layer in range(num_layers):
        heads.append(draw(st.integers(1, 4)))
        dims.append(8 * draw(st.integers(1, 16)))
        dims_v.append(8 * draw(st.integers(1, 16)))
        candidates = [s for s in range(layer) if owners[s] == owners[layer] and s not in sources]
        if candidates and draw(st.integers(0, 3)) == 0:
            source = draw(st.sampled_from(candidates))
            sources[layer] = source
            heads[-1], dims[-1], dims_v[-1] = heads[source], dims[source], dims_v[source]
    formats = st.tuples(st.sampled_from(FORMATS), st.sampled_from(FORMATS))
    return kvcore.CacheSpec(
        num_layers,
        heads,
        dims,
        dims_v,
        groups=groups,
        layer_groups=owners,
        kv_sources=sources,
        layer_formats=draw(st.dictionaries(st.integers(0, num_layers - 1), formats)),
    )


def draw_list(draw, count: int, high: int) -> list[int]:
    return [draw(st.integers(0, high)) for _ in range(count)]
