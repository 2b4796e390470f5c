"""K or V of one layer in a device's memory, as kernels take it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcore.formats import Format
from kvcore.spec import RAW_BLOCK_SIZE
from kvcore_gpu import params
from kvcore_gpu.runtime import Runtime


@dataclass(eq=False)
class DeviceBlocks:
    """Blocks of a cache, or of a caller.

    Attributes:
        struct: what kernels get.
        format: how rows are stored.
        head_dim: elements of a row.
        array: the memory: [N, H, B, D] in the format's storage dtype, or tiles [N, H, bytes].
        raw: where rows lie that are read raw; None: nowhere.
    """

    struct: params.Blocks
    format: Format
    head_dim: int
    array: Any
    raw: DeviceBlocks | None = None
    kept: list[Any] = field(default_factory=list)  # what the struct points to

    @property
    def num_heads(self) -> int:
        return int(self.struct.num_heads)

    @property
    def block_size(self) -> int:
        return 1 << int(self.struct.block_size_log2)


def of_rows(
    runtime: Runtime,
    array: Any,
    format: Format,
    shape: tuple[int, int, int, int],
    strides: tuple[int, int, int],
) -> DeviceBlocks:
    """Blocks of a float format: shape [N, H, B, D]; block, head and token strides in bytes."""
    num_blocks, num_heads, block_size, head_dim = shape
    struct = params.Blocks(
        data=runtime.address(array),
        block_stride=strides[0],
        head_stride=strides[1],
        token_stride=strides[2],
        num_blocks=num_blocks,
        num_heads=num_heads,
        block_size_log2=block_size.bit_length() - 1,
    )
    return DeviceBlocks(struct, format, head_dim, array)


def of_array(runtime: Runtime, array: Any, format: Format) -> DeviceBlocks:
    """Blocks of a float format in an array [N, H, B, D]."""
    return of_rows(runtime, array, format, array.shape, array.strides[:3])


def of_tiles(
    runtime: Runtime, array: Any, format: Format, block_size: int, head_dim: int
) -> DeviceBlocks:
    """Blocks of a quantized format in dense tiles, uint8 [N, H, bytes]."""
    code_nbytes = format.code_nbytes(head_dim)
    blocks = of_rows(
        runtime,
        array,
        format,
        (array.shape[0], array.shape[1], block_size, head_dim),
        (array.strides[0], array.strides[1], code_nbytes),
    )
    blocks.struct.metadata_offset = block_size * code_nbytes
    return blocks


def add_raw(blocks: DeviceBlocks, raw: DeviceBlocks, raw_first: int, raw_last: int) -> None:
    """Lets some rows of a quantized cache be read raw."""
    assert raw.block_size == RAW_BLOCK_SIZE
    blocks.raw = raw
    struct = blocks.struct
    struct.raw = raw.struct.data
    struct.raw_block_stride = raw.struct.block_stride
    struct.raw_head_stride = raw.struct.head_stride
    struct.raw_token_stride = raw.struct.token_stride
    struct.raw_first, struct.raw_last = raw_first, raw_last


def add_channels(
    runtime: Runtime,
    blocks: DeviceBlocks,
    bias: NDArray[np.float32] | None,
    scales: NDArray[np.float32] | None,
) -> None:
    """Gives a quantized cache what rows of a head share, [H, D] each."""
    for name, values in (("bias", bias), ("scales", scales)):
        if values is not None:
            array = runtime.to_device(np.ascontiguousarray(values, np.float32))
            blocks.kept.append(array)
            setattr(blocks.struct, name, runtime.address(array))
