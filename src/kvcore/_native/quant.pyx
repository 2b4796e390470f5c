"""Encoding and decoding of rows on plain arrays."""

from libc.stdint cimport int32_t, int64_t
cimport numpy as cnp

from kvcore._native.capi cimport *

cnp.import_array()


cdef const float *floats(cnp.ndarray array):
    if array is None:
        return NULL
    return <const float *>cnp.PyArray_DATA(array)


def quantize(cnp.ndarray rows not None, int dtype, int format, cnp.ndarray bias,
             cnp.ndarray scales, cnp.ndarray out not None):
    """rows: dense [R, D] of `dtype`; out: dense storage of R rows in `format`.

    bias, scales: dense float32 [D] or None.
    """
    cdef const void *source = cnp.PyArray_DATA(rows)
    cdef void *target = cnp.PyArray_DATA(out)
    cdef int64_t count = rows.shape[0]
    cdef int32_t head_dim = <int32_t>rows.shape[1]
    cdef kv_channels channels = kv_channels(floats(bias), floats(scales))
    cdef kv_status status
    with nogil:
        status = kv_quantize(source, dtype, format, count, head_dim, &channels, target)
    check(status)


def dequantize(cnp.ndarray codes not None, int format, int dtype, cnp.ndarray bias,
               cnp.ndarray scales, cnp.ndarray out not None):
    """codes: dense storage of R rows in `format`; out: dense [R, D] of `dtype`.

    bias, scales: as for quantize.
    """
    cdef const void *source = cnp.PyArray_DATA(codes)
    cdef void *target = cnp.PyArray_DATA(out)
    cdef int64_t count = out.shape[0]
    cdef int32_t head_dim = <int32_t>out.shape[1]
    cdef kv_channels channels = kv_channels(floats(bias), floats(scales))
    cdef kv_status status
    with nogil:
        status = kv_dequantize(source, format, count, head_dim, &channels, dtype, target)
    check(status)
