"""The CPU backend: the Backend protocol over the Cython extensions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from kvcore import arrays, checks, quantize
from kvcore._native import attention
from kvcore._native.blocks import Blocks, Plan
from kvcore.attend_options import AttendOptions, packed_mask, per_head, token_positions
from kvcore.contiguous import ARRAY_FORMATS, as_blocks, contiguous_plan
from kvcore.cpu_storage import CpuStorage
from kvcore.errors import InvalidArgument, InvalidType, NotFinite, TokensReleased
from kvcore.formats import FORMATS, get_format
from kvcore.machine import get_isa, get_num_threads
from kvcore.spec import MAX_HEAD_DIM, CacheSpec


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
            if v is not None:
                raise InvalidArgument(
                    f"v: expected None, as V of layer {layer} is the first "
                    f"{storage.v_in_k[layer]} elements of k, got {type(v).__name__}"
                )
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
        _check_pair(k_view, v_view)
        row = arrays.as_index(slots, "slots", 1)
        block_size = k_view.block_size
        limit = k_view.array.shape[0] * block_size
        if row.size and (row.min() < -1 or row.max() >= limit):
            raise InvalidArgument(
                f"slots: expected -1 (skip) to {limit - 1}, got {row.min()} to {row.max()}"
            )
        if not row.size:
            raise InvalidArgument("slots: expected at least one, got none")
        plan = Plan.from_slots(row, block_size)
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
        _check_pair(k_view, v_view)
        narrowed = options.window is not None or options.mask is not None
        plan = _user_plan(block_tables, seq_lens, query_starts, k_view, narrowed)
        try:
            return _attend(plan, q, k_view, v_view, "NHD", options, return_lse, None)
        except TokensReleased:
            raise InvalidArgument(
                "block_tables: expected -1 only where window and mask let no token see, got -1 "
                "between the first and the last token that one sees"
            ) from None

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
        parts = _float32(outs, "outs")
        part_lses = _float32(lses, "lses")
        if parts.ndim < 2 or parts.shape[0] < 1 or parts.shape[-1] % 8 or not parts.shape[-1]:
            raise InvalidArgument(
                "outs: expected shape [P, ..., D] with P >= 1 and D a multiple of 8, "
                f"got {list(parts.shape)}"
            )
        checks.shape(part_lses.shape, parts.shape[:-1], "lses", "outs.shape[:-1]")
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
    arrays.check_rows(
        array,
        argument,
        layout,
        num_tokens=plan.num_tokens,
        num_sequences=plan.num_sequences,
        max_new=plan.max_new,
        num_heads=None if grouped else blocks.num_heads,
        head_dim=blocks.head_dim,
    )
    num_heads = array.shape[layout.index("H")]
    if num_heads == 0 or num_heads % blocks.num_heads:
        raise InvalidArgument(
            f"{argument}: expected a multiple of {blocks.num_heads} heads, got {num_heads}"
        )
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


def _float32(value: Any, argument: str) -> np.ndarray:
    array = arrays.as_array(value, argument)
    if array.dtype != np.float32:
        raise InvalidType(f"{argument}: expected float32, got {array.dtype}")
    return arrays.dense(array)


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


_BLOCK_FORMATS = {**ARRAY_FORMATS, "uint16": "bf16"}
_BLOCK_LAYOUTS = {"HND": "[N, H, B, D]", "NHD": "[N, B, H, D]"}


def _user_blocks(value: Any, argument: str, layout: str, *, writable: bool = False) -> Blocks:
    """A caller's [N, H, B, D] or [N, B, H, D] array as blocks of the format its dtype names."""
    array = arrays.as_array(value, argument)
    name = _BLOCK_FORMATS.get(array.dtype.name)
    if name is None:
        raise InvalidType(
            f"{argument}: expected float32, float16 or bfloat16 (or its bits as uint16), "
            f"got {array.dtype.name}"
        )
    axes = _BLOCK_LAYOUTS.get(layout)
    if axes is None:
        raise InvalidArgument(f'layout: expected "HND" or "NHD", got {layout!r}')
    if array.ndim != 4 or 0 in array.shape:
        raise InvalidArgument(f"{argument}: expected shape {axes}, got {list(array.shape)}")
    if writable and not array.flags.writeable:
        raise InvalidArgument(f"{argument}: expected a writable array")
    if not arrays.is_readable(array):
        raise InvalidArgument(
            f"{argument}: expected a dense last axis, got strides {array.strides}"
        )
    view = quantize.storage_view(array, FORMATS[name], argument)
    return Blocks.of_rows(view, FORMATS[name].index, layout == "NHD")


def _check_pair(k_blocks: Blocks, v_blocks: Blocks) -> None:
    checks.shape(
        v_blocks.array.shape[:3], k_blocks.array.shape[:3], "v_blocks", "k_blocks.shape[:3]"
    )
    block_size = k_blocks.block_size
    if block_size < 16 or block_size & (block_size - 1):
        raise InvalidArgument(
            f"k_blocks: expected a block size that is a power of two >= 16, got {block_size}"
        )
    for blocks, argument in ((k_blocks, "k_blocks"), (v_blocks, "v_blocks")):
        if blocks.head_dim % 8 or blocks.head_dim > MAX_HEAD_DIM:
            raise InvalidArgument(
                f"{argument}: expected a head_dim that is a multiple of 8, at most "
                f"{MAX_HEAD_DIM}, got {blocks.head_dim}"
            )


def _user_plan(
    block_tables: Any, seq_lens: Any, query_starts: Any, blocks: Blocks, narrowed: bool
) -> Plan:
    """The plan that a caller's own books describe, checked so that no read leaves the blocks.

    `narrowed`: no token may see some blocks, which are then allowed to be -1.
    """
    tables = arrays.as_index(block_tables, "block_tables", 2)
    lens = arrays.as_index(seq_lens, "seq_lens", 1)
    starts = arrays.as_index(query_starts, "query_starts", 1)
    count = lens.shape[0]
    if count < 1:
        raise InvalidArgument("seq_lens: expected at least one sequence, got none")
    checks.shape(tables.shape[:1], (count,), "block_tables", "[S, W], of which [S]")
    checks.shape(starts.shape, (count + 1,), "query_starts", "[S + 1]")
    new = np.diff(starts)
    if starts[0] != 0 or (new < 0).any() or starts[-1] < 1:
        raise InvalidArgument(
            f"query_starts: expected 0 first, never falling and at least 1 last, got {starts}"
        )
    block_size, num_blocks = blocks.block_size, blocks.array.shape[0]
    if (lens < new).any() or lens.max() > tables.shape[1] * block_size:
        raise InvalidArgument(
            f"seq_lens: expected from the number of new tokens to {tables.shape[1]} blocks of "
            f"{block_size}, got {lens}"
        )
    columns = -(-lens // block_size)
    used = tables[np.arange(tables.shape[1]) < columns[:, None]]
    if used.size and (used.min() < -narrowed or used.max() >= num_blocks):
        raise InvalidArgument(
            f"block_tables: expected blocks 0 to {num_blocks - 1} in the columns that seq_lens "
            f"covers, got {used.min()} to {used.max()}"
        )
    return Plan.from_tables(tables, lens, starts, block_size)
