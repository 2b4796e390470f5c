"""What callers hand in, as NumPy arrays that the core can read in place where strides allow."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvcore import checks
from kvcore.errors import InvalidArgument, InvalidType, MissingExtra

#: The core's dtype numbers (kv_dtype in kvcore.h).
F32, F16, BF16 = range(3)
_DTYPES = {"float32": F32, "float16": F16, "bfloat16": BF16}

#: The core's layout numbers, the axes that each has, and where its heads are.
LAYOUTS = {"NHD": 0, "HND": 1, "BSHD": 2, "BHSD": 3}


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
    return np.dtype(ml_dtypes.bfloat16)


def dtype_number(array: np.ndarray, argument: str) -> int:
    number = _DTYPES.get(array.dtype.name)
    if number is None:
        raise InvalidType(
            f"{argument}: expected float32, float16 or bfloat16, got {array.dtype.name}"
        )
    return number


def layout_number(layout: str) -> int:
    number = LAYOUTS.get(layout)
    if number is None:
        raise InvalidArgument(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    return number


def is_readable(array: np.ndarray) -> bool:
    """Whether the core reads it in place: rows dense, strides whole elements, aligned."""
    strides, itemsize = array.strides, array.itemsize
    return (
        strides[-1] == itemsize
        and all(stride % itemsize == 0 for stride in strides)
        and array.flags.aligned
        and array.dtype.isnative
    )


def as_rows(value: Any, argument: str) -> tuple[np.ndarray, int]:
    """`value` as an array that the core reads, copied only when its strides forbid, and its dtype."""
    array = as_array(value, argument)
    number = dtype_number(array, argument)
    if array.ndim < 3:
        raise InvalidArgument(f"{argument}: expected 3 or 4 axes, got shape {list(array.shape)}")
    if not is_readable(array):
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    return array, number


def check_rows(
    array: np.ndarray,
    argument: str,
    layout: str,
    *,
    num_tokens: int,
    num_sequences: int,
    max_new: int,
    num_heads: int | None,
    head_dim: int,
) -> None:
    """Raises unless `array` has the shape that `layout` asks for; num_heads None takes any."""
    if array.ndim != len(layout):
        raise InvalidArgument(
            f"{argument}: expected {len(layout)} axes for layout {layout}, "
            f"got shape {list(array.shape)}"
        )
    heads = array.shape[layout.index("H")] if num_heads is None else num_heads
    if layout in ("NHD", "HND"):
        expected = {"N": num_tokens, "H": heads, "D": head_dim}
        checks.shape(
            array.shape,
            tuple(expected[axis] for axis in layout),
            argument,
            "[T, H, D]" if layout == "NHD" else "[H, T, D]",
        )
        return
    length = array.shape[layout.index("S")]
    expected = {"B": num_sequences, "S": max(length, max_new), "H": heads, "D": head_dim}
    checks.shape(
        array.shape,
        tuple(expected[axis] for axis in layout),
        argument,
        "[S, n, H, D]" if layout == "BSHD" else "[S, H, n, D]",
    )


def as_token_ids(value: Any, argument: str) -> np.ndarray:
    """Token ids as a dense int32 [n]."""
    array = np.asarray(value) if isinstance(value, list | tuple) else as_array(value, argument)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise InvalidArgument(
            f"{argument}: expected a list or 1-D array of int token ids, "
            f"got {array.dtype.name} of shape {list(array.shape)}"
        )
    info = np.iinfo(np.int32)
    if array.size and (array.min() < 0 or array.max() > info.max):
        raise InvalidArgument(
            f"{argument}: expected token ids from 0 to {info.max}, "
            f"got {array.min()} to {array.max()}"
        )
    return np.ascontiguousarray(array, dtype=np.int32)


def as_index(value: Any, argument: str, ndim: int) -> np.ndarray:
    """An index array as dense int32 with `ndim` axes."""
    array = np.asarray(value) if isinstance(value, list | tuple) else as_array(value, argument)
    if array.ndim != ndim or array.dtype.kind not in "iu":
        raise InvalidArgument(
            f"{argument}: expected a {ndim}-D array of ints, "
            f"got {array.dtype.name} of shape {list(array.shape)}"
        )
    result = np.ascontiguousarray(array, dtype=np.int32)
    if array.dtype.itemsize > 4 and not np.array_equal(result, array):
        raise InvalidArgument(f"{argument}: expected values that fit int32")
    return result
