"""Threads and instruction sets."""

from kvcore._native.capi cimport *


cdef list names(const char *const *list_):
    result = []
    cdef int i = 0
    while list_[i] != NULL:
        result.append(list_[i].decode())
        i += 1
    return result


def version():
    return kv_version().decode()


def set_num_threads(int count, bint oversubscribe):
    check(kv_set_num_threads(count, oversubscribe))


def get_num_threads():
    return kv_get_num_threads()


def get_isa():
    return kv_get_isa().decode()


def set_isa(str name not None):
    check(kv_set_isa(name.encode()))


def available_isas():
    return names(kv_available_isas())


def cpu_features():
    return names(kv_cpu_features())
