"""Blocks and books that callers keep themselves: what both backends check of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from kvcore import arrays, checks
from kvcore._native.blocks import Plan
from kvcore.contiguous import ARRAY_FORMATS
from kvcore.errors import InvalidArgument, InvalidType, TokensReleased
from kvcore.formats import FORMATS, Format
from kvcore.spec import MAX_HEAD_DIM

_FORMATS = {**ARRAY_FORMATS, "uint16": "bf16"}
_AXES = {"HND": "[N, H, B, D]", "NHD": "[N, B, H, D]"}


def block_format(array: Any, argument: str, layout: str) -> Format:
    """The format that a caller's [N, H, B, D] or [N, B, H, D] array is, by its dtype."""
    name = _FORMATS.get(array.dtype.name)
    if name is None:
        raise InvalidType(
            f"{argument}: expected float32, float16 or bfloat16 (or its bits as uint16), "
            f"got {array.dtype.name}"
        )
    axes = _AXES.get(layout)
    if axes is None:
        raise InvalidArgument(f'layout: expected "HND" or "NHD", got {layout!r}')
    if array.ndim != 4 or 0 in array.shape:
        raise InvalidArgument(f"{argument}: expected shape {axes}, got {list(array.shape)}")
    return FORMATS[name]


def block_axis(layout: str) -> int:
    """Where the slots of a block are among the axes."""
    return 1 if layout == "NHD" else 2


def check_pair(k: Any, v: Any, layout: str) -> None:
    """Raises unless two arrays that `block_format` took can be K and V of one layer."""
    checks.shape(v.shape[:3], k.shape[:3], "v_blocks", "k_blocks.shape[:3]")
    block_size = k.shape[block_axis(layout)]
    if block_size < 16 or block_size & (block_size - 1):
        raise InvalidArgument(
            f"k_blocks: expected a block size that is a power of two >= 16, got {block_size}"
        )
    for array, argument in ((k, "k_blocks"), (v, "v_blocks")):
        head_dim = array.shape[3]
        if head_dim % 8 or head_dim > MAX_HEAD_DIM:
            raise InvalidArgument(
                f"{argument}: expected a head_dim that is a multiple of 8, at most "
                f"{MAX_HEAD_DIM}, got {head_dim}"
            )


@contextmanager
def missing_blocks_named() -> Iterator[None]:
    """Says of a caller's tables what TokensReleased says of a cache's."""
    try:
        yield
    except TokensReleased:
        raise InvalidArgument(
            "block_tables: expected -1 only where window and mask let no token see, got -1 "
            "between the first and the last token that one sees"
        ) from None


def plan_of_slots(slots: Any, num_blocks: int, block_size: int) -> Plan:
    """The plan of an append_kv, for slots that lie in the blocks."""
    row = arrays.as_index(slots, "slots", 1)
    limit = num_blocks * block_size
    if row.size and (row.min() < -1 or row.max() >= limit):
        raise InvalidArgument(
            f"slots: expected -1 (skip) to {limit - 1}, got {row.min()} to {row.max()}"
        )
    if not row.size:
        raise InvalidArgument("slots: expected at least one, got none")
    return Plan.from_slots(row, block_size)


def plan_of_tables(
    block_tables: Any,
    seq_lens: Any,
    query_starts: Any,
    num_blocks: int,
    block_size: int,
    narrowed: bool,
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
