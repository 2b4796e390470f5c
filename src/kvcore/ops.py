"""The cache's operations on plain arrays, for engines that keep their own books.

Blocks are arrays [N, H, B, D] (layout="HND"), or [N, B, H, D] (layout="NHD"), of float32, float16
or bfloat16; B is a power of two from 16. Arrays on the host run on the CPU, and those on a CUDA
device (CuPy's, torch's) there; index arrays may always be NumPy's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvcore import arrays, checks
from kvcore._native import linear as _linear
from kvcore.backend import AttendOptions, backend_of
from kvcore.errors import InvalidArgument, InvalidType

__all__ = [
    "append_kv",
    "attention",
    "dequantize",
    "linear",
    "merge_states",
    "paged_attention",
    "quantize",
]


def append_kv(
    k: Any,
    v: Any | None,
    k_blocks: Any,
    v_blocks: Any | None,
    slots: Any,
    *,
    layout: str = "HND",
) -> None:
    """Writes the rows of new tokens into their slots.

    Args:
        k: [T, H, D], float32, float16 or bfloat16.
        v: [T, H, Dv], likewise; None, with v_blocks, where V lies in K.
        k_blocks, v_blocks: the blocks, changed in place.
        slots: int32 [T], block * B + offset of each token; -1 skips the token.
        layout: of the blocks.

    Raises:
        InvalidArgument, InvalidType: nothing has been written then.
    """
    backend_of(k_blocks).append_kv(k, v, k_blocks, v_blocks, slots, layout)


def paged_attention(
    q: Any,
    k_blocks: Any,
    v_blocks: Any,
    block_tables: Any,
    seq_lens: Any,
    query_starts: Any,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Any | None = None,
    window: int | None = None,
    causal: bool = True,
    mask: Sequence[Any] | None = None,
    positions: Any | None = None,
    sinks: Any | None = None,
    return_lse: bool = False,
    layout: str = "HND",
    exact: bool = False,
) -> Any:
    """Attention over paged keys and values, causal and bottom-right aligned by default.

    Args:
        q: [T, Hq, D], the new tokens of all sequences one after the other; Hq is a multiple of H.
        k_blocks, v_blocks: the blocks; v_blocks may be a view such as k_blocks[..., :512].
        block_tables: int32 [S, W], each sequence's blocks in order; what lies beyond seq_lens is
            not looked at, and a block of which a window or mask lets no token see may be -1.
        seq_lens: int32 [S], tokens that each sequence has in the blocks, the new ones included.
        query_starts: int32 [S + 1], where each sequence's new tokens start in q.
        scale: s = (q . k) * scale; 1 / sqrt(D) when left out.
        softcap: s = softcap * tanh(s / softcap).
        alibi_slopes: [Hq]; s -= slope * (i - j), with i where the query stands in its
            sequence and j where the key does.
        window: a token sees only the last `window` tokens up to its position and including it,
            i - window < j <= i, of all that it would see otherwise. Others are not read.
        causal: False lets every new token see all that its sequence holds.
        mask: for each sequence a boolean [new tokens, seq_len], True where a token sees a key, or
            the same as bits, uint8 [new tokens, ceil(seq_len / 8)] as from
            np.packbits(mask, axis=1, bitorder="little"), or None; a mask stands instead of
            causality.
        positions: int32 [T], where the new tokens stand for alibi_slopes and window, their keys
            (the last ones) as well as their queries; where they are stored without it.
        sinks: [Hq], one more logit in each softmax's denominator, with no value.
        return_lse: also return the natural logarithm of the softmax's denominator.
        layout: of the blocks.
        exact: never take a path whose bits depend on how a prompt was chunked. bf16 has one, on
            the instruction set "avx512_bf16", within 2e-3 instead of 2e-6; and quantized formats,
            which few query rows read undecoded: on "avx512_vnni" within 2e-4, else 2e-6.

    Returns:
        out [T, Hq, Dv] in q's dtype, or (out, lse) with lse float32 [T, Hq]. A row that sees
        nothing has out 0 and lse -inf, or its head's sink.
    """
    options = AttendOptions(
        scale, exact, softcap, alibi_slopes, causal, mask, window, positions, sinks
    )
    return backend_of(q).paged_attention(
        q,
        k_blocks,
        v_blocks,
        block_tables,
        seq_lens,
        query_starts,
        layout,
        options,
        return_lse,
    )


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    query_starts: Any | None = None,
    kv_starts: Any | None = None,
    query_lens: Any | None = None,
    kv_lens: Any | None = None,
    layout: str = "NHD",
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Any | None = None,
    window: int | None = None,
    causal: bool = True,
    mask: Sequence[Any] | None = None,
    positions: Any | None = None,
    sinks: Any | None = None,
    return_lse: bool = False,
    exact: bool = False,
    out: Any | None = None,
) -> Any:
    """Attention over plain arrays, without a cache: the kernels and bits of `paged_attention`.

    K and V are read in place where their last axis is dense and their other strides are positive.
    Ragged sequences (layouts "NHD", "HND") are cut by starts, padded ones ("BSHD", "BHSD") by
    lengths.

    Args:
        q: [T, Hq, D] with layout "NHD", [Hq, T, D] with "HND", [S, n, Hq, D] with "BSHD",
            [S, Hq, n, D] with "BHSD". float32, float16 or bfloat16.
        k, v: [M, H, D] and [M, H, Dv] in the same layout, each of any of these dtypes; m may
            differ from n. Hq is a multiple of H.
        query_starts: int32 [S + 1], where each sequence's queries start; one sequence by default.
        kv_starts: int32 [S + 1], likewise for k and v; query_starts by default where M = T, or else
            one sequence.
        query_lens, kv_lens: int32 [S], the rows of each padded sequence; all when left out. Padding
            is not read.
        scale: s = (q . k) * scale; 1 / sqrt(D) when left out.
        softcap: s = softcap * tanh(s / softcap).
        alibi_slopes: [Hq]; s -= slope * (i - j), with i where the query stands in its
            sequence and j where the key does.
        window: a token sees only the last `window` tokens up to its position and including it,
            i - window < j <= i, of all that it would see otherwise. Others are not read.
        causal: False lets every new token see all that its sequence holds.
        mask: for each sequence a boolean [new tokens, seq_len], True where a token sees a key, or
            the same as bits, uint8 [new tokens, ceil(seq_len / 8)] as from
            np.packbits(mask, axis=1, bitorder="little"), or None; a mask stands instead of
            causality.
        positions: int32 [T], where the new tokens stand for alibi_slopes and window, their keys
            (the last ones) as well as their queries; where they are stored without it.
        sinks: [Hq], one more logit in each softmax's denominator, with no value.
        return_lse: also return the natural logarithm of the softmax's denominator.
        exact: never take a path whose bits depend on how a prompt was chunked. bf16 has one, on
            the instruction set "avx512_bf16", within 2e-3 instead of 2e-6; and quantized formats,
            which few query rows read undecoded: on "avx512_vnni" within 2e-4, else 2e-6.
        out: an array to write to, of q's dtype and shape but with Dv.

    A causal sequence needs at least as many keys as queries; its last query sees all of them.

    Returns:
        out in q's dtype and layout, zero in the padding; or (out, lse) with lse float32 [T, Hq],
        the queries of all sequences one after the other. A row that sees nothing has out 0 and lse
        -inf, or its head's sink.
    """
    options = AttendOptions(
        scale, exact, softcap, alibi_slopes, causal, mask, window, positions, sinks
    )
    padded = layout in ("BSHD", "BHSD")
    cuts = {"query_starts": query_starts, "kv_starts": kv_starts}
    lengths = {"query_lens": query_lens, "kv_lens": kv_lens}
    for argument, value in (cuts if padded else lengths).items():
        if value is not None:
            kind = "padded" if padded else "ragged"
            raise InvalidArgument(f"{argument}: expected None for the {kind} layout {layout}")
    query_cut, kv_cut = (lengths if padded else cuts).values()
    return backend_of(q).attention(q, k, v, query_cut, kv_cut, layout, options, return_lse, out)


def merge_states(outs: Any, lses: Any) -> tuple[Any, Any]:
    """Joins attention over disjoint parts of the keys.

    Args:
        outs: float32 [P, ..., D], the output of each part.
        lses: float32 [P, ...], its log-sum-exp (natural); -inf marks a part that saw nothing.

    Returns:
        out [..., D] and lse [...], what attention over all parts together gives.
    """
    return backend_of(outs).merge_states(outs, lses)


def quantize(x: Any, format: str, *, scales: Any | None = None, bias: Any | None = None) -> Any:
    """Encodes rows as `format` stores them; docs/formats.md defines every byte.

    Args:
        x: [..., D], float32, float16 or bfloat16; [..., 32 * G, D] for chan4 and chan2, which
            encode 32 tokens as one. Finite for quantized formats.
        scales: int8_static's, a positive float32 for each of the D channels; None for others.
        bias: [D] float32 that quantized rows are stored without; pass it to `dequantize` too.

    Returns:
        For float formats their elements [..., D], bf16 as uint16 bits. For others uint8: a row's
        codes and then its metadata [..., row_bytes], or a group's [..., G, 32 * row_bytes].

    Raises:
        NotFinite: x has a NaN or an infinity, and the format is quantized.
        InvalidArgument: D is not a multiple that the format takes, or another argument is wrong.
    """
    return backend_of(x).quantize(x, format, scales, bias)


def dequantize(
    code: Any, format: str, *, scales: Any | None = None, bias: Any | None = None
) -> Any:
    """Decodes what `quantize` gave, as float32 [..., D]; `scales` and `bias` as given to it."""
    return backend_of(code).dequantize(code, format, scales, bias)


def linear(x: Any, w: Any, bias: Any | None = None, out: np.ndarray | None = None) -> np.ndarray:
    """x @ w.T + bias for few rows: each weight is read once, whatever the number of rows.

    A row's bits do not depend on the rows beside it or on the number of threads.

    Args:
        x: float32 [R, K]; made for R up to about 16.
        w: float32 [N, K] with dense rows.
        bias: float32 [N], or None.
        out: float32 [R, N] with dense rows to write to, or None for a new array.

    Returns:
        [R, N].
    """
    rows, weights = _matrix(x, "x"), _matrix(w, "w")
    count, inputs = rows.shape
    if not inputs:
        raise InvalidArgument(f"x: expected shape [R, K] with K >= 1, got {list(rows.shape)}")
    checks.shape(weights.shape, (weights.shape[0], inputs), "w", "[N, K]")
    target = np.empty((count, weights.shape[0]), np.float32) if out is None else out
    if out is not None:
        if not isinstance(out, np.ndarray):
            raise InvalidType(f"out: expected a NumPy array, got {type(out).__name__}")
        checks.shape(out.shape, (count, weights.shape[0]), "out", "[R, N]")
        if _matrix(out, "out") is not out or not out.flags.writeable:
            raise InvalidArgument("out: expected a writable float32 array with dense rows")
    if bias is not None:
        bias = arrays.dense(arrays.as_array(bias, "bias"))
        if bias.dtype != np.float32:
            raise InvalidType(f"bias: expected float32, got {bias.dtype}")
        checks.shape(bias.shape, (weights.shape[0],), "bias", "[N]")
    if count and weights.shape[0]:
        _linear.linear(rows, weights, bias, target)
    return target


def _matrix(value: Any, argument: str) -> np.ndarray:
    array = arrays.as_array(value, argument)
    if array.dtype != np.float32:
        raise InvalidType(f"{argument}: expected float32, got {array.dtype}")
    if array.ndim != 2:
        raise InvalidArgument(f"{argument}: expected 2 axes, got shape {list(array.shape)}")
    readable = arrays.is_readable(array) and array.strides[0] >= array.shape[1] * array.itemsize
    return array if readable else array.copy(order="C")
