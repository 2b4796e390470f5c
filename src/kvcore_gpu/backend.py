"""The CUDA backend: the Backend protocol over a runtime and the kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from kvcore import checks
from kvcore.arrays import layout_number
from kvcore.attend_options import AttendOptions
from kvcore.backend import Plan
from kvcore.errors import DeviceFault, NotFinite
from kvcore.formats import get_format
from kvcore.spec import CacheSpec
from kvcore_gpu import block_calls, plain_arrays
from kvcore_gpu.launcher import Launcher
from kvcore_gpu.runtime import Runtime
from kvcore_gpu.storage import CudaStorage

T = TypeVar("T")
A = ParamSpec("A")


def _guarded(
    operation: Callable[Concatenate[CudaBackend, CudaStorage, A], T],
) -> Callable[Concatenate[CudaBackend, CudaStorage, A], T]:
    """One thread at a time fills in a cache's launches; a fault of the device ends its use."""

    @functools.wraps(operation)
    def guarded(
        self: CudaBackend, storage: CudaStorage, *arguments: A.args, **named: A.kwargs
    ) -> T:
        with storage.lock:
            storage.check_usable()
            try:
                return operation(self, storage, *arguments, **named)
            except DeviceFault as fault:
                storage.fault = str(fault)
                raise

    return cast("Callable[Concatenate[CudaBackend, CudaStorage, A], T]", guarded)


class CudaBackend:
    """Attention on a CUDA device; its arrays are the runtime's.

    Everything runs in the caller's current stream. docs/gpu.md has what differs from the CPU.

    Attributes:
        runtime: the device that is current where none is named.
    """

    name = "cuda"
    xp: Any

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.xp = runtime.xp
        self._launchers: dict[int, Launcher] = {}

    def on_device(self, device: int | None) -> AbstractContextManager[Any]:
        return self._launcher(device).runtime.active()

    def describe(self, device: int | None) -> str:
        runtime = self._launcher(device).runtime
        return f"{runtime.name}, {runtime.arch} kernels"

    def available_memory(self, device: int | None) -> int:
        return self._launcher(device).runtime.available_memory()

    def allocate(
        self, spec: CacheSpec, num_blocks: Sequence[int], device: int | None
    ) -> CudaStorage:
        launcher = self._launcher(device)
        with launcher.runtime.active():
            return CudaStorage(spec, num_blocks, launcher)

    @_guarded
    def begin_step(self, storage: CudaStorage, plans: Sequence[Plan]) -> Hashable:
        storage.launcher.runtime.check_active()
        return storage.plans.upload(plans)

    @_guarded
    def append(
        self, storage: CudaStorage, layer: int, plan: Plan, k: Any, v: Any | None, layout: str
    ) -> None:
        if storage.v_in_k[layer]:
            checks.no_v(v, layer, storage.v_in_k[layer])
        layout_number(layout)
        storage.append_call(layer).run(plan, k, v, layout)

    @_guarded
    def attend(
        self,
        storage: CudaStorage,
        layer: int,
        plan: Plan,
        q: Any,
        layout: str,
        options: AttendOptions,
        return_lse: bool,
        out: Any | None,
    ) -> Any:
        layout_number(layout)
        return storage.attend_call(layer).run(plan, q, layout, options, return_lse, out)

    @_guarded
    def copy_blocks(self, storage: CudaStorage, pool: int, plan: Plan) -> None:
        for blocks in storage.pool_blocks[pool]:
            block_calls.copy_blocks(storage.launcher, blocks, plan)

    @_guarded
    def restore_raw(self, storage: CudaStorage, group: int, plan: Plan) -> None:
        for blocks in storage.pool_blocks[group]:
            if blocks.raw is not None:
                block_calls.restore_raw(storage.launcher, blocks, plan)

    def blocks(self, storage: CudaStorage, layer: int) -> tuple[Any, Any]:
        k, v = storage.layers[layer]
        return k.array, v.array

    @_guarded
    def read(
        self,
        storage: CudaStorage,
        layer: int,
        block_row: NDArray[np.int32],
        start: int,
        stop: int,
        raw_row: NDArray[np.int32] | None,
    ) -> tuple[Any, Any]:
        launcher = storage.launcher
        k_blocks, v_blocks = storage.layers[layer]
        with launcher.runtime.active():
            k = block_calls.read(launcher, k_blocks, block_row, start, stop, raw_row)
            shared = storage.v_in_k[layer]
            if shared:
                return k, k[..., :shared]
            return k, block_calls.read(launcher, v_blocks, block_row, start, stop, raw_row)

    @_guarded
    def check_finite(self, storage: CudaStorage) -> None:
        if storage.launcher.runtime.to_host(storage.not_finite)[0]:
            storage.launcher.runtime.clear(storage.not_finite)
            raise NotFinite(
                "append: expected finite numbers for quantized layers, got NaN or infinity, which "
                "were stored as 0 and as 65504"
            )

    def append_kv(
        self, k: Any, v: Any | None, k_blocks: Any, v_blocks: Any | None, slots: Any, layout: str
    ) -> None:
        plain_arrays.append_kv(self._launcher(None), k, v, k_blocks, v_blocks, slots, layout)

    def paged_attention(
        self,
        q: Any,
        k_blocks: Any,
        v_blocks: Any,
        block_tables: Any,
        seq_lens: Any,
        query_starts: Any,
        layout: str,
        options: AttendOptions,
        return_lse: bool,
    ) -> Any:
        return plain_arrays.paged_attention(
            self._launcher(None),
            q,
            k_blocks,
            v_blocks,
            block_tables,
            seq_lens,
            query_starts,
            layout,
            options,
            return_lse,
        )

    def attention(
        self,
        q: Any,
        k: Any,
        v: Any,
        query_cut: Any | None,
        kv_cut: Any | None,
        layout: str,
        options: AttendOptions,
        return_lse: bool,
        out: Any | None,
    ) -> Any:
        return plain_arrays.attention(
            self._launcher(None), q, k, v, query_cut, kv_cut, layout, options, return_lse, out
        )

    def merge_states(self, outs: Any, lses: Any) -> tuple[Any, Any]:
        return plain_arrays.merge_states(self._launcher(None), outs, lses)

    def quantize(self, x: Any, format: str, scales: Any | None, bias: Any | None) -> Any:
        return plain_arrays.encode(self._launcher(None), x, get_format(format), scales, bias)

    def dequantize(self, code: Any, format: str, scales: Any | None, bias: Any | None) -> Any:
        return plain_arrays.decode(self._launcher(None), code, get_format(format), scales, bias)

    def _launcher(self, device: int | None) -> Launcher:
        """The kernels of a device, or of the one that is current."""
        runtime = self.runtime.on_device(device)
        launcher = self._launchers.get(runtime.device)
        if launcher is None:
            launcher = self._launchers[runtime.device] = Launcher(runtime)
        return launcher


def create_backend() -> CudaBackend:
    """The backend on the current device.

    Raises:
        BackendUnavailable: what is missing: CuPy, a driver or a device.
    """
    from kvcore_gpu.cupy_runtime import CupyRuntime

    return CudaBackend(CupyRuntime())
