"""LayerSpec, and how a spec's arguments become one for each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from kvcore import channels, checks
from kvcore.channels import Channels
from kvcore.errors import InvalidArgument, InvalidType
from kvcore.formats import Format, get_format
from kvcore.groups import RAW_BLOCK_SIZE, GroupSpec

MAX_HEAD_DIM = 1024
RAW_ROW_ELEMENT_BYTES = 2  # bfloat16

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
        key_bias: what is subtracted from quantized keys, [H, D], or None.
        key_scales: the scales of int8_static keys, [H, D], or None.
        value_scales: those of int8_static values, [H, Dv], or None.
    """

    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    k_format: str
    v_format: str
    group: int
    kv_source: int
    v_in_k: int = 0
    key_bias: Channels | None = None
    key_scales: Channels | None = None
    value_scales: Channels | None = None

    @property
    def formats(self) -> tuple[Format, Format]:
        """k_format and v_format with their sizes and storage dtypes."""
        return get_format(self.k_format), get_format(self.v_format)

    @property
    def elements_per_token(self) -> int:
        """Elements of one token's K and V that are stored, as if the layer owned its storage."""
        return self.num_kv_heads * (self.head_dim + (0 if self.v_in_k else self.head_dim_v))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's K and V, metadata included, as if the layer owned its storage."""
        k_format, v_format = self.formats
        row = k_format.row_nbytes(self.head_dim)
        if not self.v_in_k:
            row += v_format.row_nbytes(self.head_dim_v)
        return self.num_kv_heads * row

    @property
    def raw_bytes_per_token(self) -> int:
        """Bytes of one token's raw rows: of K where it is quantized and of V where that is."""
        dims = zip(self.formats, (self.head_dim, self.head_dim_v), strict=True)
        elements = sum(dim for stored, dim in dims if stored.is_quantized)
        return self.num_kv_heads * elements * RAW_ROW_ELEMENT_BYTES

    @property
    def is_quantized(self) -> bool:
        """Whether K or V is."""
        return any(stored.is_quantized for stored in self.formats)

    @property
    def seals_groups(self) -> bool:
        """Whether tokens are encoded in groups, so that those of an unfinished one stay raw."""
        return self.formats[0].kind == "channel"


def make_layers(
    count: int,
    groups: tuple[GroupSpec, ...],
    shapes: Mapping[str, Any],
    formats: Mapping[str, Any],
    layer_groups: Sequence[int] | None,
    kv_sources: Mapping[int, int] | None,
    constants: Mapping[str, Any],
) -> tuple[LayerSpec, ...]:
    """The layers that CacheSpec's arguments describe, or an exception that names one of them."""
    heads = _per_layer(shapes["num_kv_heads"], count, "num_kv_heads")
    dims = _per_layer(shapes["head_dim"], count, "head_dim")
    shared = [_shared_dim(value) for value in _per_layer(shapes["v_in_k"], count, "v_in_k")]
    dims_v: Sequence[int] = [v or d for v, d in zip(shared, dims, strict=True)]
    if shapes["head_dim_v"] is not None:
        dims_v = _per_layer(shapes["head_dim_v"], count, "head_dim_v")
    names = _layer_formats(**formats, shared=shared)
    owners = _layer_groups(layer_groups, len(groups), count)
    sources = dict(_mapping(kv_sources, "kv_sources"))
    layers = tuple(
        LayerSpec(
            num_kv_heads=checks.integer(heads[i], "num_kv_heads", 1),
            head_dim=_head_dim(dims[i], "head_dim"),
            head_dim_v=_head_dim(dims_v[i], "head_dim_v"),
            k_format=names[i][0],
            v_format=names[i][1],
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
    _check_groups(layers, groups)
    _check_formats(layers, groups)
    return _with_constants(layers, **constants)


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
    layer_formats: Mapping[int, tuple[str, str]] | None,
    shared: list[int],
) -> list[tuple[str, str]]:
    k_name = get_format(k_format, "k_format").name
    v_name = get_format("bf16" if v_format is None else v_format, "v_format").name
    formats = [(k_name, k_name if v_format is None and size else v_name) for size in shared]
    for layer, pair in _mapping(layer_formats, "layer_formats").items():
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


def _check_formats(layers: tuple[LayerSpec, ...], groups: tuple[GroupSpec, ...]) -> None:
    for i, layer in enumerate(layers):
        k_format, v_format = layer.formats
        if v_format.kind == "channel":
            raise InvalidArgument(
                f"v_format: expected a format that encodes each token alone in layer {i}, as chan4 "
                f"and chan2 are for keys, got {v_format.name}"
            )
        if layer.v_in_k and k_format.is_quantized:
            raise InvalidArgument(
                f"k_format: expected fp32, fp16 or bf16 in layer {i}, where V lies in K (v_in_k): "
                "an encoded row cannot be decoded in part, and would serve as K and V with one "
                f"scale; got {k_format.name}"
            )
        k_format.check_head_dim(layer.head_dim, "head_dim")
        v_format.check_head_dim(layer.head_dim_v, "head_dim_v")
        size = groups[layer.group].block_size
        if layer.seals_groups and size < RAW_BLOCK_SIZE:
            raise InvalidArgument(
                f"block_size: expected at least {RAW_BLOCK_SIZE} in group {layer.group}, as "
                f"{k_format.name} encodes as many tokens together, got {size}"
            )


def _with_constants(
    layers: tuple[LayerSpec, ...], key_bias: Any, key_scales: Any, value_scales: Any
) -> tuple[LayerSpec, ...]:
    """The layers with what the arguments give per channel, where it means something."""
    count = len(layers)
    biases = channels.per_layer(key_bias, count, "key_bias")
    k_scales = channels.per_layer(key_scales, count, "key_scales")
    v_scales = channels.per_layer(value_scales, count, "value_scales")
    done: list[LayerSpec] = []
    for i, layer in enumerate(layers):
        if layer.kv_source != i:
            source = done[layer.kv_source]
            bias, k_scale, v_scale = source.key_bias, source.key_scales, source.value_scales
        else:
            k_shape = layer.num_kv_heads, layer.head_dim
            v_shape = layer.num_kv_heads, layer.head_dim_v
            bias = _bias(biases[i], layer, k_shape, i)
            k_scale = _scales(k_scales[i], layer.k_format, k_shape, "key_scales", i)
            v_scale = _scales(v_scales[i], layer.v_format, v_shape, "value_scales", i)
        done.append(replace(layer, key_bias=bias, key_scales=k_scale, value_scales=v_scale))
    return tuple(done)


def _bias(value: Any, layer: LayerSpec, shape: tuple[int, int], number: int) -> Channels | None:
    if value is None or not layer.formats[0].is_quantized:
        return None
    return channels.bias_of(value, shape, f"key_bias[{number}]")


def _scales(
    value: Any, format_name: str, shape: tuple[int, int], argument: str, number: int
) -> Channels | None:
    if format_name != "int8_static":
        return None
    if value is None:
        raise InvalidArgument(
            f"{argument}: expected an array [H, D] = {list(shape)} for layer {number}, as "
            "int8_static takes its scales from the spec, got None"
        )
    return channels.scales_of(value, shape, f"{argument}[{number}]")
