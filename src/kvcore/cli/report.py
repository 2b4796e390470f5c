"""What a cache and a generator did, as numbers and as lines."""

from __future__ import annotations

from typing import Any

from ..cache import KVCache
from ..models.completion import Metrics
from ..units import format_bytes


def cache_numbers(cache: KVCache, peak: int) -> dict[str, Any]:
    """What the cache did; `peak` is the most blocks that were in use."""
    stats = cache.stats()
    return {
        "blocks_total": stats.total,
        "blocks_in_use": stats.in_use,
        "blocks_cached": stats.cached,
        "blocks_free": stats.free,
        "blocks_peak": peak,
        "bytes": stats.bytes,
        "bytes_per_token": cache.spec.bytes_per_token,
        "allocations": stats.allocations,
        "evictions": stats.evictions,
        "copies": stats.copies,
        "prefix_queries": stats.prefix_queries,
        "prefix_hits": stats.prefix_hits,
        "prefix_hit_tokens": stats.prefix_hit_tokens,
    }


def generation_numbers(metrics: Metrics) -> dict[str, Any]:
    """What the generator did."""
    return {
        "prefill_tokens": metrics.prefill.tokens,
        "prefill_seconds": metrics.prefill.seconds,
        "prefill_tokens_per_second": metrics.prefill.tokens_per_second,
        "decode_tokens": metrics.decode.tokens,
        "decode_seconds": metrics.decode.seconds,
        "decode_tokens_per_second": metrics.decode.tokens_per_second,
        "steps": metrics.steps,
        "preemptions": metrics.preemptions,
    }


def lines(cache: KVCache, metrics: Metrics, peak: int) -> list[str]:
    """The same for people."""
    stats = cache.stats()
    spec = cache.spec
    phases = (("prefill", metrics.prefill), ("decode", metrics.decode))
    speeds = [
        f"{name:<9}{phase.tokens:>7} tokens in {phase.seconds:6.2f} s: "
        f"{phase.tokens_per_second:8.1f} tokens/s"
        for name, phase in phases
        if phase.tokens
    ]
    sizes = " and ".join(str(pool.block_size) for pool in spec.pools)
    blocks = f"{stats.in_use} in use, {stats.cached} cached, {stats.free} free"
    events = f"{stats.evictions} blocks evicted, {stats.copies} copied"
    return [
        *speeds,
        f"cache    {stats.total:>7} blocks of {sizes} tokens, {format_bytes(stats.bytes)}",
        f"         {peak:>7} blocks in use at most; now {blocks}",
        f"         {spec.bytes_per_token:>7} bytes a token",
        f"         {stats.prefix_hit_tokens:>7} prompt tokens found in the cache; {events}",
        f"         {metrics.preemptions:>7} preemptions",
    ]
