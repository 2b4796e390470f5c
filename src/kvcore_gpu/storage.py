"""Where a cache's K and V lie on a device, and what its launches need beside them."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np

from kvcore.errors import DeviceFault
from kvcore.formats import get_format
from kvcore.spec import RAW_BLOCK_SIZE, CacheSpec, LayerSpec
from kvcore_gpu import blocks
from kvcore_gpu.append_call import AppendCall
from kvcore_gpu.attend_call import AttendCall
from kvcore_gpu.blocks import DeviceBlocks
from kvcore_gpu.launcher import Launcher
from kvcore_gpu.option_arrays import OptionArrays
from kvcore_gpu.plans import PlanBuffers
from kvcore_gpu.scratch import Scratch

_RAW = get_format("bf16")


class CudaStorage:
    """K and V of every layer that owns storage; V may be a part of K.

    Attributes:
        launcher: the kernels of the device.
        layers: each layer's K and V; a layer that reads another's cache has that one's.
        pool_blocks: the K and V of each pool, groups first, then raw pools.
        v_in_k: each layer's v_in_k.
        can_release: whether a layer's group releases blocks.
        nbytes: bytes of all K and V.
        plans: where plans of steps go.
        scratch: what launches share.
        option_arrays: what attend is given beside q.
        not_finite: int32 [1], not 0 once a quantized layer was given a NaN or an infinity.
        lock: held by the call that uses any of this.
        fault: what the device reported, which ends the cache's use; None: nothing.
    """

    def __init__(self, spec: CacheSpec, num_blocks: Sequence[int], launcher: Launcher) -> None:
        self.launcher = launcher
        self.pool_blocks: list[list[DeviceBlocks]] = [[] for _ in num_blocks]
        self.nbytes = 0
        self.lock = Lock()
        self.fault: str | None = None
        self._spec = spec
        self._num_blocks = num_blocks
        owned = {
            i: self._allocate_layer(i, layer)
            for i, layer in enumerate(spec.layers)
            if layer.kv_source == i
        }
        self.layers = [owned[layer.kv_source] for layer in spec.layers]
        self.v_in_k = [layer.v_in_k for layer in spec.layers]
        self.can_release = [spec.groups[layer.group].retention is not None for layer in spec.layers]
        self.plans = PlanBuffers(launcher.runtime)
        self.scratch = Scratch(launcher.runtime)
        self.option_arrays = OptionArrays(launcher)
        self.not_finite = launcher.runtime.zeros((1,), np.int32)
        self._append_calls: dict[int, AppendCall] = {}
        self._attend_calls: dict[int, AttendCall] = {}

    def append_call(self, layer: int) -> AppendCall:
        """The launches of a layer's appends, compiled when first asked for."""
        call = self._append_calls.get(layer)
        if call is None:
            k, v = self.layers[layer]
            flag = self.launcher.runtime.address(self.not_finite)
            call = AppendCall(self.launcher, k, None if self.v_in_k[layer] else v, flag)
            self._append_calls[layer] = call
        return call

    def attend_call(self, layer: int) -> AttendCall:
        """The launches of a layer's attention."""
        call = self._attend_calls.get(layer)
        if call is None:
            k, v = self.layers[layer]
            call = AttendCall(
                self.launcher,
                self.scratch,
                self.option_arrays,
                k,
                v,
                bool(self.v_in_k[layer]),
                self.can_release[layer],
            )
            self._attend_calls[layer] = call
        return call

    def check_usable(self) -> None:
        """Raises DeviceFault if an earlier call met one."""
        if self.fault is not None:
            raise DeviceFault(f"the cache cannot be used after a fault of its device: {self.fault}")

    def _allocate_layer(self, i: int, layer: LayerSpec) -> tuple[DeviceBlocks, DeviceBlocks]:
        k_scales, v_scales = self._spec.layer_scales(i)
        k = self._allocate(layer, layer.k_format, layer.head_dim)
        blocks.add_channels(self.launcher.runtime, k, self._spec.layer_bias(i), k_scales)
        if layer.v_in_k:
            part = k.array[..., : layer.v_in_k]
            return k, blocks.of_array(self.launcher.runtime, part, k.format)
        v = self._allocate(layer, layer.v_format, layer.head_dim_v)
        blocks.add_channels(self.launcher.runtime, v, None, v_scales)
        return k, v

    def _allocate(self, layer: LayerSpec, name: str, head_dim: int) -> DeviceBlocks:
        spec, format, heads = self._spec, get_format(name), layer.num_kv_heads
        size, count = spec.groups[layer.group].block_size, self._num_blocks[layer.group]
        if format.is_quantized:
            tiles = self._memory((count, heads, size * format.row_nbytes(head_dim)), np.uint8)
            made = blocks.of_tiles(self.launcher.runtime, tiles, format, size, head_dim)
            made.struct.saturate = spec.saturate
            self._allocate_raw(made, layer)
        else:
            rows = self._memory((count, heads, size, head_dim), format.storage_dtype)
            made = blocks.of_array(self.launcher.runtime, rows, format)
        self.pool_blocks[layer.group].append(made)
        return made

    def _allocate_raw(self, encoded: DeviceBlocks, layer: LayerSpec) -> None:
        spec = self._spec
        if layer.group not in spec.raw_groups:
            return
        pool = len(spec.groups) + spec.raw_groups.index(layer.group)
        shape = self._num_blocks[pool], layer.num_kv_heads, RAW_BLOCK_SIZE, encoded.head_dim
        rows = self._memory(shape, _RAW.storage_dtype)
        raw = blocks.of_array(self.launcher.runtime, rows, _RAW)
        blocks.add_raw(encoded, raw, spec.raw_first, spec.raw_last)
        self.pool_blocks[pool].append(raw)

    def _memory(self, shape: tuple[int, ...], dtype: Any) -> Any:
        array = self.launcher.runtime.zeros(shape, dtype)
        self.nbytes += array.nbytes
        return array
