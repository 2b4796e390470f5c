"""Rows on plain arrays, encoded and decoded by the C core."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvcore import arrays, checks
from kvcore._native import quant
from kvcore.errors import InvalidArgument, InvalidType, NotFinite
from kvcore.formats import GROUP_TOKENS, Format
from kvcore.spec import MAX_HEAD_DIM


def quantize(x: Any, format: Format, scales: Any | None, bias: Any | None) -> np.ndarray:
    """See kvcore.ops.quantize."""
    rows = arrays.dense(arrays.as_array(x, "x"))
    number = arrays.dtype_number(rows, "x")
    shape = encoded_shape(format, rows.shape)
    head_dim = rows.shape[-1]
    channels = channels_of(format, scales, bias, head_dim)
    code = np.empty(shape, format.storage_dtype)
    if rows.size:
        try:
            quant.quantize(rows.reshape(-1, head_dim), number, format.index, *channels, code)
        except NotFinite:
            raise NotFinite(
                f"x: expected finite numbers for {format.name}, got NaN or infinity"
            ) from None
    return code


def dequantize(code: Any, format: Format, scales: Any | None, bias: Any | None) -> np.ndarray:
    """See kvcore.ops.dequantize."""
    codes = arrays.dense(storage_view(arrays.as_array(code, "code"), format, "code"))
    shape = decoded_shape(format, codes.shape)
    channels = channels_of(format, scales, bias, shape[-1])
    rows = np.empty(shape, np.float32)
    if rows.size:
        quant.dequantize(codes, format.index, arrays.F32, *channels, rows.reshape(-1, shape[-1]))
    return rows


def storage_view(array: np.ndarray, format: Format, argument: str) -> np.ndarray:
    """An array of a format's storage dtype; bfloat16 arrays are seen as their bits."""
    if array.dtype.name == "bfloat16":
        array = array.view(np.uint16)
    if array.dtype != format.storage_dtype:
        raise InvalidType(
            f"{argument}: expected {format.storage_dtype.name} for {format.name}, "
            f"got {array.dtype.name}"
        )
    return array


def encoded_shape(format: Format, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the codes of rows [..., D]."""
    *outer, head_dim = shape
    if head_dim % format.head_dim_multiple or not 0 < head_dim <= MAX_HEAD_DIM:
        raise InvalidArgument(
            f"x: expected a last axis that is a multiple of {format.head_dim_multiple} for "
            f"{format.name}, at most {MAX_HEAD_DIM}, got shape {list(shape)}"
        )
    if format.kind == "float":
        return shape
    if format.kind == "row":
        return (*outer, format.row_nbytes(head_dim))
    if not outer or outer[-1] % GROUP_TOKENS:
        raise InvalidArgument(
            f"x: expected shape [..., {GROUP_TOKENS} * G, D] for {format.name}, which encodes "
            f"{GROUP_TOKENS} tokens as one, got {list(shape)}"
        )
    groups = outer[-1] // GROUP_TOKENS
    return (*outer[:-1], groups, GROUP_TOKENS * format.row_nbytes(head_dim))


def decoded_shape(format: Format, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the rows of codes that `encoded_shape` describes."""
    tokens = GROUP_TOKENS if format.kind == "channel" else 1
    if not shape or (tokens > 1 and len(shape) < 2):
        raise InvalidArgument(f"code: expected what quantize gave, got shape {list(shape)}")
    *outer, size = shape
    head_dim = size
    if format.is_quantized:
        per_element = format.element_bits + format.element_metadata_bits
        head_dim = (size // tokens - format.row_metadata_bytes) * 8 // per_element
        fits = tokens * format.row_nbytes(head_dim) == size
    else:
        fits = True
    if not fits or head_dim % format.head_dim_multiple or not 0 < head_dim <= MAX_HEAD_DIM:
        raise InvalidArgument(
            f"code: expected a last axis that holds {format.name} of a multiple of "
            f"{format.head_dim_multiple} elements, at most {MAX_HEAD_DIM}, "
            f"got shape {list(shape)}"
        )
    if tokens > 1:
        return (*outer[:-1], outer[-1] * tokens, head_dim)
    return (*outer, head_dim)


def channels_of(
    format: Format, scales: Any | None, bias: Any | None, head_dim: int
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """bias and scales, checked, in the order in which the core takes them."""
    is_static = format.name == "int8_static"
    if is_static and scales is None:
        raise InvalidArgument("scales: expected one for each channel for int8_static, got None")
    if not is_static and scales is not None:
        raise InvalidArgument(f"scales: expected None for {format.name}, which has its own")
    if not format.is_quantized and bias is not None:
        raise InvalidArgument(f"bias: expected None for {format.name}, which is stored as it is")
    steps = _per_channel(scales, "scales", head_dim)
    if steps is not None and not (steps > 0).all():
        raise InvalidArgument(f"scales: expected positive numbers, got {steps.min()}")
    return _per_channel(bias, "bias", head_dim), steps


def _per_channel(value: Any | None, argument: str, head_dim: int) -> np.ndarray | None:
    if value is None:
        return None
    array = arrays.from_list(value, argument)
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise InvalidType(f"{argument}: expected real numbers, got {array.dtype.name}")
    checks.shape(array.shape, (head_dim,), argument, "[D]")
    channels = arrays.dense(array, np.float32)
    if not np.isfinite(channels).all():
        raise InvalidArgument(f"{argument}: expected finite numbers, got NaN or infinity")
    return channels
