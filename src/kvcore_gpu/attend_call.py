"""One call of attend: the user's arrays and options as parameters of the kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcore import checks
from kvcore.attend_options import (
    AttendOptions,
    check_sight,
    packed_mask,
    per_head,
    token_positions,
)
from kvcore.backend import Plan, lies_on_device
from kvcore.errors import InvalidType
from kvcore_gpu import params
from kvcore_gpu.arrays import check_out, dense, place, put_rows, rows_for, signature_of
from kvcore_gpu.attention import Attention, Launch, Shape
from kvcore_gpu.blocks import DeviceBlocks
from kvcore_gpu.launcher import Launcher
from kvcore_gpu.runtime import Runtime
from kvcore_gpu.scratch import Scratch

_Q, _OUT = params.AttendParams.q.offset, params.AttendParams.out.offset


class AttendCall:
    """The launches of one layer's attention, with their parameters.

    Args:
        launcher: the device's kernels.
        scratch: memory for parts of results.
        k, v: the layer's blocks.
        v_in_k: whether V is the first elements of K.
        can_miss: whether a block that is looked at may be -1.
    """

    def __init__(
        self,
        launcher: Launcher,
        scratch: Scratch,
        k: DeviceBlocks,
        v: DeviceBlocks,
        v_in_k: bool,
        can_miss: bool,
    ) -> None:
        self._launcher = launcher
        self._scratch = scratch
        self._k, self._v = k, v
        self._v_in_k = v_in_k
        self._can_miss = can_miss
        self._signature: Any = None  # of the last call, if its queries were read in place
        self._out_like: Any = None  # shape and dtype
        self._launches: list[Launch] = []
        self._attentions: dict[tuple[int, int, bool, bool], Attention] = {}
        self._params = params.AttendParams()
        self._params.k, self._params.v = k.struct, v.struct

    def run(
        self,
        plan: Plan,
        q: Any,
        layout: str,
        options: AttendOptions,
        return_lse: bool,
        out: Any | None,
    ) -> Any:
        """out, or (out, lse); plan.device says where the sequences lie."""
        runtime, fill = self._launcher.runtime, self._params
        signature = (
            (layout, plan.device, return_lse),
            (signature_of(runtime, q), signature_of(runtime, out)),
            _scalars(options),
        )
        kept = None
        if signature == self._signature and self._place(q, out):
            self._check_sight(plan, options, None, None, None)
            target: Any = out
            if out is None:
                target = self._target(out)
                place(fill, _OUT, runtime, target)
        else:
            self._signature = None
            rows, kept = self._fill(plan, q, layout, options, out)
            target = self._target(out)
            put_rows(fill, _OUT, runtime, target, layout)
            if rows is q and (out is None or target is out):
                self._signature = signature
        if target.ndim == 4 and target.shape[0] * fill.out.padded_length != plan.num_tokens:
            runtime.clear(target)  # the padding; the rest is written over
        lse = None
        if return_lse:
            lse = runtime.empty((plan.num_tokens, fill.q.num_heads), np.float32)
        fill.lse = None if lse is None else runtime.address(lse)
        for function, grid, block, shared_bytes, first_tile in self._launches:
            fill.first_tile = first_tile
            runtime.launch(function, grid, block, shared_bytes, fill)
        del kept  # from here on the stream's order keeps its memory for the launches
        given = target if out is None else out
        return given if lse is None else (given, lse)

    def _fill(
        self, plan: Plan, q: Any, layout: str, options: AttendOptions, out: Any | None
    ) -> tuple[Any, list[Any]]:
        """Checks and writes all but out's and lse's place; the query rows and what else is read."""
        runtime, fill = self._launcher.runtime, self._params
        k, v = self._k, self._v
        rows = rows_for(runtime, q, "q", layout, plan, k.num_heads, k.head_dim, grouped=True)
        self._out_like = (*rows.shape[:-1], v.head_dim), rows.dtype
        if out is not None:
            check_out(runtime, out, *self._out_like)
        num_heads = rows.shape[layout.index("H")]
        kept = [rows, *self._put_options(plan, options, num_heads)]
        put_rows(fill, _Q, runtime, rows, layout)
        fill.plan = plan.device
        fill.group = num_heads // k.num_heads
        self._launches = self._attention_for(fill, options).launches(fill, self._scratch.get)
        return rows, kept

    def _place(self, q: Any, out: Any | None) -> bool:
        """Where arrays like the last call's lie; False if they cannot be used there."""
        runtime, fill = self._launcher.runtime, self._params
        return place(fill, _Q, runtime, q) and (out is None or place(fill, _OUT, runtime, out))

    def _target(self, out: Any | None) -> Any:
        """The array to write to."""
        runtime = self._launcher.runtime
        return runtime.empty(*self._out_like) if out is None else runtime.as_array(out, "out")

    def _attention_for(self, fill: params.AttendParams, options: AttendOptions) -> Attention:
        """The kernels for these queries and options, compiled when first asked for."""
        key = (fill.group, fill.q.dtype, has_options(options), bool(options.exact))
        found = self._attentions.get(key)
        if found is None:
            k, v = self._k, self._v
            shape = Shape(
                k.format,
                v.format,
                k.head_dim,
                v.head_dim,
                self._v_in_k,
                k.num_heads,
                fill.group,
                k.block_size,
                fill.q.dtype,
                has_options(options),
                bool(options.exact),
            )
            found = self._attentions[key] = Attention(self._launcher.runtime, shape)
        return found

    def _put_options(self, plan: Plan, options: AttendOptions, num_heads: int) -> list[Any]:
        """Fills in the options; returns arrays that the launches read."""
        fill = self._params
        fill.scale = options.scale_for(self._k.head_dim)
        fill.softcap = options.softcap or 0.0
        fill.causal = bool(options.causal)
        fill.window = options.window or 0
        kept: list[Any] = []
        fill.alibi_slopes = self._floats(options.alibi_slopes, "alibi_slopes", num_heads, kept)
        fill.sinks = self._floats(options.sinks, "sinks", num_heads, kept)
        fill.positions = fill.mask = fill.mask_offsets = None
        if options.positions is None and options.mask is None:
            self._check_sight(plan, options, None, None, None)
        else:
            self._put_positions_and_mask(plan, options, kept)
        return kept

    def _put_positions_and_mask(self, plan: Plan, options: AttendOptions, kept: list[Any]) -> None:
        fill, runtime = self._params, self._launcher.runtime
        positions = options.positions
        on_device = lies_on_device(positions)
        if on_device:
            array = device_array(runtime, positions, "positions", np.int32)
            checks.shape(array.shape, (plan.num_tokens,), "positions", "[T]")
            fill.positions = runtime.address(array)
            kept.append(array)
            checked = runtime.to_host(array) if self._can_miss else None
        host = None if on_device else token_positions(positions, plan.num_tokens)
        mask, offsets = packed_mask(on_host(runtime, options.mask), plan)
        self._check_sight(plan, options, checked if on_device else host, mask, offsets)
        parts = [part for part in (offsets, host, mask) if part is not None]
        if parts:
            sent = send(runtime, parts)
            kept.append(sent)
            places = _places(runtime.address(sent), parts)
            for name, part in (("mask_offsets", offsets), ("positions", host), ("mask", mask)):
                if part is not None:
                    setattr(fill, name, next(places))

    def _check_sight(
        self,
        plan: Plan,
        options: AttendOptions,
        positions: NDArray[np.int32] | None,
        mask: NDArray[np.uint8] | None,
        mask_offsets: NDArray[np.int64] | None,
    ) -> None:
        """Raises TokensReleased where a token sees a block that is not there any more."""
        if self._can_miss:
            num_blocks = int(self._k.struct.num_blocks)
            check_sight(plan, num_blocks, options, positions, mask, mask_offsets)

    def _floats(
        self, value: Any | None, argument: str, num_heads: int, kept: list[Any]
    ) -> int | None:
        """The address of one float32 for each query head."""
        if value is None:
            return None
        runtime = self._launcher.runtime
        if lies_on_device(value):
            array = device_array(runtime, value, argument, np.float32)
            checks.shape(array.shape, (num_heads,), argument, "[Hq]")
            kept.append(array)
            return runtime.address(array)
        floats = per_head(value, argument, num_heads)
        assert floats is not None
        return self._launcher.constant(floats)


def _scalars(options: AttendOptions) -> Any:
    """The options, where all are plain numbers; else an object that is equal to no other."""
    if (
        options.alibi_slopes is None
        and options.sinks is None
        and options.positions is None
        and options.mask is None
    ):
        return (
            options.scale, options.softcap, options.causal, options.window, options.exact,
        )  # fmt: skip
    return object()


def has_options(options: AttendOptions) -> bool:
    """Whether a mask, positions, slopes, a window, a soft cap or no causality is given."""
    return (
        options.softcap is not None
        or options.alibi_slopes is not None
        or not options.causal
        or options.mask is not None
        or options.window is not None
        or options.positions is not None
    )


def device_array(runtime: Runtime, value: Any, argument: str, dtype: Any) -> Any:
    """A caller's dense array of the device; its values cannot be looked at without waiting."""
    array = runtime.as_array(value, argument)
    if array.dtype != dtype:
        raise InvalidType(f"{argument}: expected {np.dtype(dtype).name}, got {array.dtype.name}")
    return dense(runtime, array)


def on_host(runtime: Runtime, mask: Any) -> Any:
    """A list of masks with those on the device copied to the host."""
    if mask is None or isinstance(mask, np.ndarray):
        return mask
    return [runtime.to_host(entry) if lies_on_device(entry) else entry for entry in mask]


def send(runtime: Runtime, parts: list[NDArray[Any]]) -> Any:
    """Host arrays in one copy, each from a multiple of 8 bytes on."""
    sizes = [_padded(part.nbytes) for part in parts]
    staged = runtime.stage(sum(sizes) // 4)
    at = 0
    memory = staged.view(np.uint8)
    for part, size in zip(parts, sizes, strict=True):
        memory[at : at + part.nbytes] = part.reshape(-1).view(np.uint8)
        at += size
    target = runtime.empty(staged.shape, np.int32)
    runtime.upload(staged, target)
    return target


def _places(address: int, parts: list[NDArray[Any]]) -> Any:
    """Where `send` has put each."""
    for part in parts:
        yield address
        address += _padded(part.nbytes)


def _padded(nbytes: int) -> int:
    return -(-nbytes // 8) * 8
