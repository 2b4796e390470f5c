"""K and V in plain arrays as the core's blocks, without a copy.

Blocks may overlap, so every token can be taken for the start of a block that reaches to its
sequence's end and beyond: a sequence is then the one block that starts at its first token. Nothing
beyond a sequence's length is read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from kvcore import arrays, checks
from kvcore._native.blocks import Blocks, Plan
from kvcore.attend_options import AttendOptions
from kvcore.errors import InvalidArgument
from kvcore.formats import FORMATS
from kvcore.spec import MAX_HEAD_DIM

#: The format that an array of a dtype is.
ARRAY_FORMATS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_AXES = {"NHD": (0, 1), "HND": (1, 0), "BSHD": (1, 2), "BHSD": (2, 1)}  # token, head
_SMALLEST_BLOCK = 16


def check_array(array: Any, argument: str, layout: str) -> None:
    """Raises unless `array` can be K or V in this layout."""
    arrays.layout_number(layout)
    arrays.dtype_number(array, argument)
    if array.ndim != len(layout) or not array.shape[_AXES[layout][1]]:
        raise InvalidArgument(
            f"{argument}: expected {len(layout)} axes as layout {layout} has them, with heads, "
            f"got shape {list(array.shape)}"
        )
    if not array.shape[-1] or array.shape[-1] % 8 or array.shape[-1] > MAX_HEAD_DIM:
        raise InvalidArgument(
            f"{argument}: expected a head_dim that is a multiple of 8, at most {MAX_HEAD_DIM}, "
            f"got {array.shape[-1]}"
        )


def has_forward_rows(array: Any) -> bool:
    """Whether each row ends before the next one along any axis begins."""
    row = array.shape[-1] * array.itemsize
    strides = zip(array.shape[:-1], array.strides[:-1], strict=True)
    return all(n <= 1 or stride >= row for n, stride in strides)


def block_placement(
    array: Any, layout: str
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Shape and strides of one block for each token (ragged), or for each sequence (padded)."""
    token, head = _AXES[layout]
    block = token if array.ndim == 3 else 0
    shape = (array.shape[block], array.shape[head], _block_size(array, token), array.shape[-1])
    strides = array.strides
    return shape, (strides[block], strides[head], strides[token], array.itemsize)


def as_blocks(array: np.ndarray, argument: str, layout: str) -> Blocks:
    """K or V as `block_placement` says."""
    check_array(array, argument, layout)
    if not arrays.is_readable(array) or not has_forward_rows(array):
        array = array.copy(order="C")
    if not array.size:  # no token is read, yet blocks have an address
        array = np.zeros([max(n, 1) for n in array.shape], array.dtype)
    format = FORMATS[ARRAY_FORMATS[array.dtype.name]]
    placement = block_placement(array, layout)
    view = as_strided(array.view(format.storage_dtype), *placement, writeable=False)
    return Blocks.of_rows(view, format.index)


def _block_size(array: Any, token: int) -> int:
    return max(_SMALLEST_BLOCK, 1 << max(0, int(array.shape[token]) - 1).bit_length())


def contiguous_plan(
    q: Any,
    k: Any,
    v: Any,
    query_cut: Any | None,
    kv_cut: Any | None,
    layout: str,
    options: AttendOptions,
) -> Plan:
    """The plan over `as_blocks` of k and v; cuts are starts (ragged) or lengths (padded)."""
    checks.shape(v.shape[:-1], k.shape[:-1], "v", "k.shape[:-1]")
    if q.ndim != len(layout):
        raise InvalidArgument(
            f"q: expected {len(layout)} axes as layout {layout} has them, got shape {list(q.shape)}"
        )
    token, _ = _AXES[layout]
    if len(layout) == 3:
        starts, firsts, lens = _ragged(q.shape[token], k.shape[token], query_cut, kv_cut)
    else:
        checks.shape(k.shape[:1], q.shape[:1], "k", "[S, ...], of which [S]")
        query_lens = _lengths(query_cut, "query_lens", q.shape[0], q.shape[token])
        lens = _lengths(kv_cut, "kv_lens", q.shape[0], k.shape[token])
        starts = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
        firsts = np.arange(len(lens), dtype=np.int32)
    for s in np.flatnonzero(lens < np.diff(starts)).tolist():
        if options.causal and not options.has_mask(s):
            raise InvalidArgument(
                f"k: expected at least as many keys as queries for causal sequence {s}, "
                f"{starts[s + 1] - starts[s]}, got {lens[s]}"
            )
    return Plan.from_tables(firsts.reshape(-1, 1), lens, starts, _block_size(k, token))


def _ragged(
    num_queries: int, num_keys: int, query_cut: Any | None, kv_cut: Any | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """query_starts, each sequence's first key and its number of keys."""
    starts = _starts(query_cut, "query_starts", num_queries)
    if kv_cut is None and len(starts) > 2 and num_keys == num_queries:
        kv_cut = starts
    kv_starts = _starts(kv_cut, "kv_starts", num_keys)
    checks.shape(kv_starts.shape, starts.shape, "kv_starts", "query_starts.shape")
    lens = np.diff(kv_starts)
    # An empty sequence may start where the array ends, and no block does.
    return starts, np.where(lens > 0, kv_starts[:-1], 0).astype(np.int32), lens


def _starts(value: Any | None, argument: str, count: int) -> np.ndarray:
    if value is None:
        return np.array([0, count], np.int32)
    starts = arrays.as_index(value, argument, 1)
    if len(starts) < 2 or starts[0] != 0 or starts[-1] != count or (np.diff(starts) < 0).any():
        raise InvalidArgument(
            f"{argument}: expected at least one sequence from 0, never falling, to {count}, "
            f"got {starts}"
        )
    return starts


def _lengths(value: Any | None, argument: str, count: int, longest: int) -> np.ndarray:
    if value is None:
        return np.full(count, longest, np.int32)
    lengths = arrays.as_index(value, argument, 1)
    checks.shape(lengths.shape, (count,), argument, "[S]")
    if lengths.size and (lengths.min() < 0 or lengths.max() > longest):
        raise InvalidArgument(
            f"{argument}: expected 0 to {longest}, got {lengths.min()} to {lengths.max()}"
        )
    return lengths
