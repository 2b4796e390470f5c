"""Append, attend, read, copy and merge over blocks, with the GIL released."""

from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.string cimport memset
cimport numpy as cnp

import numpy as np

from kvcore._native.blocks cimport Blocks, Plan
from kvcore._native.capi cimport *

cnp.import_array()

NHD, HND, BSHD, BHSD = range(4)

#: The core's dtype numbers by NumPy's dtypes. bfloat16 joins when the first one comes: its dtype
#: exists only where ml_dtypes is imported.
DTYPES = {np.dtype(np.float32): KV_DTYPE_F32, np.dtype(np.float16): KV_DTYPE_F16}


cdef struct row_axes:
    int sequence  # -1: ragged
    int token
    int head


cdef row_axes axes_of(int layout) noexcept:
    if layout == 0:
        return row_axes(-1, 0, 1)
    if layout == 1:
        return row_axes(-1, 1, 0)
    if layout == 2:
        return row_axes(0, 1, 2)
    return row_axes(0, 2, 1)


cdef kv_rows as_rows(cnp.ndarray array, int layout) except *:
    """The array as the core sees it. Its last axis is dense and its strides are whole elements."""
    cdef kv_rows rows
    cdef row_axes axes = axes_of(layout)
    cdef bint padded = axes.sequence >= 0
    cdef int64_t itemsize = cnp.PyArray_ITEMSIZE(array)
    rows.data = cnp.PyArray_DATA(array)
    rows.dtype = DTYPES[array.dtype]
    rows.num_heads = <int32_t>array.shape[axes.head]
    rows.head_dim = <int32_t>array.shape[array.ndim - 1]
    rows.padded_length = <int32_t>array.shape[axes.token] if padded else 0
    rows.sequence_stride = array.strides[0] // itemsize if padded else 0
    rows.token_stride = array.strides[axes.token] // itemsize
    rows.head_stride = array.strides[axes.head] // itemsize
    return rows


cdef bint is_readable(cnp.ndarray array) noexcept:
    cdef int i
    cdef int itemsize = cnp.PyArray_ITEMSIZE(array)
    if not cnp.PyArray_ISALIGNED(array):
        return False
    if cnp.PyArray_IS_C_CONTIGUOUS(array):
        return True
    for i in range(array.ndim):
        if array.strides[i] % itemsize != 0:
            return False
    return array.strides[array.ndim - 1] == itemsize


def fits(Plan plan not None, value, int layout, Blocks blocks not None, bint grouped=False):
    """Whether `value` holds the plan's new tokens for `blocks`, ready for the core to read.

    Its heads are those of the blocks or, `grouped`, a multiple of them. Where it does not fit, the
    caller finds out why.
    """
    cdef cnp.ndarray array
    cdef row_axes axes = axes_of(layout)
    cdef cnp.npy_intp tokens, heads
    if not cnp.PyArray_CheckExact(value):
        return False
    array = value
    if array.ndim != (3 if axes.sequence < 0 else 4) or array.dtype not in DTYPES:
        return False
    if array.shape[array.ndim - 1] != blocks.c.head_dim or not is_readable(array):
        return False
    heads = array.shape[axes.head]
    if grouped and (heads == 0 or heads % blocks.c.num_heads != 0):
        return False
    if not grouped and heads != blocks.c.num_heads:
        return False
    tokens = array.shape[axes.token]
    if axes.sequence < 0:
        return tokens == plan.c.num_tokens
    return tokens >= plan.c.max_new and array.shape[0] == plan.c.num_sequences


def append(Plan plan not None, cnp.ndarray array not None, int layout, Blocks blocks not None):
    """Encodes `array` (K or V of the plan's new tokens) into the plan's slots."""
    cdef kv_rows rows = as_rows(array, layout)
    cdef kv_status status
    with nogil:
        status = kv_append(&plan.c, &rows, &blocks.c)
    check(status)


cdef cnp.ndarray empty_like(cnp.ndarray q, int32_t head_dim):
    """An array of q's shape and dtype but with `head_dim`."""
    cdef cnp.npy_intp[4] shape
    cdef int i
    for i in range(q.ndim):
        shape[i] = q.shape[i]
    shape[q.ndim - 1] = head_dim
    return cnp.PyArray_EMPTY(q.ndim, shape, cnp.PyArray_TYPE(q), 0)


cdef cnp.ndarray empty_lse(const kv_rows *q, int32_t num_tokens):
    cdef cnp.npy_intp[2] shape
    shape[0], shape[1] = num_tokens, q.num_heads
    return cnp.PyArray_EMPTY(2, shape, cnp.NPY_FLOAT32, 0)


def attend(Plan plan not None, cnp.ndarray q not None, int layout, Blocks k not None,
           Blocks v not None, cnp.ndarray out, bint return_lse, float scale, bint exact,
           float softcap, bint causal, int32_t window, cnp.ndarray alibi_slopes,
           cnp.ndarray positions, cnp.ndarray mask, cnp.ndarray mask_offsets, cnp.ndarray sinks):
    """Attention of `q` over the plan's sequences: out, or (out, lse [T, Hq]).

    `out` is made unless it is given. From scale on as kv_attend_options has them; arrays are
    dense, and 0 or None is off.
    """
    cdef cnp.ndarray target = empty_like(q, v.c.head_dim) if out is None else out
    cdef cnp.ndarray lse = None
    cdef kv_rows q_rows = as_rows(q, layout)
    cdef kv_rows out_rows = as_rows(target, layout)
    cdef kv_attend_options options
    cdef float *lse_data = NULL
    cdef kv_status status
    memset(&options, 0, sizeof(options))
    options.struct_size = sizeof(options)
    options.scale = scale
    options.exact = exact
    options.softcap = softcap
    options.non_causal = not causal
    options.window = window
    if alibi_slopes is not None:
        options.alibi_slopes = <const float *>cnp.PyArray_DATA(alibi_slopes)
    if positions is not None:
        options.positions = <const int32_t *>cnp.PyArray_DATA(positions)
    if mask is not None:
        options.mask = <const uint8_t *>cnp.PyArray_DATA(mask)
        options.mask_size = cnp.PyArray_SIZE(mask)
        options.mask_offsets = <const int64_t *>cnp.PyArray_DATA(mask_offsets)
    if sinks is not None:
        options.sinks = <const float *>cnp.PyArray_DATA(sinks)
    if return_lse:
        lse = empty_lse(&q_rows, plan.c.num_tokens)
        lse_data = <float *>cnp.PyArray_DATA(lse)
    with nogil:
        status = kv_attend(&plan.c, &q_rows, &k.c, &v.c, &options, &out_rows, lse_data)
    check(status)
    return (target, lse) if return_lse else target


def check_sight(Plan plan not None, int32_t num_blocks, bint causal, int32_t window,
                cnp.ndarray positions, cnp.ndarray mask, cnp.ndarray mask_offsets):
    """Raises TokensReleased if a new token sees a block that was released; options as for attend.

    `attend` checks the same of itself; this is for backends whose kernels cannot.
    """
    cdef kv_attend_options options
    memset(&options, 0, sizeof(options))
    options.struct_size = sizeof(options)
    options.non_causal = not causal
    options.window = window
    if positions is not None:
        options.positions = <const int32_t *>cnp.PyArray_DATA(positions)
    if mask is not None:
        options.mask = <const uint8_t *>cnp.PyArray_DATA(mask)
        options.mask_size = cnp.PyArray_SIZE(mask)
        options.mask_offsets = <const int64_t *>cnp.PyArray_DATA(mask_offsets)
    check(kv_plan_check_sight(&plan.c, num_blocks, &options))


def copy_blocks(Plan plan not None, Blocks blocks not None):
    """Runs the plan's copies on `blocks`."""
    cdef kv_status status
    with nogil:
        status = kv_copy_blocks(&plan.c, &blocks.c)
    check(status)


def restore_raw(Plan plan not None, Blocks blocks not None):
    """Decodes the raw rows that the plan restores."""
    cdef kv_status status
    with nogil:
        status = kv_restore_raw(&plan.c, &blocks.c)
    check(status)


def find_not_finite(Plan plan not None, cnp.ndarray array not None, int layout):
    """(new token, head) of the first row that has a NaN or an infinity; None: there is none."""
    cdef kv_rows rows = as_rows(array, layout)
    cdef int32_t token = 0, head = 0
    cdef kv_status status
    with nogil:
        status = kv_check_finite(&plan.c, &rows, &token, &head)
    if status == KV_ERR_NOT_FINITE:
        return token, head
    check(status)
    return None


def read(Blocks blocks not None, cnp.ndarray block_row not None, int32_t start, int32_t stop,
         cnp.ndarray raw_row=None):
    """Tokens [start, stop) of the sequence behind `block_row` (int32), as float32 [n, H, D].

    Where the sequence has raw rows, `raw_row` are their blocks and `stop` is its length.
    """
    out = np.empty((stop - start, blocks.c.num_heads, blocks.c.head_dim), np.float32)
    cdef kv_rows rows = as_rows(out, 0)
    cdef kv_read_source sequence
    cdef kv_status status
    memset(&sequence, 0, sizeof(sequence))
    sequence.block_row = <const int32_t *>cnp.PyArray_DATA(block_row)
    sequence.num_columns = <int32_t>block_row.shape[0]
    sequence.length = stop
    if raw_row is not None:
        sequence.raw_row = <const int32_t *>cnp.PyArray_DATA(raw_row)
        sequence.num_raw_columns = <int32_t>raw_row.shape[0]
    with nogil:
        status = kv_read(&blocks.c, &sequence, start, stop, &rows)
    check(status)
    return out


def merge_states(cnp.ndarray outs not None, cnp.ndarray lses not None, cnp.ndarray out not None,
                 cnp.ndarray lse not None):
    """Dense float32: outs [P, R, D], lses [P, R] -> out [R, D], lse [R]."""
    cdef const float *outs_data = <const float *>cnp.PyArray_DATA(outs)
    cdef const float *lses_data = <const float *>cnp.PyArray_DATA(lses)
    cdef float *out_data = <float *>cnp.PyArray_DATA(out)
    cdef float *lse_data = <float *>cnp.PyArray_DATA(lse)
    cdef int32_t partials = <int32_t>outs.shape[0]
    cdef int64_t rows = outs.shape[1]
    cdef int32_t head_dim = <int32_t>outs.shape[2]
    cdef kv_status status
    with nogil:
        status = kv_merge_states(outs_data, lses_data, partials, rows, head_dim, out_data,
                                 lse_data)
    check(status)
