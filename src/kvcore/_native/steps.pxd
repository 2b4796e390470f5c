from kvcore._native.capi cimport kv_step


cdef class NativeStep:
    cdef kv_step *step
    cdef list plans
    cdef tuple handles
    cdef readonly tuple sequences
    cdef int close(self) except -1
