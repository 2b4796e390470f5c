"""The C library through ctypes, for tests that look below the Python API."""

from __future__ import annotations

import contextlib
import ctypes as ct
import os
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

FORMATS = {"fp32": 0, "fp16": 1, "bf16": 2}
DTYPES = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
OK, NULL, VALUE, RANGE, OVERFLOW, UNSUPPORTED = range(6)
RELEASED = 17
NOT_FINITE = 19

i32, i64, ptr = ct.c_int32, ct.c_int64, ct.c_void_p


class Blocks(ct.Structure):
    _fields_ = [
        ("data", ptr),
        ("format", ct.c_int),
        ("num_blocks", i32),
        ("num_heads", i32),
        ("block_size", i32),
        ("head_dim", i32),
        ("block_stride", i64),
        ("head_stride", i64),
        ("token_stride", i64),
        ("metadata_offset", i64),
        ("bias", ptr),
        ("scales", ptr),
        ("raw", ptr),
        ("raw_first", i32),
        ("raw_last", i32),
        ("saturate", i32),
    ]


class ReadSource(ct.Structure):
    _fields_ = [
        ("block_row", ptr),
        ("num_columns", i32),
        ("raw_row", ptr),
        ("num_raw_columns", i32),
        ("length", i32),
    ]


class Rows(ct.Structure):
    _fields_ = [
        ("data", ptr),
        ("dtype", ct.c_int),
        ("num_heads", i32),
        ("head_dim", i32),
        ("padded_length", i32),
        ("sequence_stride", i64),
        ("token_stride", i64),
        ("head_stride", i64),
    ]


class Plan(ct.Structure):
    _fields_ = [
        ("block_size", i32),
        ("num_sequences", i32),
        ("num_tokens", i32),
        ("max_new", i32),
        ("query_starts", ptr),
        ("seq_lens", ptr),
        ("slots", ptr),
        ("num_copies", i32),
        ("copies", ptr),
        ("num_new_blocks", i32),
        ("new_blocks", ptr),
        ("block_rows", ptr),
        ("buffer", ptr),
        ("buffer_size", i64),
        ("raw", ptr),
        ("num_restores", i32),
        ("restores", ptr),
    ]


class AttendOptions(ct.Structure):
    _fields_ = [
        ("struct_size", ct.c_size_t),
        ("scale", ct.c_float),
        ("exact", i32),
        ("non_causal", i32),
        ("window", i32),
        ("softcap", ct.c_float),
        ("alibi_slopes", ptr),
        ("positions", ptr),
        ("mask", ptr),
        ("mask_size", i64),
        ("mask_offsets", ptr),
        ("sinks", ptr),
    ]


def _find_library() -> str:
    override = os.environ.get("KVCORE_TEST_LIBRARY")
    if override:
        return override
    import kvcore

    return str(next(Path(kvcore.get_library_dir()).glob("libkvcore.*")))


lib = ct.CDLL(_find_library())
lib.kv_append.argtypes = [ct.POINTER(Plan), ct.POINTER(Rows), ct.POINTER(Blocks)]
lib.kv_copy_blocks.argtypes = [ct.POINTER(Plan), ct.POINTER(Blocks)]
lib.kv_read.argtypes = [
    ct.POINTER(Blocks),
    ct.POINTER(ReadSource),
    i32,
    i32,
    ct.POINTER(Rows),
]
lib.kv_attend.argtypes = [
    ct.POINTER(Plan),
    ct.POINTER(Rows),
    ct.POINTER(Blocks),
    ct.POINTER(Blocks),
    ct.POINTER(AttendOptions),
    ct.POINTER(Rows),
    ptr,
]
lib.kv_merge_states.argtypes = [ptr, ptr, i32, i64, i32, ptr, ptr]
lib.kv_quantize.argtypes = [ptr, ct.c_int, ct.c_int, i64, i32, ptr, ptr]
lib.kv_dequantize.argtypes = [ptr, ct.c_int, i64, i32, ptr, ct.c_int, ptr]
lib.kv_linear.argtypes = [ptr, i64, ptr, i64, ptr, ptr, i64, i32, i32, i32]
lib.kv_blocks_init.argtypes = [ct.POINTER(Blocks), ptr, ct.c_int, i32, i32, i32, i32]
lib.kv_blocks_nbytes.argtypes = [ct.POINTER(Blocks)]
lib.kv_blocks_nbytes.restype = i64
lib.kv_memory_allocate.argtypes = [ct.c_size_t, ct.POINTER(ptr)]
lib.kv_memory_free.argtypes = [ptr, ct.c_size_t]
lib.kv_memory_free.restype = None
lib.kv_set_num_threads.argtypes = [i32, i32]
lib.kv_get_num_threads.restype = i32
lib.kv_set_isa.argtypes = [ct.c_char_p]
lib.kv_get_isa.restype = ct.c_char_p
lib.kv_available_isas.restype = ct.POINTER(ct.c_char_p)
lib.kv_cpu_features.restype = ct.POINTER(ct.c_char_p)


def names(values: ct._Pointer[ct.c_char_p]) -> list[str]:
    found: list[str] = []
    while values[len(found)]:
        found.append(values[len(found)].decode())
    return found


ISAS = names(lib.kv_available_isas())


@contextlib.contextmanager
def machine(isa: str, threads: int = 1) -> Iterator[None]:
    """Runs the body on one ISA and number of threads."""
    before = lib.kv_get_isa()
    assert lib.kv_set_isa(isa.encode()) == OK
    assert lib.kv_set_num_threads(threads, 1) == OK
    try:
        yield
    finally:
        lib.kv_set_isa(before)
        lib.kv_set_num_threads(0, 0)


def address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


def format_of(array: np.ndarray) -> int:
    return next(FORMATS[name] for name, dtype in DTYPES.items() if dtype == array.dtype)


def rows_of(array: np.ndarray) -> Rows:
    """[T, H, D] ragged or [S, L, H, D] padded; any strides, the last axis dense."""
    size = array.itemsize
    strides = [stride // size for stride in array.strides]
    padded = array.ndim == 4
    return Rows(
        address(array),
        format_of(array),
        array.shape[-2],
        array.shape[-1],
        array.shape[1] if padded else 0,
        strides[0] if padded else 0,
        strides[-3],
        strides[-2],
    )


def blocks_of(array: np.ndarray) -> Blocks:
    """[N, H, B, D] with any strides, the last axis dense."""
    n, h, b, d = array.shape
    return Blocks(address(array), format_of(array), n, h, b, d, *array.strides[:3])


class Step:
    """A plan over arrays that this object keeps alive."""

    def __init__(
        self, block_size: int, counts, seq_lens, block_rows=None, slots=None, copies=None
    ) -> None:
        self.counts = [int(n) for n in counts]
        self.query_starts = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int32)
        self.seq_lens = np.asarray(seq_lens, np.int32)
        self.block_rows = [np.ascontiguousarray(row, np.int32) for row in block_rows or []]
        self.slots = None if slots is None else np.asarray(slots, np.int32)
        self.copies = None if copies is None else np.asarray(copies, np.int32).reshape(-1, 3)
        self._row_addresses = (ptr * max(1, len(self.block_rows)))(
            *[address(row) for row in self.block_rows]
        )
        self.plan = Plan(
            block_size,
            len(self.counts),
            int(self.query_starts[-1]),
            max(self.counts, default=0),
            address(self.query_starts),
            address(self.seq_lens),
            address(self.slots),
            0 if self.copies is None else len(self.copies),
            address(self.copies),
            0,
            None,
            ct.cast(self._row_addresses, ptr) if block_rows is not None else None,
            None,
            0,
        )


def read(
    blocks: np.ndarray, row: np.ndarray, num_columns: int, start: int, stop: int, out: np.ndarray
) -> int:
    """Of float formats, which have no raw rows."""
    sequence = ReadSource(address(row), num_columns)
    return lib.kv_read(blocks_of(blocks), sequence, start, stop, rows_of(out))


def append(step: Step, rows: np.ndarray, blocks: np.ndarray) -> int:
    return lib.kv_append(step.plan, rows_of(rows), blocks_of(blocks))


def attend(
    step: Step,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: float,
    out: np.ndarray,
    lse: np.ndarray | None = None,
    struct_size: int = ct.sizeof(AttendOptions),
    **given: float | np.ndarray,
) -> int:
    """`given` are fields of AttendOptions, pointers as the arrays that they point to."""
    options = AttendOptions(struct_size, scale, 0)
    for name, value in given.items():
        setattr(options, name, address(value) if isinstance(value, np.ndarray) else value)
    return lib.kv_attend(
        step.plan, rows_of(q), blocks_of(k), blocks_of(v), options, rows_of(out), address(lse)
    )
