"""How many blocks and bytes a spec's pools take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvcore import checks
from kvcore.errors import InvalidArgument
from kvcore.groups import MAX_SLOTS, RAW_BLOCK_SIZE, GroupSpec, RawPool
from kvcore.layers import RAW_ROW_ELEMENT_BYTES, LayerSpec

if TYPE_CHECKING:
    from kvcore.spec import CacheSpec

#: What the default number of raw blocks is for, see CacheSpec.raw_blocks_per_group.
RAW_SEQUENCE_LENGTH = 1024
RAW_STEP_TOKENS = 2048


def raw_pools(
    layers: Sequence[LayerSpec], groups: Sequence[GroupSpec], raw_first: int, raw_last: int
) -> tuple[RawPool, ...]:
    """The pools of raw rows that groups with quantized layers have."""
    owned = [layer for i, layer in enumerate(layers) if layer.kv_source == i]
    pools = []
    for g, group in enumerate(groups):
        own = [layer for layer in owned if layer.group == g]
        kept = any(layer.is_quantized for layer in own) and (raw_first or raw_last)
        if kept or any(layer.seals_groups for layer in own):
            # At 0 the rows of an unfinished group stay, which a retention of 1 keeps.
            pools.append(
                RawPool(RAW_BLOCK_SIZE, max(raw_last, 1), group.slack, g, int(raw_first > 0))
            )
    return tuple(pools)


def bytes_per_pool(
    owned: Iterable[LayerSpec], num_groups: int, pools: Sequence[RawPool]
) -> tuple[int, ...]:
    """Bytes of one token in each group, then in each pool of raw rows."""
    encoded, raw = [0] * num_groups, [0] * num_groups
    for layer in owned:
        encoded[layer.group] += layer.bytes_per_token
        raw[layer.group] += layer.raw_bytes_per_token
    return (*encoded, *(raw[pool.group] for pool in pools))


def default_raw_blocks(
    group: GroupSpec, pool: RawPool, num_blocks: int, sequence_length: int | None
) -> int:
    """Raw blocks beside `num_blocks` of a group; see CacheSpec.raw_blocks_per_group."""
    length = RAW_SEQUENCE_LENGTH
    if sequence_length is not None:
        length = checks.integer(sequence_length, "sequence_length", 1)
    sequences = -(-num_blocks // group.blocks_for(length))
    step = -(-RAW_STEP_TOKENS // RAW_BLOCK_SIZE)
    # A block that holds one token needs a raw block as well.
    everything = num_blocks * max(1, group.block_size // RAW_BLOCK_SIZE)
    return min(everything, sequences * pool.blocks_for(length) + step)


def blocks_in(
    spec: CacheSpec,
    nbytes: int,
    sequence_length: int | None,
    num_raw_blocks: int | Sequence[int] | None,
) -> tuple[int, ...]:
    """See CacheSpec.blocks_in."""
    if sequence_length is not None:
        checks.integer(sequence_length, "sequence_length", 1)
    span = max(group.block_size for group in spec.groups)

    def counts_of(spans: int) -> tuple[int, ...]:
        """Of all pools."""
        counts = [_room(group, spans * span, sequence_length) for group in spec.groups]
        return (*counts, *spec.raw_blocks_per_group(counts, num_raw_blocks, sequence_length))

    def size_of(spans: int) -> int:
        return sum(spec.block_nbytes(p) * n for p, n in enumerate(counts_of(spans)))

    def fits(spans: int) -> bool:
        return size_of(spans) <= nbytes and all(
            count <= MAX_SLOTS // pool.block_size
            for count, pool in zip(counts_of(spans), spec.pools, strict=True)
        )

    if not fits(1):
        raise InvalidArgument(
            f"memory: expected at least {size_of(1)} bytes (one block of {span} tokens), "
            f"got {nbytes}"
        )
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return counts_of(low)[: len(spec.groups)]


def _room(group: GroupSpec, num_tokens: int, sequence_length: int | None) -> int:
    """Blocks for `num_tokens` tokens, all of sequences of `sequence_length` where that is given."""
    columns = -(-num_tokens // group.block_size)
    if sequence_length is None:
        return columns
    each, whole = group.blocks_for(sequence_length), -(-sequence_length // group.block_size)
    return min(columns, -(-num_tokens * each // sequence_length) + whole - each)


def break_even_length(spec: CacheSpec) -> int | None:
    """See CacheSpec.break_even_length."""
    gains = _gains_over_bf16(spec)
    horizon = _horizon(spec, gains)
    if horizon is None:
        return None
    lengths = np.arange(1, horizon + 1)
    saved = np.zeros(horizon, np.int64)
    for pool, gain in zip(spec.pools, gains, strict=True):
        saved += gain * pool.block_size * _held(pool, lengths)
    larger = np.flatnonzero(saved < 0)
    start = larger[-1] + 1 if len(larger) else 0
    smaller = np.flatnonzero(saved[start:] > 0)
    return int(lengths[start + smaller[0]]) if len(smaller) else None


def _gains_over_bf16(spec: CacheSpec) -> list[int]:
    """Bytes that a token of each pool takes less than in bf16; below 0: more."""
    bf16 = [0] * len(spec.pools)
    for i, layer in enumerate(spec.layers):
        if layer.kv_source == i:
            bf16[layer.group] += layer.elements_per_token * RAW_ROW_ELEMENT_BYTES
    return [b - spec.block_nbytes(p) // spec.pools[p].block_size for p, b in enumerate(bf16)]


def _horizon(spec: CacheSpec, gains: Sequence[int]) -> int | None:
    """A length up to which it shows which of spec and bf16 stays the smaller one; None: bf16.

    From some length on, pools with a retention repeat themselves with the largest block, and what
    the others gain by the token outgrows what is lost in those and in unfilled blocks.
    """
    rate, lost, settled = 0, 0, 0
    for pool, gain in zip(spec.pools, gains, strict=True):
        if pool.retention is None:
            rate += gain
            lost += abs(gain) * pool.block_size
        else:
            reach = pool.retention + pool.slack + 2 * pool.block_size
            lost += max(0, -gain) * reach
            settled = max(settled, reach)
    if rate < 0:
        return None
    period = max(pool.block_size for pool in spec.pools)
    return settled + 2 * period + (-(-lost // rate) if rate else 0)


def _held(pool: GroupSpec, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """`pool.blocks_held` of many lengths."""
    columns = -(-lengths // pool.block_size)
    if pool.retention is None:
        return columns
    released = np.maximum(0, lengths - pool.retention + 1 - pool.slack) // pool.block_size
    kept = pool.num_first if isinstance(pool, RawPool) else 0
    held: NDArray[np.int64] = columns - released + np.minimum(released, kept)
    return held
