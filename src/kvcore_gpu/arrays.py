"""Callers' arrays as rows that kernels read and write in place."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

from kvcore import arrays, checks
from kvcore.backend import Plan
from kvcore.errors import InvalidArgument, InvalidType
from kvcore_gpu.runtime import Runtime

#: What addresses and strides are multiples of, in bytes: kernels read and write so many at once.
ALIGNMENT = 16

# params.Rows: data; strides of sequence, token and head; dtype, heads, head_dim, padded length.
_ROWS = struct.Struct("@Pqqqiiii")
_POINTER = struct.Struct("@P")
_AXES = {"NHD": (0, 1), "HND": (1, 0), "BSHD": (1, 2), "BHSD": (2, 1)}  # token, head


def is_readable(runtime: Runtime, array: Any) -> bool:
    """Whether kernels take the array in place: dense rows, all aligned."""
    strides, shape = array.strides, array.shape
    if shape[-1] > 1 and strides[-1] != array.itemsize:
        return False
    for n, stride in zip(shape[:-1], strides[:-1], strict=True):
        if n > 1 and stride % ALIGNMENT:
            return False
    return runtime.address(array) % ALIGNMENT == 0


def dense(runtime: Runtime, array: Any) -> Any:
    """`array` as C-contiguous, aligned memory, copied only when it is not."""
    if array.flags.c_contiguous and runtime.address(array) % ALIGNMENT == 0:
        return array
    return runtime.copy(array)


def rows_for(
    runtime: Runtime,
    value: Any,
    argument: str,
    layout: str,
    plan: Plan,
    num_heads: int,
    head_dim: int,
    grouped: bool = False,
) -> Any:
    """What the user gave for the plan's new tokens, checked, and copied only when it must be.

    It has num_heads heads or, `grouped`, a multiple of them.
    """
    array = runtime.as_array(value, argument)
    arrays.dtype_number(array, argument)
    arrays.check_rows(array, argument, layout, plan, num_heads, head_dim, grouped)
    return array if is_readable(runtime, array) else runtime.copy(array)


def check_out(runtime: Runtime, out: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """`out` as an array of the device that attend can write to in place."""
    array = runtime.as_array(out, "out")
    if array.dtype != dtype:
        raise InvalidType(f"out: expected {dtype.name} like q, got {array.dtype.name}")
    checks.shape(array.shape, shape, "out", "q's with head_dim_v")
    is_writable = getattr(array.flags, "writeable", True)
    if not is_writable or not is_readable(runtime, array) or arrays.overlaps_itself(array):
        raise InvalidArgument(
            "out: expected a writable array with dense rows that lie apart, all at multiples of "
            f"{ALIGNMENT} bytes, got strides {array.strides}"
        )
    return array


def signature_of(runtime: Runtime, array: Any) -> Any:
    """What two arrays of the runtime's kind have in common if one can `place` the other's rows."""
    if type(array) is runtime.array_type:
        own: Any = array
        return own.shape, own.strides, own.dtype
    return None if array is None else object()  # equal to no other


def place(params: ctypes.Structure, offset: int, runtime: Runtime, array: Any) -> bool:
    """Writes where another array of the same signature lies; False: it is not aligned there."""
    address = runtime.address(array)
    _POINTER.pack_into(params, offset, address)
    return address % ALIGNMENT == 0


def put_rows(
    params: ctypes.Structure, offset: int, runtime: Runtime, array: Any, layout: str
) -> None:
    """Writes an array's place and shape into the `Rows` at `offset` of a kernel's parameters."""
    token, head = _AXES[layout]
    shape, strides, itemsize = array.shape, array.strides, array.itemsize
    is_padded = len(shape) == 4
    _ROWS.pack_into(
        params,
        offset,
        runtime.address(array),
        strides[0] // itemsize if is_padded else 0,
        strides[token] // itemsize,
        strides[head] // itemsize,
        arrays.dtype_number(array, "array"),
        shape[head],
        shape[-1],
        shape[token] if is_padded else 0,
    )
