"""Encoding and decoding of rows on plain arrays."""

from libc.stdint cimport int32_t, int64_t
cimport numpy as cnp

from kvcore._native.capi cimport *

cnp.import_array()


def quantize(cnp.ndarray rows not None, int dtype, int format, cnp.ndarray out not None):
    """rows: dense [R, D] of `dtype`; out: dense storage of R rows in `format`."""
    cdef const void *source = cnp.PyArray_DATA(rows)
    cdef void *target = cnp.PyArray_DATA(out)
    cdef int64_t count = rows.shape[0]
    cdef int32_t head_dim = <int32_t>rows.shape[1]
    cdef kv_status status
    with nogil:
        status = kv_quantize(source, dtype, format, count, head_dim, target)
    check(status)


def dequantize(cnp.ndarray codes not None, int format, int dtype, cnp.ndarray out not None):
    """codes: dense storage of R rows in `format`; out: dense [R, D] of `dtype`."""
    cdef const void *source = cnp.PyArray_DATA(codes)
    cdef void *target = cnp.PyArray_DATA(out)
    cdef int64_t count = out.shape[0]
    cdef int32_t head_dim = <int32_t>out.shape[1]
    cdef kv_status status
    with nogil:
        status = kv_dequantize(source, format, count, head_dim, dtype, target)
    check(status)
