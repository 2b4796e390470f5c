"""What moves rows between blocks, or out of them: copies, restored raw rows, reading."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcore.backend import Plan
from kvcore_gpu import params
from kvcore_gpu.arrays import put_rows
from kvcore_gpu.blocks import DeviceBlocks
from kvcore_gpu.launcher import Launcher

_BLOCK = (128, 1, 1)
_ROWS_PER_BLOCK = 8
_BYTES_PER_PART = 8192  # of a tile that is copied


def copy_blocks(launcher: Launcher, blocks: DeviceBlocks, plan: Plan) -> None:
    """Runs the plan's copies."""
    kernel = launcher.kernel(
        "copy_blocks.cu",
        "copy_blocks",
        params.CopyParams,
        BLOCK_FORMAT=blocks.format.index,
        HEAD_DIM=blocks.head_dim,
    )
    kernel.params.blocks, kernel.params.plan = blocks.struct, plan.device
    tile = blocks.block_size * blocks.format.row_nbytes(blocks.head_dim)
    parts = -(-tile // _BYTES_PER_PART)
    kernel.launch((plan.num_copies, blocks.num_heads, parts), _BLOCK)


def restore_raw(launcher: Launcher, blocks: DeviceBlocks, plan: Plan) -> None:
    """Decodes the raw rows that the plan restores."""
    kernel = launcher.kernel("read.cu", "restore_raw", params.RestoreParams, **_defines_of(blocks))
    kernel.params.blocks, kernel.params.plan = blocks.struct, plan.device
    kernel.launch((plan.device.num_restores, blocks.num_heads, 1), _BLOCK)


def read(
    launcher: Launcher,
    blocks: DeviceBlocks,
    block_row: NDArray[np.int32],
    start: int,
    stop: int,
    raw_row: NDArray[np.int32] | None,
) -> Any:
    """Tokens [start, stop) of the sequence behind `block_row`, float32 [n, H, D].

    `stop` is the sequence's length.
    """
    runtime = launcher.runtime
    out = runtime.empty((stop - start, blocks.num_heads, blocks.head_dim), np.float32)
    if start == stop:
        return out
    rows = runtime.to_device(block_row if raw_row is None else np.append(block_row, raw_row))
    kernel = launcher.kernel("read.cu", "read", params.ReadParams, **_defines_of(blocks))
    fill = kernel.params
    fill.blocks = blocks.struct
    fill.row = runtime.address(rows)
    if raw_row is not None:
        fill.raw_row = runtime.address(rows) + block_row.nbytes
    fill.start, fill.stop, fill.length = start, stop, stop
    put_rows(fill, params.ReadParams.out.offset, runtime, out, "NHD")
    kernel.launch((-(-out.shape[0] // _ROWS_PER_BLOCK), blocks.num_heads, 1), _BLOCK)
    return out


def _defines_of(blocks: DeviceBlocks) -> dict[str, int]:
    return {"K_FORMAT": blocks.format.index, "HEAD_DIM": blocks.head_dim}
