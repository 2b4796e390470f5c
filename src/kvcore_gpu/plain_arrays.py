"""The operations on plain arrays, for callers that keep their own books: kvcore.ops on a device."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvcore import arrays, contiguous, quantize, user_blocks
from kvcore.attend_options import AttendOptions
from kvcore.backend import Plan, lies_on_device
from kvcore.errors import InvalidArgument, NotFinite
from kvcore.formats import FORMATS, GROUP_TOKENS, Format
from kvcore_gpu import blocks, params
from kvcore_gpu.append_call import AppendCall
from kvcore_gpu.arrays import ALIGNMENT, dense, is_readable
from kvcore_gpu.attend_call import AttendCall
from kvcore_gpu.blocks import DeviceBlocks
from kvcore_gpu.launcher import Launcher
from kvcore_gpu.option_arrays import OptionArrays
from kvcore_gpu.plans import PlanBuffer
from kvcore_gpu.runtime import Runtime
from kvcore_gpu.scratch import Scratch

_BLOCK = (128, 1, 1)
_ROWS_PER_BLOCK = 8
_LONGEST_STRIDE = 2**31 - 1  # bytes from token to token


def append_kv(
    launcher: Launcher,
    k: Any,
    v: Any | None,
    k_blocks: Any,
    v_blocks: Any | None,
    slots: Any,
    layout: str,
) -> None:
    """See kvcore.ops.append_kv."""
    runtime = launcher.runtime
    lies_in_k = v is None and v_blocks is None
    k_view = _user_blocks(runtime, k_blocks, "k_blocks", layout, writable=True)
    v_view = k_view
    if not lies_in_k:
        v_view = _user_blocks(runtime, v_blocks, "v_blocks", layout, writable=True)
    user_blocks.check_pair(k_view.array, v_view.array, layout)
    plan = user_blocks.plan_of_slots(on_host(runtime, slots), len(k_view.array), k_view.block_size)
    buffer = _upload(runtime, plan)
    AppendCall(launcher, k_view, None if lies_in_k else v_view, 0).run(plan, k, v, "NHD")
    del buffer


def paged_attention(
    launcher: Launcher,
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
    """See kvcore.ops.paged_attention."""
    runtime = launcher.runtime
    k_view = _user_blocks(runtime, k_blocks, "k_blocks", layout)
    v_view = _user_blocks(runtime, v_blocks, "v_blocks", layout)
    user_blocks.check_pair(k_view.array, v_view.array, layout)
    plan = user_blocks.plan_of_tables(
        on_host(runtime, block_tables),
        on_host(runtime, seq_lens),
        on_host(runtime, query_starts),
        len(k_view.array),
        k_view.block_size,
        options.is_narrowed,
    )
    with user_blocks.missing_blocks_named():
        return _attend(launcher, plan, q, k_view, v_view, "NHD", options, return_lse, None)


def attention(
    launcher: Launcher,
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
    """See kvcore.ops.attention."""
    runtime = launcher.runtime
    queries = runtime.as_array(q, "q")
    arrays.dtype_number(queries, "q")
    keys, values = runtime.as_array(k, "k"), runtime.as_array(v, "v")
    k_view = _contiguous_blocks(runtime, keys, "k", layout)
    v_view = _contiguous_blocks(runtime, values, "v", layout)
    cuts = on_host(runtime, query_cut), on_host(runtime, kv_cut)
    plan = contiguous.contiguous_plan(queries, keys, values, *cuts, layout, options)
    return _attend(launcher, plan, queries, k_view, v_view, layout, options, return_lse, out)


def merge_states(launcher: Launcher, outs: Any, lses: Any) -> tuple[Any, Any]:
    """See kvcore.ops.merge_states."""
    runtime = launcher.runtime
    parts, part_lses = runtime.as_array(outs, "outs"), runtime.as_array(lses, "lses")
    arrays.check_partials(parts, part_lses)
    parts, part_lses = dense(runtime, parts), dense(runtime, part_lses)
    out = runtime.empty(parts.shape[1:], np.float32)
    lse = runtime.empty(part_lses.shape[1:], np.float32)
    if lse.size:
        kernel = launcher.kernel("merge_states.cu", "merge_states", params.MergeParams)
        fill = kernel.params
        fill.outs, fill.lses = runtime.address(parts), runtime.address(part_lses)
        fill.out, fill.lse = runtime.address(out), runtime.address(lse)
        fill.num_partials, fill.num_rows, fill.head_dim = len(parts), lse.size, out.shape[-1]
        kernel.launch((-(-lse.size // 4), 1, 1), _BLOCK)
    return out, lse


def encode(launcher: Launcher, x: Any, format: Format, scales: Any | None, bias: Any | None) -> Any:
    """See kvcore.ops.quantize. Waits for the device where the format is quantized."""
    runtime = launcher.runtime
    rows = runtime.as_array(x, "x")
    arrays.dtype_number(rows, "x")
    shape = quantize.encoded_shape(format, rows.shape)
    rows = dense(runtime, rows)
    code = runtime.empty(shape, format.storage_dtype)
    flag = runtime.zeros((1,), np.int32)
    _run_codec(launcher, "quantize", rows, code, format, scales, bias, flag)
    if format.is_quantized and rows.size and runtime.to_host(flag)[0]:
        raise NotFinite(f"x: expected finite numbers for {format.name}, got NaN or infinity")
    return code


def decode(
    launcher: Launcher, code: Any, format: Format, scales: Any | None, bias: Any | None
) -> Any:
    """See kvcore.ops.dequantize."""
    runtime = launcher.runtime
    codes = quantize.storage_view(runtime.as_array(code, "code"), format, "code")
    shape = quantize.decoded_shape(format, codes.shape)
    codes = dense(runtime, codes)
    rows = runtime.empty(shape, np.float32)
    _run_codec(launcher, "dequantize", rows, codes, format, scales, bias, None)
    return rows


def _run_codec(
    launcher: Launcher,
    entry: str,
    rows: Any,
    codes: Any,
    format: Format,
    scales: Any | None,
    bias: Any | None,
    flag: Any | None,
) -> None:
    runtime, head_dim = launcher.runtime, rows.shape[-1]
    channels = quantize.channels_of(
        format, on_host(runtime, scales), on_host(runtime, bias), head_dim
    )
    if not rows.size:
        return
    kept = [None if values is None else runtime.to_device(values) for values in channels]
    kernel = launcher.kernel(
        "quantize.cu", entry, params.QuantizeParams, K_FORMAT=format.index, HEAD_DIM=head_dim
    )
    fill = kernel.params
    fill.rows, fill.codes = runtime.address(rows), runtime.address(codes)
    fill.bias, fill.scales = [None if a is None else runtime.address(a) for a in kept]
    fill.not_finite = None if flag is None else runtime.address(flag)
    fill.num_rows, fill.dtype = rows.size // head_dim, arrays.dtype_number(rows, "x")
    in_groups = entry == "quantize" and format.kind == "channel"
    rows_per_block = GROUP_TOKENS if in_groups else _ROWS_PER_BLOCK
    kernel.launch((-(-fill.num_rows // rows_per_block), 1, 1), _BLOCK)


def on_host(runtime: Runtime, value: Any) -> Any:
    """A caller's small array where Python can check it; that of a device is copied, which waits."""
    return runtime.to_host(runtime.as_array(value, "array")) if lies_on_device(value) else value


def _upload(runtime: Runtime, plan: Plan) -> PlanBuffer:
    """The plan in memory of its own, which goes back to the pool with what is returned."""
    buffer = PlanBuffer(runtime, 0)
    buffer.upload([plan])
    return buffer


def _attend(
    launcher: Launcher,
    plan: Plan,
    q: Any,
    k: DeviceBlocks,
    v: DeviceBlocks,
    layout: str,
    options: AttendOptions,
    return_lse: bool,
    out: Any | None,
) -> Any:
    buffer = _upload(launcher.runtime, plan)
    scratch, arrays = Scratch(launcher.runtime), OptionArrays(launcher)
    call = AttendCall(launcher, scratch, arrays, k, v, False, can_miss=True)
    result = call.run(plan, q, layout, options, return_lse, out)
    del buffer
    return result


def _user_blocks(
    runtime: Runtime, value: Any, argument: str, layout: str, *, writable: bool = False
) -> DeviceBlocks:
    """A caller's [N, H, B, D] or [N, B, H, D] array as blocks of the format its dtype names."""
    array = runtime.as_array(value, argument)
    format = user_blocks.block_format(array, argument, layout)
    if writable and not getattr(array.flags, "writeable", True):
        raise InvalidArgument(f"{argument}: expected a writable array")
    slot = user_blocks.block_axis(layout)
    if not is_readable(runtime, array) or not 0 <= array.strides[slot] <= _LONGEST_STRIDE:
        raise InvalidArgument(
            f"{argument}: expected a dense last axis, and rows at multiples of {ALIGNMENT} bytes, "
            f"those of a block one after the other, got strides {array.strides}"
        )
    head = 3 - slot
    n, d = array.shape[0], array.shape[3]
    shape = n, array.shape[head], array.shape[slot], d
    strides = array.strides[0], array.strides[head], array.strides[slot]
    return blocks.of_rows(runtime, array, format, shape, strides)


def _contiguous_blocks(runtime: Runtime, array: Any, argument: str, layout: str) -> DeviceBlocks:
    """K or V of sequences, each of which is the one block that starts at its first token."""
    contiguous.check_array(array, argument, layout)
    if not is_readable(runtime, array) or not contiguous.has_forward_rows(array):
        array = runtime.copy(array)
    format = FORMATS[contiguous.ARRAY_FORMATS[array.dtype.name]]
    shape, strides = contiguous.block_placement(array, layout)
    return blocks.of_rows(runtime, array, format, shape, strides[:3])
