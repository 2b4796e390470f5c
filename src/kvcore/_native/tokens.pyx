"""Token ids, in the forms that cost nothing to look at."""

from cpython.long cimport PyLong_AsLongAndOverflow, PyLong_CheckExact
from libc.stdint cimport INT32_MAX, int32_t, int64_t
cimport numpy as cnp

cnp.import_array()


cdef cnp.ndarray new_ids(cnp.npy_intp count):
    return cnp.PyArray_EMPTY(1, &count, cnp.NPY_INT32, 0)


cdef cnp.ndarray of_int32(cnp.ndarray array):
    cdef const int32_t *ids = <const int32_t *>cnp.PyArray_DATA(array)
    cdef cnp.npy_intp i
    cdef int32_t sign = 0
    for i in range(array.shape[0]):
        sign |= ids[i]
    return array if sign >= 0 else None


cdef cnp.ndarray of_int64(cnp.ndarray array):
    cdef const int64_t *wide = <const int64_t *>cnp.PyArray_DATA(array)
    cdef cnp.ndarray result = new_ids(array.shape[0])
    cdef int32_t *ids = <int32_t *>cnp.PyArray_DATA(result)
    cdef cnp.npy_intp i
    for i in range(array.shape[0]):
        if wide[i] < 0 or wide[i] > INT32_MAX:
            return None
        ids[i] = <int32_t>wide[i]
    return result


cdef cnp.ndarray of_list(list value):
    cdef cnp.ndarray result = new_ids(len(value))
    cdef int32_t *ids = <int32_t *>cnp.PyArray_DATA(result)
    cdef Py_ssize_t i
    cdef long long number
    cdef int overflow = 0
    for i in range(len(value)):
        if not PyLong_CheckExact(value[i]):
            return None
        number = PyLong_AsLongAndOverflow(value[i], &overflow)
        if overflow or number < 0 or number > INT32_MAX:
            return None
        ids[i] = <int32_t>number
    return result


cpdef cnp.ndarray token_ids(object value):
    """Ids as dense int32 [n], from a list of ints or a dense int32 or int64 array [n].

    None for anything else and for a number that is no id, which the caller then looks at closely.
    """
    cdef int number
    if type(value) is list:
        return of_list(value)
    if not cnp.PyArray_CheckExact(value):
        return None
    if cnp.PyArray_NDIM(value) != 1 or not cnp.PyArray_ISCARRAY_RO(value):
        return None
    number = cnp.PyArray_TYPE(value)
    if number == cnp.NPY_INT32:
        return of_int32(value)
    return of_int64(value) if number == cnp.NPY_INT64 else None
