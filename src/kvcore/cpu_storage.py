"""Where a cache's K and V lie on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvcore._native.blocks import Blocks, Memory
from kvcore.formats import get_format
from kvcore.spec import RAW_BLOCK_SIZE, CacheSpec, LayerSpec

_RAW = get_format("bf16")


class CpuStorage:
    """K and V of every layer that owns storage; V may be a view of K.

    Attributes:
        layers: each layer's K and V; a layer that reads another's cache has that one's.
        pool_blocks: the K and V of each pool, groups first, then raw pools.
        v_in_k: each layer's v_in_k.
        nbytes: bytes of all of them.
    """

    def __init__(self, spec: CacheSpec, num_blocks: Sequence[int]) -> None:
        self.pool_blocks: list[list[Blocks]] = [[] for _ in num_blocks]
        self.nbytes = 0
        self._spec = spec
        self._num_blocks = num_blocks
        owned = {
            i: self._allocate_layer(i, layer)
            for i, layer in enumerate(spec.layers)
            if layer.kv_source == i
        }
        self.layers = [owned[layer.kv_source] for layer in spec.layers]
        self.v_in_k = [layer.v_in_k for layer in spec.layers]

    def _allocate_layer(self, i: int, layer: LayerSpec) -> tuple[Blocks, Blocks]:
        spec = self._spec
        k_scales, v_scales = spec.layer_scales(i)
        k = self._allocate(layer, layer.k_format, layer.head_dim, spec.layer_bias(i), k_scales)
        if layer.v_in_k:
            return k, Blocks.of_rows(k.array[..., : layer.v_in_k], get_format(layer.k_format).index)
        return k, self._allocate(layer, layer.v_format, layer.head_dim_v, None, v_scales)

    def _allocate(
        self,
        layer: LayerSpec,
        name: str,
        head_dim: int,
        bias: np.ndarray | None,
        scales: np.ndarray | None,
    ) -> Blocks:
        spec, format, heads = self._spec, get_format(name), layer.num_kv_heads
        size, count = spec.groups[layer.group].block_size, self._num_blocks[layer.group]
        if not format.is_quantized:
            memory = self._memory(count * heads * size * format.row_nbytes(head_dim))
            rows = memory.view(format.storage_dtype).reshape(count, heads, size, head_dim)
            blocks = Blocks.of_rows(rows, format.index)
        else:
            tile = size * format.row_nbytes(head_dim)
            blocks = Blocks.of_tiles(
                self._memory(count * heads * tile).reshape(count, heads, tile),
                format.index,
                size,
                head_dim,
                self._allocate_raw(layer, head_dim),
                spec.raw_first,
                spec.raw_last,
                bias,
                scales,
                spec.saturate,
            )
        self.pool_blocks[layer.group].append(blocks)
        return blocks

    def _allocate_raw(self, layer: LayerSpec, head_dim: int) -> Blocks | None:
        spec, heads = self._spec, layer.num_kv_heads
        if layer.group not in spec.raw_groups:
            return None
        pool = len(spec.groups) + spec.raw_groups.index(layer.group)
        shape = self._num_blocks[pool], heads, RAW_BLOCK_SIZE, head_dim
        rows = self._memory(int(np.prod(shape)) * 2).view(_RAW.storage_dtype).reshape(shape)
        blocks = Blocks.of_rows(rows, _RAW.index)
        self.pool_blocks[pool].append(blocks)
        return blocks

    def _memory(self, nbytes: int) -> np.ndarray:
        self.nbytes += nbytes
        return np.frombuffer(memoryview(Memory(nbytes)), np.uint8)
