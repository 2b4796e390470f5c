"""What callers hand in, as NumPy arrays that the core can read in place where strides allow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvcore import checks
from kvcore._native.attention import DTYPES
from kvcore._native.tokens import token_ids
from kvcore.errors import InvalidArgument, InvalidType, MissingExtra

if TYPE_CHECKING:
    from kvcore._native.blocks import Plan

#: The core's dtype numbers (kv_dtype in kvcore.h).
F32, F16, BF16 = range(3)

#: The core's layout numbers, and each layout's axes as the documentation names them.
LAYOUTS = {"NHD": 0, "HND": 1, "BSHD": 2, "BHSD": 3}
_AXES = {"NHD": "[T, H, D]", "HND": "[H, T, D]", "BSHD": "[S, n, H, D]", "BHSD": "[S, H, n, D]"}


def as_array(value: Any, argument: str) -> np.ndarray:
    """`value` as an array: NumPy's own, the buffer protocol, array interfaces, DLPack."""
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "__array_interface__") or not hasattr(value, "__dlpack__"):
        try:
            memory = value if hasattr(value, "__array_interface__") else memoryview(value)
        except TypeError:
            raise InvalidType(
                f"{argument}: expected an array, a buffer or a DLPack tensor, "
                f"got {type(value).__name__}"
            ) from None
        return np.asarray(memory)
    return _from_dlpack(value, argument)


def _from_dlpack(value: Any, argument: str) -> np.ndarray:
    if str(getattr(value, "dtype", "")).endswith("bfloat16") and hasattr(value, "view"):
        # NumPy's DLPack reader knows no bfloat16: the bits travel as int16.
        bits = _from_dlpack(value.view(_sibling_dtype(value, "int16")), argument)
        return bits.view(bfloat16())
    try:
        return np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError) as error:
        raise InvalidType(f"{argument}: its DLPack tensor cannot be read: {error}") from None


def _sibling_dtype(value: Any, name: str) -> Any:
    """Another dtype of the library that `value` comes from."""
    import importlib

    return getattr(importlib.import_module(type(value).__module__.split(".")[0]), name)


def bfloat16() -> np.dtype:
    """NumPy's bfloat16, which the ml_dtypes package adds."""
    try:
        import ml_dtypes
    except ImportError:
        raise MissingExtra(
            'bfloat16 arrays need the ml_dtypes package: pip install "kvcore[bf16]"'
        ) from None
    dtype: np.dtype = np.dtype(ml_dtypes.bfloat16)
    return dtype


def dtype_number(array: np.ndarray, argument: str) -> int:
    number = DTYPES.get(array.dtype)
    if number is not None:
        return number
    if array.dtype.name != "bfloat16" or not array.dtype.isnative:
        raise InvalidType(f"{argument}: expected float32, float16 or bfloat16, got {array.dtype}")
    return DTYPES.setdefault(array.dtype, BF16)


def layout_number(layout: str) -> int:
    try:
        return LAYOUTS[layout]
    except (KeyError, TypeError):
        names = ", ".join(LAYOUTS)
        raise InvalidArgument(f"layout: expected one of {names}, got {layout!r}") from None


def is_readable(array: np.ndarray) -> bool:
    """Whether the core reads it in place: rows dense, strides whole elements, aligned."""
    flags = array.flags
    if flags.c_contiguous:
        return flags.aligned
    strides, itemsize = array.strides, array.itemsize
    return (
        flags.aligned
        and strides[-1] == itemsize
        and all(stride % itemsize == 0 for stride in strides)
    )


def overlaps_itself(array: np.ndarray) -> bool:
    """Whether two elements may share memory, which an array that is written must not have."""
    extent = array.itemsize
    axes = zip(array.strides, array.shape, strict=True)
    for stride, size in sorted((abs(stride), size) for stride, size in axes if size > 1):
        if stride < extent:
            return True
        extent += stride * (size - 1)
    return False


def dense(array: Any, dtype: np.dtype | type | None = None) -> np.ndarray:
    """`array` as C-contiguous, aligned memory, copied only when it is not."""
    result = np.ascontiguousarray(array, dtype=dtype)
    return result if result.flags.aligned else result.copy()


def as_rows(value: Any, argument: str) -> np.ndarray:
    """`value` as an array that the core reads, copied only when it must be."""
    array = as_array(value, argument)
    dtype_number(array, argument)
    if array.ndim < 3 or is_readable(array):  # of fewer axes the caller tells what was expected
        return array
    return np.array(array, order="C")


def check_rows(
    array: np.ndarray,
    argument: str,
    layout: str,
    plan: Plan,
    num_heads: int,
    head_dim: int,
    grouped: bool,
) -> None:
    """Raises unless `array` holds the plan's new tokens as `layout` says.

    They have num_heads heads or, `grouped`, a multiple of them.
    """
    shape = array.shape
    heads: int | None = num_heads
    if grouped:
        heads = shape[layout.index("H")] if len(shape) == len(layout) else None
    expected: tuple[int | None, ...]
    if layout == "NHD":
        expected = (plan.num_tokens, heads, head_dim)
    elif layout == "HND":
        expected = (heads, plan.num_tokens, head_dim)
    else:
        length = plan.max_new
        if len(shape) == 4:
            length = max(length, shape[layout.index("S")])
        padded = (length, heads) if layout == "BSHD" else (heads, length)
        expected = (plan.num_sequences, *padded, head_dim)
    if shape != expected:
        came = ["any" if size is None else size for size in expected]
        raise InvalidArgument(
            f"{argument}: expected shape {_AXES[layout]} = {came}, got {list(shape)}"
        )
    if not heads or heads % num_heads:
        raise InvalidArgument(f"{argument}: expected a multiple of {num_heads} heads, got {heads}")


def check_partials(outs: np.ndarray, lses: np.ndarray) -> None:
    """Raises unless these can be merged: float32 [P, ..., D] and [P, ...]."""
    for array, argument in ((outs, "outs"), (lses, "lses")):
        if array.dtype != np.float32:
            raise InvalidType(f"{argument}: expected float32, got {array.dtype}")
    if outs.ndim < 2 or outs.shape[0] < 1 or outs.shape[-1] % 8 or not outs.shape[-1]:
        raise InvalidArgument(
            "outs: expected shape [P, ..., D] with P >= 1 and D a multiple of 8, "
            f"got {list(outs.shape)}"
        )
    checks.shape(lses.shape, outs.shape[:-1], "lses", "outs.shape[:-1]")


def from_list(value: Any, argument: str) -> np.ndarray:
    """`value` as an array; a list of numbers becomes one."""
    if not isinstance(value, list | tuple):
        return as_array(value, argument)
    try:
        return np.asarray(value)
    except ValueError:
        raise InvalidArgument(
            f"{argument}: expected a regular array, got lists of unequal length"
        ) from None


def as_token_ids(value: Any, argument: str) -> np.ndarray:
    """Token ids as a dense int32 [n]."""
    ids = token_ids(value)
    if ids is not None:
        return ids
    array = from_list(value, argument)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise InvalidArgument(
            f"{argument}: expected a list or 1-D array of int token ids, "
            f"got {array.dtype.name} of shape {list(array.shape)}"
        )
    ids = token_ids(dense(array, np.int64))
    if ids is None:
        raise InvalidArgument(
            f"{argument}: expected token ids from 0 to {np.iinfo(np.int32).max}, "
            f"got {array.min()} to {array.max()}"
        )
    return ids


def as_index(value: Any, argument: str, ndim: int) -> np.ndarray:
    """An index array as dense int32 with `ndim` axes."""
    array = from_list(value, argument)
    if array.ndim != ndim or array.dtype.kind not in "iu":
        raise InvalidArgument(
            f"{argument}: expected a {ndim}-D array of ints, "
            f"got {array.dtype.name} of shape {list(array.shape)}"
        )
    result = dense(array, np.int32)
    if array.dtype != np.int32 and not np.array_equal(result, array):
        raise InvalidArgument(f"{argument}: expected values that fit int32")
    return result
