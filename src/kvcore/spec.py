"""What a cache is made of: layers, groups, formats, and the bytes that follow. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvcore import checks
from kvcore.errors import InvalidArgument, InvalidType
from kvcore.formats import Format, get_format

MIN_BLOCK_SIZE = 16
MAX_BLOCK_SIZE = 4096
MAX_HEAD_DIM = 1024
MAX_GROUPS = 16
MAX_SLOTS = 2**31 - 1


@dataclass(frozen=True)
class LayerSpec:
    """One layer's cache.

    Attributes:
        num_kv_heads: heads of K and V (H).
        head_dim: elements of a K row (D), a multiple of 8.
        head_dim_v: elements of a V row (Dv), a multiple of 8.
        k_format, v_format: how K and V are stored.
        group: the group whose blocks the layer uses.
        kv_source: the layer whose cache this one reads; its own index when it owns one.
    """

    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    k_format: str
    v_format: str
    group: int
    kv_source: int

    @property
    def formats(self) -> tuple[Format, Format]:
        """k_format and v_format with their sizes and storage dtypes."""
        return get_format(self.k_format), get_format(self.v_format)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's K and V, metadata included, as if the layer owned its storage."""
        k_format, v_format = self.formats
        row = k_format.row_nbytes(self.head_dim) + v_format.row_nbytes(self.head_dim_v)
        return self.num_kv_heads * row


@dataclass(frozen=True)
class GroupSpec:
    """Layers that share one pool of blocks and one block table per sequence.

    Attributes:
        block_size: token slots of a block, a power of two from 16 to 4096.
    """

    block_size: int = 64

    def __post_init__(self) -> None:
        size = checks.integer(self.block_size, "block_size", MIN_BLOCK_SIZE, MAX_BLOCK_SIZE)
        if size & (size - 1):
            raise InvalidArgument(f"block_size: expected a power of two, got {size}")


@dataclass(frozen=True, init=False)
class CacheSpec:
    """The shape of a cache. Numbers stand for every layer; a sequence gives one value a layer.

    Args:
        num_layers: L.
        num_kv_heads: H, one number or one a layer.
        head_dim: D, one number or one a layer, a multiple of 8.
        head_dim_v: Dv, likewise; D when left out.
        block_size: token slots of a block, a power of two from 16 to 4096.
        k_format, v_format: "fp32", "fp16" or "bf16".
        layer_formats: {layer: (k_format, v_format)}, over k_format and v_format.
        groups: several groups instead of one of `block_size`.
        layer_groups: each layer's group; needed when there are several.
        kv_sources: {layer: the lower layer whose cache it reads}.

    Raises:
        InvalidArgument, InvalidType: naming the argument.

    Attributes:
        layers: a LayerSpec for each layer.
        groups: a GroupSpec for each group.
    """

    layers: tuple[LayerSpec, ...]
    groups: tuple[GroupSpec, ...]
    _group_bytes: tuple[int, ...] = field(repr=False, compare=False)

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int | Sequence[int],
        head_dim: int | Sequence[int],
        head_dim_v: int | Sequence[int] | None = None,
        *,
        block_size: int = 64,
        k_format: str = "bf16",
        v_format: str = "bf16",
        layer_formats: Mapping[int, tuple[str, str]] | None = None,
        groups: Sequence[GroupSpec] | None = None,
        layer_groups: Sequence[int] | None = None,
        kv_sources: Mapping[int, int] | None = None,
    ) -> None:
        count = checks.integer(num_layers, "num_layers", 1)
        all_groups = (GroupSpec(block_size),) if groups is None else _groups(groups)
        heads = _per_layer(num_kv_heads, count, "num_kv_heads")
        dims = _per_layer(head_dim, count, "head_dim")
        dims_v = dims if head_dim_v is None else _per_layer(head_dim_v, count, "head_dim_v")
        overrides = _mapping(layer_formats, "layer_formats")
        formats = _layer_formats(k_format, v_format, overrides, count)
        owners = _layer_groups(layer_groups, len(all_groups), count)
        sources = dict(_mapping(kv_sources, "kv_sources"))
        layers = tuple(
            LayerSpec(
                num_kv_heads=checks.integer(heads[i], "num_kv_heads", 1),
                head_dim=_head_dim(dims[i], "head_dim"),
                head_dim_v=_head_dim(dims_v[i], "head_dim_v"),
                k_format=formats[i][0],
                v_format=formats[i][1],
                group=owners[i],
                kv_source=checks.integer(sources.pop(i, i), "kv_sources", 0, i),
            )
            for i in range(count)
        )
        if sources:
            raise InvalidArgument(
                f"kv_sources: expected layers 0 to {count - 1}, got {sorted(sources)}"
            )
        _check_sources(layers)
        _check_groups(layers, all_groups)
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "groups", all_groups)
        object.__setattr__(self, "_group_bytes", _bytes_per_group(layers, len(all_groups)))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token over all layers, K and V, metadata included."""
        return sum(self._group_bytes)

    def block_nbytes(self, group: int = 0) -> int:
        """Bytes of one block of a group, all its layers together."""
        return self._group_bytes[group] * self.groups[group].block_size

    def nbytes(self, num_blocks: int | Sequence[int]) -> int:
        """Bytes of a cache's storage with that many blocks a group (one number: in each)."""
        counts = self.blocks_per_group(num_blocks)
        return sum(self.block_nbytes(g) * n for g, n in enumerate(counts))

    def blocks_per_group(self, num_blocks: int | Sequence[int]) -> tuple[int, ...]:
        """`num_blocks` as one count a group."""
        if not isinstance(num_blocks, Sequence):
            return (checks.integer(num_blocks, "num_blocks", 1),) * len(self.groups)
        if len(num_blocks) != len(self.groups):
            raise InvalidArgument(
                f"num_blocks: expected {len(self.groups)} counts, one a group, "
                f"got {len(num_blocks)}"
            )
        return tuple(checks.integer(n, "num_blocks", 1) for n in num_blocks)

    def blocks_in(self, nbytes: int) -> tuple[int, ...]:
        """The most blocks a group that fit in `nbytes`, every group with room for as many tokens.

        Raises:
            InvalidArgument: not even one block of each group fits.
        """
        span = max(group.block_size for group in self.groups)
        spans = min(nbytes // (self.bytes_per_token * span), MAX_SLOTS // span)
        if spans < 1:
            raise InvalidArgument(
                f"memory: expected at least {self.bytes_per_token * span} bytes "
                f"(one block of {span} tokens), got {nbytes}"
            )
        return tuple(spans * (span // group.block_size) for group in self.groups)


def _groups(groups: Sequence[GroupSpec]) -> tuple[GroupSpec, ...]:
    if not isinstance(groups, Sequence) or not all(isinstance(g, GroupSpec) for g in groups):
        raise InvalidType(f"groups: expected a sequence of GroupSpec, got {groups!r}")
    if not 1 <= len(groups) <= MAX_GROUPS:
        raise InvalidArgument(f"groups: expected 1 to {MAX_GROUPS} groups, got {len(groups)}")
    return tuple(groups)


def _mapping(value: Mapping[int, Any] | None, argument: str) -> Mapping[int, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise InvalidType(f"{argument}: expected a mapping by layer, got {type(value).__name__}")
    return value or {}


def _per_layer(value: int | Sequence[int], count: int, argument: str) -> Sequence[int]:
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise InvalidArgument(
            f"{argument}: expected one number or {count}, one a layer, got {len(value)}"
        )
    return value


def _head_dim(value: int, argument: str) -> int:
    dim = checks.integer(value, argument, 8, MAX_HEAD_DIM)
    if dim % 8:
        raise InvalidArgument(f"{argument}: expected a multiple of 8, got {dim}")
    return dim


def _layer_formats(
    k_format: str, v_format: str, overrides: Mapping[int, tuple[str, str]], count: int
) -> list[tuple[str, str]]:
    default = (get_format(k_format, "k_format").name, get_format(v_format, "v_format").name)
    formats = [default] * count
    for layer, pair in overrides.items():
        checks.integer(layer, "layer_formats", 0, count - 1)
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InvalidArgument(
                f"layer_formats: expected (k_format, v_format) for layer {layer}, got {pair!r}"
            )
        formats[layer] = tuple(get_format(name, "layer_formats").name for name in pair)  # type: ignore[assignment]
    return formats


def _layer_groups(owners: Sequence[int] | None, num_groups: int, count: int) -> Sequence[int]:
    if owners is None:
        if num_groups > 1:
            raise InvalidArgument(
                f"layer_groups: expected each layer's group, as there are {num_groups} groups"
            )
        return [0] * count
    if not isinstance(owners, Sequence) or len(owners) != count:
        raise InvalidArgument(f"layer_groups: expected {count} groups, one a layer, got {owners!r}")
    return [checks.integer(g, "layer_groups", 0, num_groups - 1) for g in owners]


def _check_sources(layers: tuple[LayerSpec, ...]) -> None:
    for i, layer in enumerate(layers):
        source = layers[layer.kv_source]
        if source.kv_source != layer.kv_source:
            raise InvalidArgument(
                f"kv_sources: expected a layer that owns its cache, but layer {i} reads layer "
                f"{layer.kv_source}, which reads layer {source.kv_source}"
            )
        if (source.group, source.num_kv_heads, source.head_dim, source.head_dim_v) != (
            layer.group,
            layer.num_kv_heads,
            layer.head_dim,
            layer.head_dim_v,
        ):
            raise InvalidArgument(
                f"kv_sources: expected layers {i} and {layer.kv_source} to have the same group, "
                "num_kv_heads and head_dim"
            )


def _check_groups(layers: tuple[LayerSpec, ...], groups: tuple[GroupSpec, ...]) -> None:
    used = {layer.group for layer in layers}
    for g in range(len(groups)):
        if g not in used:
            raise InvalidArgument(f"groups: expected every group to have a layer, {g} has none")


def _bytes_per_group(layers: tuple[LayerSpec, ...], num_groups: int) -> tuple[int, ...]:
    totals = [0] * num_groups
    for i, layer in enumerate(layers):
        if layer.kv_source == i:
            totals[layer.group] += layer.bytes_per_token
    return tuple(totals)
