"""kernels/copy_blocks.cu against copies by NumPy, in every format."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda_emulator.runtime import EmulatedRuntime
from kvcore import formats
from kvcore_gpu.launcher import Launcher
from kvcore_gpu.params import CopyParams

NUM_BLOCKS, NUM_HEADS, BLOCK_SIZE = 6, 2, 64
COPIES = np.array([[0, 3, 64], [1, 4, 5], [2, 5, 33]], np.int32)


def copied(
    data: NDArray[np.uint8], format: formats.Format, head_dim: int, token_stride: int
) -> NDArray[np.uint8]:
    """What [N, H, tile] becomes."""
    after = data.copy()
    code, metadata = format.code_nbytes(head_dim), format.metadata_nbytes(head_dim)
    for source, target, rows in COPIES:
        if format.kind == "channel":
            rows = -(-rows // formats.GROUP_TOKENS) * formats.GROUP_TOKENS
        for i in range(rows):
            at = slice(i * token_stride, i * token_stride + code)
            after[target, :, at] = data[source, :, at]
        at = slice(BLOCK_SIZE * code, BLOCK_SIZE * code + rows * metadata)
        if metadata:
            after[target, :, at] = data[source, :, at]
    return after


def run(
    runtime: EmulatedRuntime, name: str, head_dim: int, padding: int, parts: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    format = formats.get_format(name)
    code, metadata = format.code_nbytes(head_dim), format.metadata_nbytes(head_dim)
    token_stride = code + padding
    tile = BLOCK_SIZE * (token_stride + metadata)
    data = runtime.empty((NUM_BLOCKS, NUM_HEADS, tile), np.uint8)
    data[...] = np.random.default_rng(head_dim).integers(0, 256, data.shape)
    expected = copied(data, format, head_dim, token_stride)
    copies = runtime.as_array(COPIES, "copies")
    kernel = Launcher(runtime).kernel(
        "copy_blocks.cu", "copy_blocks", CopyParams,
        BLOCK_FORMAT=list(formats.FORMATS).index(name), HEAD_DIM=head_dim,
    )  # fmt: skip
    blocks, plan = kernel.params.blocks, kernel.params.plan
    blocks.data, blocks.metadata_offset = runtime.address(data), BLOCK_SIZE * code
    blocks.block_stride, blocks.head_stride = data.strides[:2]
    blocks.token_stride = token_stride
    plan.copies, plan.num_copies = runtime.address(copies), len(COPIES)
    kernel.launch((len(COPIES), NUM_HEADS, parts), (128, 1, 1))
    return data, expected


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [("fp32", 8), ("bf16", 64), ("int4", 32), ("rot6", 64), ("rot3", 64), ("chan2", 32)],
)
def test_copies_rows_and_their_metadata(runtime: EmulatedRuntime, name: str, head_dim: int) -> None:
    data, expected = run(runtime, name, head_dim, 0, 1)
    np.testing.assert_array_equal(data, expected)


def test_copies_rows_that_lie_apart_in_parts(checked: EmulatedRuntime) -> None:
    data, expected = run(checked, "fp16", 24, 64, 3)
    np.testing.assert_array_equal(data, expected)
