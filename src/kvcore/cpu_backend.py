"""The CPU backend: the Backend protocol over the Cython extensions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from kvcore import arrays, checks, quantize, user_blocks
from kvcore._native import attention
from kvcore._native.blocks import Blocks, Plan
from kvcore.attend_options import AttendOptions, packed_mask, per_head, token_positions
from kvcore.contiguous import as_blocks, contiguous_plan
from kvcore.cpu_storage import CpuStorage
from kvcore.errors import InvalidArgument, InvalidType, NotFinite
from kvcore.formats import get_format
from kvcore.machine import get_isa, get_num_threads
from kvcore.spec import CacheSpec
from kvcore.units import available_memory


class CpuBackend:
    """Attention on the CPU through the C core; its arrays are NumPy's."""

    name = "cpu"
    xp = np

    def on_device(self, device: int | None) -> AbstractContextManager[None]:
        _check_device(device)
        return nullcontext()

    def describe(self, device: int | None) -> str:
        _check_device(device)
        return f"{get_num_threads()} threads, {get_isa()} kernels"

    def available_memory(self, device: int | None) -> int:
        _check_device(device)
        return available_memory()

    def allocate(
        self, spec: CacheSpec, num_blocks: Sequence[int], device: int | None
    ) -> CpuStorage:
        _check_device(device)
        return CpuStorage(spec, num_blocks)

    def begin_step(self, storage: CpuStorage, plans: Sequence[Plan]) -> None:
        """Nothing: the core reads plans where they are."""

    def append(
        self, storage: CpuStorage, layer: int, plan: Plan, k: Any, v: Any | None, layout: str
    ) -> None:
        k_blocks, v_blocks = storage.layers[layer]
        number = arrays.layout_number(layout)
        k_rows = _rows_for(k, "k", layout, plan, k_blocks)
        if k_blocks.needs_finite:
            _check_finite(k_rows, "k", plan, number)
        if storage.v_in_k[layer]:
            checks.no_v(v, layer, storage.v_in_k[layer])
            attention.append(plan, k_rows, number, k_blocks)
            return
        v_rows = _rows_for(v, "v", layout, plan, v_blocks)
        if v_blocks.needs_finite:
            _check_finite(v_rows, "v", plan, number)
        attention.append(plan, k_rows, number, k_blocks)
        attention.append(plan, v_rows, number, v_blocks)

    def attend(
        self,
        storage: CpuStorage,
        layer: int,
        plan: Plan,
        q: Any,
        layout: str,
        options: AttendOptions,
        return_lse: bool,
        out: Any | None,
    ) -> Any:
        k_blocks, v_blocks = storage.layers[layer]
        return _attend(plan, q, k_blocks, v_blocks, layout, options, return_lse, out)

    def copy_blocks(self, storage: CpuStorage, pool: int, plan: Plan) -> None:
        for blocks in storage.pool_blocks[pool]:
            attention.copy_blocks(plan, blocks)

    def restore_raw(self, storage: CpuStorage, group: int, plan: Plan) -> None:
        for blocks in storage.pool_blocks[group]:
            attention.restore_raw(plan, blocks)

    def blocks(self, storage: CpuStorage, layer: int) -> tuple[np.ndarray, np.ndarray]:
        k_blocks, v_blocks = storage.layers[layer]
        return k_blocks.array, v_blocks.array

    def read(
        self,
        storage: CpuStorage,
        layer: int,
        block_row: np.ndarray,
        start: int,
        stop: int,
        raw_row: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        k_blocks, v_blocks = storage.layers[layer]
        k = attention.read(k_blocks, block_row, start, stop, raw_row)
        shared = storage.v_in_k[layer]
        if shared:
            return k, k[..., :shared]
        return k, attention.read(v_blocks, block_row, start, stop, raw_row)

    def check_finite(self, storage: CpuStorage) -> None:
        """Nothing: append raises before it stores."""

    def append_kv(
        self, k: Any, v: Any | None, k_blocks: Any, v_blocks: Any | None, slots: Any, layout: str
    ) -> None:
        lies_in_k = v is None and v_blocks is None
        k_view = _user_blocks(k_blocks, "k_blocks", layout, writable=True)
        v_view = k_view
        if not lies_in_k:
            v_view = _user_blocks(v_blocks, "v_blocks", layout, writable=True)
        user_blocks.check_pair(k_view.array, v_view.array, layout)
        plan = user_blocks.plan_of_slots(slots, len(k_view.array), k_view.block_size)
        k_rows = _rows_for(k, "k", "NHD", plan, k_view)
        if not lies_in_k:
            v_rows = _rows_for(v, "v", "NHD", plan, v_view)
        attention.append(plan, k_rows, 0, k_view)
        if not lies_in_k:
            attention.append(plan, v_rows, 0, v_view)

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
        k_view = _user_blocks(k_blocks, "k_blocks", layout)
        v_view = _user_blocks(v_blocks, "v_blocks", layout)
        user_blocks.check_pair(k_view.array, v_view.array, layout)
        plan = user_blocks.plan_of_tables(
            block_tables,
            seq_lens,
            query_starts,
            len(k_view.array),
            k_view.block_size,
            options.is_narrowed,
        )
        with user_blocks.missing_blocks_named():
            return _attend(plan, q, k_view, v_view, "NHD", options, return_lse, None)

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
        queries = arrays.as_rows(q, "q")
        keys, values = arrays.as_array(k, "k"), arrays.as_array(v, "v")
        k_blocks, v_blocks = as_blocks(keys, "k", layout), as_blocks(values, "v", layout)
        plan = contiguous_plan(queries, keys, values, query_cut, kv_cut, layout, options)
        return _attend(plan, queries, k_blocks, v_blocks, layout, options, return_lse, out)

    def merge_states(self, outs: Any, lses: Any) -> tuple[np.ndarray, np.ndarray]:
        parts, part_lses = arrays.as_array(outs, "outs"), arrays.as_array(lses, "lses")
        arrays.check_partials(parts, part_lses)
        parts, part_lses = arrays.dense(parts), arrays.dense(part_lses)
        out, lse = np.empty(parts.shape[1:], np.float32), np.empty(part_lses.shape[1:], np.float32)
        if lse.size:
            flat = parts.reshape(parts.shape[0], -1, parts.shape[-1])
            attention.merge_states(flat, part_lses.reshape(len(flat), -1), out, lse)
        return out, lse

    def quantize(self, x: Any, format: str, scales: Any | None, bias: Any | None) -> np.ndarray:
        return quantize.quantize(x, get_format(format), scales, bias)

    def dequantize(
        self, code: Any, format: str, scales: Any | None, bias: Any | None
    ) -> np.ndarray:
        return quantize.dequantize(code, get_format(format), scales, bias)


def create_backend() -> CpuBackend:
    return CpuBackend()


def _check_device(device: int | None) -> None:
    if device is not None:
        raise InvalidArgument(f'device: expected None for backend "cpu", got {device!r}')


def _rows_for(
    value: Any, argument: str, layout: str, plan: Plan, blocks: Blocks, grouped: bool = False
) -> np.ndarray:
    """What the user gave for the plan's new tokens, checked, and copied only when it must be.

    Its heads are those of `blocks` or, for queries, `grouped`: a multiple of them.
    """
    array: np.ndarray = value
    if attention.fits(plan, array, arrays.LAYOUTS[layout], blocks, grouped):
        return array
    array = arrays.as_rows(value, argument)
    arrays.check_rows(array, argument, layout, plan, blocks.num_heads, blocks.head_dim, grouped)
    return array


def _check_finite(rows: np.ndarray, argument: str, plan: Plan, layout: int) -> None:
    place = attention.find_not_finite(plan, rows, layout)
    if place is not None:
        raise NotFinite(
            f"{argument}: expected finite numbers, as the format is quantized, got NaN or infinity "
            f"in new token {place[0]}, head {place[1]}"
        )


def _attend(
    plan: Plan,
    q: Any,
    k_blocks: Blocks,
    v_blocks: Blocks,
    layout: str,
    options: AttendOptions,
    return_lse: bool,
    out: Any | None,
) -> Any:
    number = arrays.layout_number(layout)
    rows = _rows_for(q, "q", layout, plan, k_blocks, grouped=True)
    num_heads = rows.shape[layout.index("H")]
    if out is not None:
        _check_out(out, (*rows.shape[:-1], v_blocks.head_dim), rows.dtype)
    mask, mask_offsets = packed_mask(options.mask, plan)
    return attention.attend(
        plan,
        rows,
        number,
        k_blocks,
        v_blocks,
        out,
        return_lse,
        options.scale_for(k_blocks.head_dim),
        options.exact,
        options.softcap or 0.0,
        options.causal,
        options.window or 0,
        per_head(options.alibi_slopes, "alibi_slopes", num_heads),
        token_positions(options.positions, plan.num_tokens),
        mask,
        mask_offsets,
        per_head(options.sinks, "sinks", num_heads),
    )


def _check_out(out: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if not isinstance(out, np.ndarray) or out.dtype != dtype:
        came = out.dtype.name if isinstance(out, np.ndarray) else type(out).__name__
        raise InvalidType(f"out: expected a {dtype.name} NumPy array like q, got {came}")
    checks.shape(out.shape, shape, "out", "q's with head_dim_v")
    if not out.flags.writeable or not arrays.is_readable(out) or arrays.overlaps_itself(out):
        raise InvalidArgument(
            "out: expected a writable array whose last axis is dense and whose rows lie apart, "
            f"got strides {out.strides}"
        )


def _user_blocks(value: Any, argument: str, layout: str, *, writable: bool = False) -> Blocks:
    """A caller's [N, H, B, D] or [N, B, H, D] array as blocks of the format its dtype names."""
    array = arrays.as_array(value, argument)
    format = user_blocks.block_format(array, argument, layout)
    if writable and not array.flags.writeable:
        raise InvalidArgument(f"{argument}: expected a writable array")
    if not arrays.is_readable(array):
        raise InvalidArgument(
            f"{argument}: expected a dense last axis, got strides {array.strides}"
        )
    view = quantize.storage_view(array, format, argument)
    return Blocks.of_rows(view, format.index, layout == "NHD")
