"""One call of attend: the user's arrays and options as parameters of the kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvcore.attend_options import AttendOptions, check_sight
from kvcore.backend import Plan
from kvcore_gpu import option_arrays, params
from kvcore_gpu.arrays import check_out, place, put_rows, rows_for, signature_of
from kvcore_gpu.attention import Attention, Launch, Shape
from kvcore_gpu.blocks import DeviceBlocks
from kvcore_gpu.launcher import Launcher
from kvcore_gpu.option_arrays import OptionArrays
from kvcore_gpu.scratch import Scratch

_Q, _OUT = params.AttendParams.q.offset, params.AttendParams.out.offset


class AttendCall:
    """The launches of one layer's attention, with their parameters.

    Args:
        launcher: the device's kernels.
        scratch: memory for parts of results.
        arrays: of options.
        k, v: the layer's blocks.
        v_in_k: whether V is the first elements of K.
        can_miss: whether a block that is looked at may be -1.
    """

    def __init__(
        self,
        launcher: Launcher,
        scratch: Scratch,
        arrays: OptionArrays,
        k: DeviceBlocks,
        v: DeviceBlocks,
        v_in_k: bool,
        can_miss: bool,
    ) -> None:
        self._launcher = launcher
        self._scratch = scratch
        self._arrays = arrays
        self._k, self._v = k, v
        self._v_in_k = v_in_k
        self._can_miss = can_miss
        self._signature: Any = None  # of the last call, if its queries were read in place
        self._out_like: Any = None  # shape and dtype
        self._sent = option_arrays.NOTHING
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
            self._arrays.signature(plan, options),
        )
        kept = None
        if signature == self._signature and self._place(q, out):
            self._check_sight(plan, options)
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
        for function, grid, block, shared_bytes, tiles, first_sequence in self._launches:
            fill.first_tile, fill.num_tiles = tiles
            fill.first_sequence = first_sequence
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
        has_more = has_options(options) or not fill.scale > 0
        key = (fill.group, fill.q.dtype, has_more, bool(options.exact))
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
                has_more,
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
        arrays = self._arrays
        fill.alibi_slopes, slopes = arrays.floats(options.alibi_slopes, "alibi_slopes", num_heads)
        fill.sinks, sinks = arrays.floats(options.sinks, "sinks", num_heads)
        self._sent = option_arrays.NOTHING
        if options.positions is not None or options.mask is not None:
            self._sent = arrays.send(plan, options, self._can_miss)
        option_arrays.put(fill, self._sent)
        self._check_sight(plan, options)
        return [slopes, sinks, self._sent]

    def _check_sight(self, plan: Plan, options: AttendOptions) -> None:
        """Raises TokensReleased where a token sees a block that is not there any more."""
        if self._can_miss:
            sent = self._sent
            looked = sent.positions, sent.mask, sent.mask_offsets
            check_sight(plan, int(self._k.struct.num_blocks), options, *looked)


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
