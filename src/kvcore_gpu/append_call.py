"""New K and V into their slots: what append launches."""

from __future__ import annotations

from typing import Any

from kvcore.backend import Plan
from kvcore.formats import GROUP_TOKENS
from kvcore_gpu import params
from kvcore_gpu.arrays import put_rows, rows_for
from kvcore_gpu.blocks import DeviceBlocks
from kvcore_gpu.launcher import Launcher

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
        if "channel" in (k.format.kind, other.format.kind):
            self._seal = launcher.function("append.cu", "seal", **defines)
        self._planes = 1 if v is None else 2
        self._params = params.AppendParams()
        self._params.k_blocks = k.struct
        if v is not None:
            self._params.v_blocks = v.struct
        self._params.not_finite = not_finite

    def run(self, plan: Plan, k: Any, v: Any | None, layout: str) -> None:
        """Stores the plan's new tokens; plan.device says where."""
        runtime, fill = self._runtime, self._params
        heads = self._k.num_heads
        k_rows = rows_for(runtime, k, "k", layout, plan, heads, self._k.head_dim)
        if self._v is not None:
            v_rows = rows_for(runtime, v, "v", layout, plan, heads, self._v.head_dim)
            put_rows(fill, params.AppendParams.v.offset, runtime, v_rows, layout)
        put_rows(fill, params.AppendParams.k.offset, runtime, k_rows, layout)
        fill.plan = plan.device
        num_blocks = -(-plan.num_tokens // _ROWS_PER_BLOCK)
        runtime.launch(self._append, (num_blocks, heads, self._planes), _BLOCK, 0, fill)
        if self._seal is not None:
            groups = -(-plan.max_new // GROUP_TOKENS)
            grid = groups, heads, plan.num_sequences
            runtime.launch(self._seal, grid, _BLOCK, 0, fill)
