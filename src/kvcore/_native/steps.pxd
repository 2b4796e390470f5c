from kvcore._native.blocks cimport Plan
from kvcore._native.capi cimport kv_plan, kv_step


cdef class NativeStep:
    cdef kv_step *step
    cdef list plans
    cdef tuple handles
    cdef readonly tuple sequences
    cdef int close(self) except -1
    cdef Plan wrap(self, const kv_plan *c)
