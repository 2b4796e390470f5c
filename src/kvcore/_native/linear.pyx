"""The product with a weight matrix for few rows."""

from libc.stdint cimport int32_t, int64_t
cimport numpy as cnp

from kvcore._native.capi cimport *

cnp.import_array()


def linear(cnp.ndarray x not None, cnp.ndarray w not None, cnp.ndarray bias,
           cnp.ndarray out not None):
    """float32: x [R, K] and w [N, K] with dense rows, bias [N] or None, out [R, N]."""
    cdef const float *x_data = <const float *>cnp.PyArray_DATA(x)
    cdef const float *w_data = <const float *>cnp.PyArray_DATA(w)
    cdef const float *bias_data = NULL
    cdef float *out_data = <float *>cnp.PyArray_DATA(out)
    cdef int64_t x_stride = x.strides[0] // 4
    cdef int64_t w_stride = w.strides[0] // 4
    cdef int64_t out_stride = out.strides[0] // 4
    cdef int32_t rows = <int32_t>x.shape[0]
    cdef int32_t outputs = <int32_t>w.shape[0]
    cdef int32_t inputs = <int32_t>w.shape[1]
    cdef kv_status status
    if bias is not None:
        bias_data = <const float *>cnp.PyArray_DATA(bias)
    with nogil:
        status = kv_linear(x_data, x_stride, w_data, w_stride, bias_data, out_data, out_stride,
                           rows, outputs, inputs)
    check(status)
