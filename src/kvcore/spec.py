"""What a cache is made of: layers, groups, formats, and the bytes that follow. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kvcore import checks
from kvcore.errors import InvalidArgument, InvalidType
from kvcore.formats import Format, get_format

MIN_BLOCK_SIZE = 16
MAX_BLOCK_SIZE = 4096
MAX_HEAD_DIM = 1024
MAX_GROUPS = 16
MAX_SLOTS = 2**31 - 1

_T = TypeVar("_T")


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
        v_in_k: V is the first v_in_k elements of K (then head_dim_v) and not stored; 0: it is.
    """

    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    k_format: str
    v_format: str
    group: int
    kv_source: int
    v_in_k: int = 0

    @property
    def formats(self) -> tuple[Format, Format]:
        """k_format and v_format with their sizes and storage dtypes."""
        return get_format(self.k_format), get_format(self.v_format)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's K and V, metadata included, as if the layer owned its storage."""
        k_format, v_format = self.formats
        row = k_format.row_nbytes(self.head_dim)
        if not self.v_in_k:
            row += v_format.row_nbytes(self.head_dim_v)
        return self.num_kv_heads * row


@dataclass(frozen=True)
class GroupSpec:
    """Layers that share one pool of blocks and one block table per sequence.

    A token of a layer with a window of w reads w tokens, itself included; a group of such layers
    has retention=w. A commit at length n then releases every block that lies wholly below token
    n - retention + 1 - slack. After a step a sequence can be truncated or forked as far back as it
    still holds all that its next token reads there: by `slack` tokens, or whatever the last block
    adds.

    Attributes:
        block_size: token slots of a block, a power of two from 16 to 4096.
        retention: the widest window that `attend` may be given; None: every token is kept.
        slack: tokens kept beyond the retention, for steps that are to be taken back in part, as in
            speculative decoding.
    """

    block_size: int = 64
    retention: int | None = None
    slack: int = 0

    def __post_init__(self) -> None:
        size = checks.integer(self.block_size, "block_size", MIN_BLOCK_SIZE, MAX_BLOCK_SIZE)
        if size & (size - 1):
            raise InvalidArgument(f"block_size: expected a power of two, got {size}")
        if self.retention is not None:
            checks.integer(self.retention, "retention", 1, MAX_SLOTS)
        checks.integer(self.slack, "slack", 0, 0 if self.retention is None else MAX_SLOTS)

    def blocks_for(self, num_tokens: int, num_new: int = 1) -> int:
        """The most blocks that one sequence holds while it grows to `num_tokens` tokens.

        Args:
            num_tokens: its length in the end.
            num_new: the most tokens that a step adds to it.
        """
        checks.integer(num_tokens, "num_tokens", 0)
        checks.integer(num_new, "num_new", 1)
        columns = -(-num_tokens // self.block_size)
        if self.retention is None:
            return columns
        # What is kept before a step and the new tokens, wherever blocks begin.
        span = self.retention - 1 + self.slack + num_new
        return min(columns, (span + self.block_size - 2) // self.block_size + 1)

    def first_kept(self, num_tokens: int) -> int:
        """The first token that a sequence holds after it has grown to `num_tokens`."""
        if self.retention is None:
            return 0
        first = max(0, num_tokens - self.retention + 1 - self.slack)
        return first // self.block_size * self.block_size


@dataclass(frozen=True, init=False)
class CacheSpec:
    """The shape of a cache. Numbers stand for every layer; a sequence gives one value a layer.

    Args:
        num_layers: L.
        num_kv_heads: H, one number or one a layer.
        head_dim: D, one number or one a layer, a multiple of 8.
        head_dim_v: Dv, likewise; v_in_k or else D when left out.
        v_in_k: V is the first v_in_k elements of K and stored there alone, as in the latent
            attention of DeepSeek-V2 (arXiv 2405.04434): one number or one a layer, a multiple of
            8; 0 or None where V is stored apart.
        block_size: token slots of a block, a power of two from 16 to 4096.
        k_format: "fp32", "fp16" or "bf16".
        v_format: likewise; when left out bf16, or k_format where V lies in K.
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
        v_in_k: int | Sequence[int | None] | None = None,
        block_size: int = 64,
        k_format: str = "bf16",
        v_format: str | None = None,
        layer_formats: Mapping[int, tuple[str, str]] | None = None,
        groups: Sequence[GroupSpec] | None = None,
        layer_groups: Sequence[int] | None = None,
        kv_sources: Mapping[int, int] | None = None,
    ) -> None:
        count = checks.integer(num_layers, "num_layers", 1)
        all_groups = (GroupSpec(block_size),) if groups is None else _groups(groups)
        heads = _per_layer(num_kv_heads, count, "num_kv_heads")
        dims = _per_layer(head_dim, count, "head_dim")
        shared = [_shared_dim(value) for value in _per_layer(v_in_k, count, "v_in_k")]
        dims_v: Sequence[int] = [v or d for v, d in zip(shared, dims, strict=True)]
        if head_dim_v is not None:
            dims_v = _per_layer(head_dim_v, count, "head_dim_v")
        overrides = _mapping(layer_formats, "layer_formats")
        formats = _layer_formats(k_format, v_format, overrides, shared)
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
                v_in_k=shared[i],
            )
            for i in range(count)
        )
        if sources:
            raise InvalidArgument(
                f"kv_sources: expected layers 0 to {count - 1}, got {sorted(sources)}"
            )
        _check_shared(layers)
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
        """Bytes of one token over all layers, K and V (or K alone where V lies in it), metadata
        included."""
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

    def blocks_in(self, nbytes: int, sequence_length: int | None = None) -> tuple[int, ...]:
        """The most blocks of each group that fit in `nbytes`, every group with room for as much.

        As much is as many tokens; or, with `sequence_length`, as many sequences of that many
        tokens, which groups with a retention hold in fewer blocks: all of them while they grow by a
        token a step, and one of them while a single step writes it.

        Raises:
            InvalidArgument: not even one block of each group fits.
        """
        if sequence_length is not None:
            checks.integer(sequence_length, "sequence_length", 1)
        span = max(group.block_size for group in self.groups)

        def blocks_of(spans: int) -> tuple[int, ...]:
            return tuple(_room(group, spans * span, sequence_length) for group in self.groups)

        def fits(spans: int) -> bool:
            counts = blocks_of(spans)
            sizes = zip(counts, self.groups, strict=True)
            return self.nbytes(counts) <= nbytes and all(
                count <= MAX_SLOTS // group.block_size for count, group in sizes
            )

        if not fits(1):
            raise InvalidArgument(
                f"memory: expected at least {self.nbytes(blocks_of(1))} bytes "
                f"(one block of {span} tokens), got {nbytes}"
            )
        low, high = 1, 2
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return blocks_of(low)


def _room(group: GroupSpec, num_tokens: int, sequence_length: int | None) -> int:
    """Blocks for `num_tokens` tokens, all of sequences of `sequence_length` where that is given."""
    columns = -(-num_tokens // group.block_size)
    if sequence_length is None:
        return columns
    each, whole = group.blocks_for(sequence_length), -(-sequence_length // group.block_size)
    return min(columns, -(-num_tokens * each // sequence_length) + whole - each)


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


def _per_layer(value: _T | Sequence[_T], count: int, argument: str) -> Sequence[_T]:
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


def _shared_dim(v_in_k: int | None) -> int:
    """How many elements of K are V too, 0 where V is stored apart."""
    size = checks.integer(0 if v_in_k is None else v_in_k, "v_in_k", 0)
    return _head_dim(size, "v_in_k") if size else 0


def _layer_formats(
    k_format: str,
    v_format: str | None,
    overrides: Mapping[int, tuple[str, str]],
    shared: list[int],
) -> list[tuple[str, str]]:
    k_name = get_format(k_format, "k_format").name
    v_name = get_format("bf16" if v_format is None else v_format, "v_format").name
    formats = [(k_name, k_name if v_format is None and size else v_name) for size in shared]
    for layer, pair in overrides.items():
        checks.integer(layer, "layer_formats", 0, len(shared) - 1)
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


def _check_shared(layers: tuple[LayerSpec, ...]) -> None:
    for i, layer in enumerate(layers):
        if not layer.v_in_k:
            continue
        if layer.v_in_k > layer.head_dim:
            raise InvalidArgument(
                f"v_in_k: expected at most head_dim, {layer.head_dim}, in layer {i}, "
                f"got {layer.v_in_k}"
            )
        if layer.head_dim_v != layer.v_in_k:
            raise InvalidArgument(
                f"head_dim_v: expected {layer.v_in_k} in layer {i}, as v_in_k says, "
                f"got {layer.head_dim_v}"
            )
        if layer.v_format != layer.k_format:
            raise InvalidArgument(
                f"v_format: expected {layer.k_format} in layer {i}, where V lies in K, "
                f"got {layer.v_format}"
            )


def _check_sources(layers: tuple[LayerSpec, ...]) -> None:
    for i, layer in enumerate(layers):
        source = layers[layer.kv_source]
        if source.kv_source != layer.kv_source:
            raise InvalidArgument(
                f"kv_sources: expected a layer that owns its cache, but layer {i} reads layer "
                f"{layer.kv_source}, which reads layer {source.kv_source}"
            )
        if _storage_shape(source) != _storage_shape(layer):
            raise InvalidArgument(
                f"kv_sources: expected layers {i} and {layer.kv_source} to have the same group, "
                "num_kv_heads, head_dim, head_dim_v and v_in_k"
            )


def _storage_shape(layer: LayerSpec) -> tuple[int, ...]:
    return layer.group, layer.num_kv_heads, layer.head_dim, layer.head_dim_v, layer.v_in_k


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
