"""What a cache is made of: layers, groups, formats, and the bytes that follow. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcore import checks, spec_sizes
from kvcore.errors import InvalidArgument, InvalidType
from kvcore.groups import MAX_SLOTS, RAW_BLOCK_SIZE, GroupSpec, RawPool
from kvcore.layers import MAX_HEAD_DIM, LayerSpec, make_layers

__all__ = [
    "MAX_GROUPS",
    "MAX_HEAD_DIM",
    "MAX_SLOTS",
    "RAW_BLOCK_SIZE",
    "CacheSpec",
    "GroupSpec",
    "LayerSpec",
    "RawPool",
]

MAX_GROUPS = 16  # and pools of raw rows
MAX_RAW_LAST = 4096


@dataclass(frozen=True, init=False)
class CacheSpec:
    """The shape of a cache. Numbers stand for every layer; a sequence gives one value a layer.

    Args:
        num_layers: L.
        num_kv_heads: H, one number or one a layer.
        head_dim: D, one number or one a layer, a multiple of 8, or of what the formats ask for.
        head_dim_v: Dv, likewise; v_in_k or else D when left out.
        v_in_k: V is the first v_in_k elements of K and stored there alone, as in the latent
            attention of DeepSeek-V2 (arXiv 2405.04434): one number or one a layer, a multiple of
            8; 0 or None where V is stored apart. Not with quantized formats.
        block_size: token slots of a block, a power of two from 16 to 4096; from 32 with chan4 and
            chan2.
        k_format: a format's name, see docs/formats.md.
        v_format: likewise, but for chan4 and chan2; when left out bf16, or k_format where V lies
            in K.
        layer_formats: {layer: (k_format, v_format)}, over k_format and v_format.
        raw_first: of quantized K and V, the first tokens that are read raw (as bfloat16), 0 to 32.
        raw_last: of quantized K and V, how many of the last tokens are read raw: token i reads
            those from 32 * ((i + 1) // 32) - raw_last on, which are raw_last to raw_last + 31. A
            multiple of 32, 0 to 4096; with chan4 and chan2, 0 leaves those of an unfinished group.
        key_bias: constants that are subtracted from quantized keys before they are encoded, and
            added when they are decoded: an array [L, H, D], or a list of one [H, D] or None a
            layer. Rounded to bfloat16. `kvcore eval --calibrate` computes it.
        key_scales: one scale for each channel of int8_static keys, above 0, likewise [L, H, D].
        value_scales: the same of int8_static values, [L, H, Dv].
        saturate: store NaN as 0 and infinities as 65504 in quantized K and V, instead of raising
            NotFinite.
        groups: several groups instead of one of `block_size`.
        layer_groups: each layer's group; needed when there are several.
        kv_sources: {layer: the lower layer whose cache it reads}.

    Raises:
        InvalidArgument, InvalidType: naming the argument.

    Attributes:
        layers: a LayerSpec for each layer.
        groups: a GroupSpec for each group.
        raw_first, raw_last, saturate: as given; 0, 0 and False where they mean nothing.
    """

    layers: tuple[LayerSpec, ...]
    groups: tuple[GroupSpec, ...]
    raw_first: int
    raw_last: int
    saturate: bool
    _raw_pools: tuple[RawPool, ...] = field(repr=False, compare=False)
    _pool_bytes: tuple[int, ...] = field(repr=False, compare=False)

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int | Sequence[int],
        head_dim: int | Sequence[int],
        head_dim_v: int | Sequence[int] | None = None,
        *,
        v_in_k: int | Sequence[int | None] | None = None,
        block_size: int = 64,
        k_format: str = "bf16",
        v_format: str | None = None,
        layer_formats: Mapping[int, tuple[str, str]] | None = None,
        raw_first: int = 4,
        raw_last: int = 32,
        key_bias: Any | None = None,
        key_scales: Any | None = None,
        value_scales: Any | None = None,
        saturate: bool = False,
        groups: Sequence[GroupSpec] | None = None,
        layer_groups: Sequence[int] | None = None,
        kv_sources: Mapping[int, int] | None = None,
    ) -> None:
        count = checks.integer(num_layers, "num_layers", 1)
        all_groups = (GroupSpec(block_size),) if groups is None else _groups(groups)
        layers = make_layers(
            count,
            all_groups,
            {
                "num_kv_heads": num_kv_heads,
                "head_dim": head_dim,
                "head_dim_v": head_dim_v,
                "v_in_k": v_in_k,
            },
            {"k_format": k_format, "v_format": v_format, "layer_formats": layer_formats},
            layer_groups,
            kv_sources,
            {"key_bias": key_bias, "key_scales": key_scales, "value_scales": value_scales},
        )
        first, last = _raw_extent(raw_first, raw_last)
        raw_pools = spec_sizes.raw_pools(layers, all_groups, first, last)
        if not isinstance(saturate, bool):
            raise InvalidType(f"saturate: expected a bool, got {type(saturate).__name__}")
        _check_pools(all_groups, raw_pools)
        owned = [layer for i, layer in enumerate(layers) if layer.kv_source == i]
        set_ = object.__setattr__
        set_(self, "layers", layers)
        set_(self, "groups", all_groups)
        set_(self, "raw_first", first if raw_pools else 0)
        set_(self, "raw_last", last if raw_pools else 0)
        set_(self, "saturate", saturate and any(layer.is_quantized for layer in owned))
        set_(self, "_raw_pools", raw_pools)
        set_(self, "_pool_bytes", spec_sizes.bytes_per_pool(owned, len(all_groups), raw_pools))

    # ---- layers and pools

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def raw_groups(self) -> tuple[int, ...]:
        """The groups that have raw rows, whose pools follow the groups' own in this order."""
        return tuple(pool.group for pool in self._raw_pools)

    @property
    def pools(self) -> tuple[GroupSpec, ...]:
        """The pools of blocks: the groups' own, then those of raw rows."""
        return (*self.groups, *self._raw_pools)

    def raw_pool(self, group: int = 0) -> int | None:
        """The number of the pool of a group's raw rows, None where it has none."""
        groups = self.raw_groups
        return len(self.groups) + groups.index(group) if group in groups else None

    def layer_bias(self, layer: int) -> NDArray[np.float32] | None:
        """What is subtracted from a layer's keys: float32 [H, D], read-only."""
        bias = self.layers[layer].key_bias
        return None if bias is None else bias.array

    def layer_scales(
        self, layer: int
    ) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
        """The scales of a layer's int8_static keys [H, D] and values [H, Dv]: float32."""
        scales = self.layers[layer].key_scales, self.layers[layer].value_scales
        k, v = (None if given is None else given.array for given in scales)
        return k, v

    # ---- bytes

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token over all layers, K and V (or K alone where V lies in it), metadata
        included. Raw rows come on top, see `raw_bytes_per_token`."""
        return sum(self._pool_bytes[: len(self.groups)])

    def raw_bytes_per_token(self, group: int = 0) -> int:
        """Bytes of one token's raw rows over a group's layers; 0 where it has none."""
        pool = self.raw_pool(group)
        return 0 if pool is None else self._pool_bytes[pool]

    def block_nbytes(self, group: int = 0) -> int:
        """Bytes of one block of a group (or of a pool of raw rows), all its layers together."""
        return self._pool_bytes[group] * self.pools[group].block_size

    def nbytes(
        self,
        num_blocks: int | Sequence[int],
        num_raw_blocks: int | Sequence[int] | None = None,
    ) -> int:
        """Bytes of a cache's storage with that many blocks a group (one number: in each).

        Args:
            num_blocks: blocks of each group.
            num_raw_blocks: blocks of each pool of raw rows; `raw_blocks_per_group` when left out.
        """
        counts = self.blocks_per_group(num_blocks)
        raw = self.raw_blocks_per_group(counts, num_raw_blocks)
        return sum(self.block_nbytes(p) * n for p, n in enumerate((*counts, *raw)))

    def sequence_nbytes(self, num_tokens: int) -> int:
        """Bytes that one sequence takes after it has grown to `num_tokens`: whole blocks, raw ones
        included."""
        held = (pool.blocks_held(num_tokens) for pool in self.pools)
        return sum(self.block_nbytes(p) * n for p, n in enumerate(held))

    def bits_per_element(self, num_tokens: int | None = None) -> float:
        """Bits of an element of K or V, metadata included, over all layers.

        Args:
            num_tokens: counts the blocks of raw rows too that a sequence of as many tokens holds.
        """
        owned = (layer for i, layer in enumerate(self.layers) if layer.kv_source == i)
        elements = sum(layer.elements_per_token for layer in owned)
        bits = 8 * self.bytes_per_token / elements
        if num_tokens is None:
            return bits
        checks.integer(num_tokens, "num_tokens", 1)
        raw = sum(
            self.block_nbytes(p) * self.pools[p].blocks_held(num_tokens)
            for p in range(len(self.groups), len(self.pools))
        )
        return bits + 8 * raw / (elements * num_tokens)

    def break_even_length(self) -> int | None:
        """The length from which a sequence takes fewer bytes than in bf16, and never more again.

        Whole blocks are counted, and raw ones, as `sequence_nbytes` does. None: there is none.
        """
        return spec_sizes.break_even_length(self)

    # ---- blocks

    def blocks_per_group(self, num_blocks: int | Sequence[int]) -> tuple[int, ...]:
        """`num_blocks` as one count a group."""
        return _counts(num_blocks, len(self.groups), "num_blocks", "group")

    def raw_blocks_per_group(
        self,
        num_blocks: int | Sequence[int],
        num_raw_blocks: int | Sequence[int] | None = None,
        sequence_length: int | None = None,
    ) -> tuple[int, ...]:
        """`num_raw_blocks` as one count for each of `raw_groups`, by default from the others.

        The default is what sequences of `sequence_length` tokens (1,024 when left out) need that
        fill `num_blocks`, and 2,048 new tokens of one step; but no more than if every token were
        read raw.
        """
        if num_raw_blocks is not None:
            return _counts(
                num_raw_blocks, len(self._raw_pools), "num_raw_blocks", "group with raw rows"
            )
        counts = self.blocks_per_group(num_blocks)
        return tuple(
            spec_sizes.default_raw_blocks(
                self.groups[pool.group], pool, counts[pool.group], sequence_length
            )
            for pool in self._raw_pools
        )

    def raw_blocks_for(self, num_tokens: int, num_new: int = 1, group: int = 0) -> int:
        """The most raw blocks that one sequence holds in a group; see `GroupSpec.blocks_for`."""
        pool = self.raw_pool(group)
        return 0 if pool is None else self.pools[pool].blocks_for(num_tokens, num_new)

    def blocks_in(
        self,
        nbytes: int,
        sequence_length: int | None = None,
        num_raw_blocks: int | Sequence[int] | None = None,
    ) -> tuple[int, ...]:
        """The most blocks of each group that fit in `nbytes`, every group with room for as much.

        As much is as many tokens; or, with `sequence_length`, as many sequences of that many
        tokens, which groups with a retention hold in fewer blocks: all of them while they grow by a
        token a step, and one of them while a single step writes it. Raw rows fit in as well:
        `num_raw_blocks`, or what `raw_blocks_per_group` makes of the blocks.

        Raises:
            InvalidArgument: not even one block of each group fits.
        """
        return spec_sizes.blocks_in(self, nbytes, sequence_length, num_raw_blocks)


def _groups(groups: Sequence[GroupSpec]) -> tuple[GroupSpec, ...]:
    if not isinstance(groups, Sequence) or not all(isinstance(g, GroupSpec) for g in groups):
        raise InvalidType(f"groups: expected a sequence of GroupSpec, got {groups!r}")
    if not 1 <= len(groups) <= MAX_GROUPS:
        raise InvalidArgument(f"groups: expected 1 to {MAX_GROUPS} groups, got {len(groups)}")
    return tuple(groups)


def _raw_extent(raw_first: int, raw_last: int) -> tuple[int, int]:
    first = checks.integer(raw_first, "raw_first", 0, RAW_BLOCK_SIZE)
    last = checks.integer(raw_last, "raw_last", 0, MAX_RAW_LAST)
    if last % RAW_BLOCK_SIZE:
        raise InvalidArgument(f"raw_last: expected a multiple of {RAW_BLOCK_SIZE}, got {last}")
    return first, last


def _check_pools(groups: tuple[GroupSpec, ...], raw_pools: tuple[RawPool, ...]) -> None:
    if len(groups) + len(raw_pools) > MAX_GROUPS:
        raise InvalidArgument(
            f"groups: expected at most {MAX_GROUPS} groups and pools of raw rows together, "
            f"got {len(groups)} and {len(raw_pools)}"
        )


def _counts(value: int | Sequence[int], count: int, argument: str, each: str) -> tuple[int, ...]:
    if not isinstance(value, Sequence):
        return (checks.integer(value, argument, 1),) * count
    if len(value) != count:
        raise InvalidArgument(
            f"{argument}: expected {count} counts, one a {each}, got {len(value)}"
        )
    return tuple(checks.integer(n, argument, 1) for n in value)
