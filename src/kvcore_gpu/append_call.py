"""New K and V into their slots: what append launches."""

from __future__ import annotations

from typing import Any

from kvcore.backend import Plan
from kvcore.formats import GROUP_TOKENS
from kvcore_gpu import params
from kvcore_gpu.arrays import place, put_rows, rows_for, signature_of
from kvcore_gpu.blocks import DeviceBlocks
from kvcore_gpu.launcher import Launcher

_K, _V = params.AppendParams.k.offset, params.AppendParams.v.offset
_BLOCK = (128, 1, 1)
_ROWS_PER_BLOCK = 8


class AppendCall:
    """The launches of one layer's appends, with their parameters.

    Args:
        launcher: the device's kernels.
        k: where K goes.
        v: where V goes; None where it lies in K.
        not_finite: address of the flag of quantized formats.
    """

    def __init__(
        self, launcher: Launcher, k: DeviceBlocks, v: DeviceBlocks | None, not_finite: int
    ) -> None:
        self._runtime = launcher.runtime
        self._k, self._v = k, v
        other = k if v is None else v
        defines = {
            "K_FORMAT": k.format.index,
            "HEAD_DIM": k.head_dim,
            "V_FORMAT": other.format.index,
            "HEAD_DIM_V": other.head_dim,
        }
        self._append = launcher.function("append.cu", "append", **defines)
        self._seal = None
        if k.format.kind == "channel":
            self._seal = launcher.function("append.cu", "seal", **defines)
        self._planes = 1 if v is None else 2
        self._params = params.AppendParams()
        self._params.k_blocks = k.struct
        if v is not None:
            self._params.v_blocks = v.struct
        self._params.not_finite = not_finite
        self._signature: Any = None  # of the last call, if its arrays were read in place

    def run(self, plan: Plan, k: Any, v: Any | None, layout: str) -> None:
        """Stores the plan's new tokens; plan.device says where."""
        signature = (
            layout,
            plan.device,
            signature_of(self._runtime, k),
            signature_of(self._runtime, v),
        )
        kept = None
        if signature != self._signature or not self._place(k, v):
            self._signature = None
            kept = self._fill(plan, k, v, layout)
            if kept[0] is k and kept[1] is v:
                self._signature = signature
        heads = self._k.num_heads
        num_blocks = -(-plan.num_tokens // _ROWS_PER_BLOCK)
        launch, fill = self._runtime.launch, self._params
        launch(self._append, (num_blocks, heads, self._planes), _BLOCK, 0, fill)
        if self._seal is not None:
            groups = -(-plan.max_new // GROUP_TOKENS)
            launch(self._seal, (groups, heads, plan.num_sequences), _BLOCK, 0, fill)
        del kept  # copies: from here on the stream's order keeps their memory for the launches

    def _place(self, k: Any, v: Any | None) -> bool:
        """Where rows like the last call's lie; False if they cannot be read there."""
        is_placed = place(self._params, _K, self._runtime, k)
        return is_placed and (v is None or place(self._params, _V, self._runtime, v))

    def _fill(self, plan: Plan, k: Any, v: Any | None, layout: str) -> tuple[Any, Any]:
        """Checks and writes all that a launch needs; the rows that it reads."""
        runtime, fill, heads = self._runtime, self._params, self._k.num_heads
        k_rows = rows_for(runtime, k, "k", layout, plan, heads, self._k.head_dim)
        v_rows = None
        if self._v is not None:
            v_rows = rows_for(runtime, v, "v", layout, plan, heads, self._v.head_dim)
            put_rows(fill, _V, runtime, v_rows, layout)
        put_rows(fill, _K, runtime, k_rows, layout)
        fill.plan = plan.device
        return k_rows, v_rows
