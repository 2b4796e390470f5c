from libc.stdint cimport int32_t, uint64_t
cimport numpy as cnp

from kvcore._native.capi cimport kv_blocks, kv_cache, kv_plan


cdef class Memory:
    cdef void *data
    cdef size_t nbytes
    cdef Py_ssize_t[1] shape
    cdef Py_ssize_t[1] strides


cdef class Blocks:
    cdef kv_blocks c
    cdef readonly cnp.ndarray array
    cdef object kept  # what the core's struct points to


cdef class Plan:
    cdef kv_plan c
    cdef const int32_t **rows
    cdef object owner
    cdef readonly Plan raw
    cdef public object device  # where a backend keeps what it made of the plan
    cdef object __weakref__


cdef class SequenceHandle:
    cdef ControlPlane control
    cdef uint64_t value


cdef class ControlPlane:
    cdef kv_cache *cache
    cdef list raw_groups  # the groups that have raw rows
    cdef int num_groups
    cdef object raw_of(self, int32_t pool)
