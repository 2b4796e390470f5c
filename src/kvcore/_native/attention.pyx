"""Append, attend, read, copy and merge over blocks, with the GIL released."""

from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.string cimport memset
cimport numpy as cnp

import numpy as np

from kvcore._native.blocks cimport Blocks, Plan
from kvcore._native.capi cimport *

cnp.import_array()

NHD, HND, BSHD, BHSD = range(4)


cdef kv_rows as_rows(cnp.ndarray array, int dtype, int layout):
    """The array as the core sees it. Its last axis is dense and its strides are whole elements."""
    cdef kv_rows rows
    cdef int sequence = -1
    cdef int token
    cdef int head
    cdef int64_t itemsize = cnp.PyArray_ITEMSIZE(array)
    if layout == 0:
        token, head = 0, 1
    elif layout == 1:
        token, head = 1, 0
    elif layout == 2:
        sequence, token, head = 0, 1, 2
    else:
        sequence, head, token = 0, 1, 2
    rows.data = cnp.PyArray_DATA(array)
    rows.dtype = dtype
    rows.num_heads = <int32_t>array.shape[head]
    rows.head_dim = <int32_t>array.shape[array.ndim - 1]
    rows.padded_length = <int32_t>array.shape[token] if sequence >= 0 else 0
    rows.sequence_stride = array.strides[0] // itemsize if sequence >= 0 else 0
    rows.token_stride = array.strides[token] // itemsize
    rows.head_stride = array.strides[head] // itemsize
    return rows


def append(Plan plan not None, cnp.ndarray array not None, int dtype, int layout,
           Blocks blocks not None):
    """Encodes `array` (K or V of the plan's new tokens) into the plan's slots."""
    cdef kv_rows rows = as_rows(array, dtype, layout)
    cdef kv_status status
    with nogil:
        status = kv_append(&plan.c, &rows, &blocks.c)
    check(status)


def attend(Plan plan not None, cnp.ndarray q not None, int q_dtype, Blocks k not None,
           Blocks v not None, cnp.ndarray out not None, int layout, float scale, bint exact,
           cnp.ndarray lse, float softcap, bint causal, int32_t window, cnp.ndarray alibi_slopes,
           cnp.ndarray positions, cnp.ndarray mask, cnp.ndarray mask_offsets, cnp.ndarray sinks):
    """Attention of `q` over the plan's sequences into `out`, and lse [T, Hq] unless None.

    From softcap on as kv_attend_options has them; arrays are dense, and 0 or None is off.
    """
    cdef kv_rows q_rows = as_rows(q, q_dtype, layout)
    cdef kv_rows out_rows = as_rows(out, q_dtype, layout)
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
    if lse is not None:
        lse_data = <float *>cnp.PyArray_DATA(lse)
    with nogil:
        status = kv_attend(&plan.c, &q_rows, &k.c, &v.c, &options, &out_rows, lse_data)
    check(status)


def copy_blocks(Plan plan not None, Blocks blocks not None):
    """Runs the plan's copies on `blocks`."""
    cdef kv_status status
    with nogil:
        status = kv_copy_blocks(&plan.c, &blocks.c)
    check(status)


def read(Blocks blocks not None, cnp.ndarray block_row not None, int32_t start, int32_t stop):
    """Tokens [start, stop) of the sequence behind `block_row` (int32), as float32 [n, H, D]."""
    out = np.empty((stop - start, blocks.c.num_heads, blocks.c.head_dim), np.float32)
    cdef kv_rows rows = as_rows(out, KV_DTYPE_F32, 0)
    cdef const int32_t *row = <const int32_t *>cnp.PyArray_DATA(block_row)
    cdef int32_t columns = <int32_t>block_row.shape[0]
    cdef kv_status status
    with nogil:
        status = kv_read(&blocks.c, row, columns, start, stop, &rows)
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
