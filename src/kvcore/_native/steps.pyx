"""Steps: from the entries that a user gives to the transaction that they become."""

import weakref

cimport cython
from cpython.long cimport PyLong_AsLongAndOverflow, PyLong_CheckExact
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.stdint cimport INT32_MAX, int32_t
cimport numpy as cnp

from kvcore._native.blocks cimport ControlPlane, Plan, SequenceHandle
from kvcore._native.capi cimport *
from kvcore._native.tokens cimport token_ids
from kvcore.errors import InvalidArgument, OutOfBlocks

cnp.import_array()


@cython.no_gc_clear
cdef class NativeStep:
    """An open step. Dropped while open, it rolls back."""

    # The garbage collector empties lists and objects of a dead cycle in any order, but no tuples:
    # the sequences of a step that is dropped in one outlive its rollback.

    def __dealloc__(self):
        if self.step != NULL:
            kv_step_rollback(self.step)

    cdef int close(self) except -1:
        self.step = NULL
        for reference in self.plans:
            plan = reference()
            if plan is None:
                continue
            (<Plan>plan).c.num_sequences = 0
            (<Plan>plan).c.num_tokens = 0
            (<Plan>plan).c.num_copies = 0
            (<Plan>plan).c.num_new_blocks = 0
            (<Plan>plan).c.num_restores = 0
            (<Plan>plan).c.buffer_size = 0
            (<Plan>plan).c.raw = NULL
        return 0

    @property
    def is_open(self):
        return self.step != NULL

    def commit(self):
        cdef kv_step *step = self.step
        self.close()
        check(kv_step_commit(step))

    def rollback(self):
        cdef kv_step *step = self.step
        self.close()
        check(kv_step_rollback(step))

    def check_append(self, int32_t layer):
        check(kv_step_check_append(self.step, layer))

    def mark_appended(self, int32_t layer):
        check(kv_step_mark_appended(self.step, layer))

    def missing_layers(self):
        """The layers that own storage and were not appended yet."""
        cdef int32_t layer = 0
        cdef kv_status status = KV_OK
        layers = []
        while status != KV_ERR_RANGE:
            status = kv_step_check_append(self.step, layer)
            if status == KV_OK:
                layers.append(layer)
            layer += 1
        return layers

    def check_attend(self, int32_t layer):
        check(kv_step_check_attend(self.step, layer))

    def plan(self, int32_t group):
        cdef kv_plan plan
        check(kv_step_get_plan(self.step, group, &plan))
        return self.wrap(&plan)

    cdef Plan wrap(self, const kv_plan *c):
        cdef Plan plan = Plan.__new__(Plan)
        plan.c = c[0]
        plan.raw = self.wrap(c.raw) if c.raw != NULL else None
        plan.owner = self
        # Weakly, as the plan holds the step: a cycle would keep an abandoned step's sequences
        # locked until the next garbage collection.
        self.plans.append(weakref.ref(plan))
        return plan


cdef int32_t count_of(object new):
    """`new` as a number of new tokens, 0 when it is not a plain int from 1."""
    cdef int overflow = 0
    cdef long long count
    if not PyLong_CheckExact(new):
        return 0
    count = PyLong_AsLongAndOverflow(new, &overflow)
    return <int32_t>count if not overflow and 0 < count <= INT32_MAX else 0


cdef int note_tokens(cnp.ndarray tokens, kv_step_entry *out, list ids) except -1:
    ids.append(tokens)
    out.num_new = <int32_t>tokens.shape[0]
    out.tokens = <const int32_t *>cnp.PyArray_DATA(tokens)
    return 0


cdef object plain_entry(object entry, ControlPlane control, kv_step_entry *out, list ids):
    """Fills `out` and returns the sequence, or None for an entry of another than the usual form.

    Usual is the tuple of a live sequence of this cache and a plain int, or ids as `token_ids` has
    them. `out` points into what is added to `ids`.
    """
    cdef SequenceHandle handle
    cdef cnp.ndarray tokens
    if type(entry) is not tuple or len(<tuple>entry) != 2:
        return None
    sequence = (<tuple>entry)[0]
    found = getattr(sequence, "_handle", None)
    if type(found) is not SequenceHandle:
        return None
    handle = found
    if handle.control is not control or handle.value == 0:
        return None
    out.sequence = handle.value
    out.num_new = count_of((<tuple>entry)[1])
    out.tokens = NULL
    if out.num_new == 0:
        tokens = token_ids((<tuple>entry)[1])
        if tokens is None or not 0 < tokens.shape[0] <= INT32_MAX:
            return None
        note_tokens(tokens, out, ids)
    return sequence


cdef object checked_entry(object checked, kv_step_entry *out, list ids):
    """As `plain_entry`, from what `read_entry` made of an entry."""
    cdef cnp.ndarray tokens
    sequence, count, tokens = checked
    out.sequence = (<SequenceHandle?>sequence._handle).value
    out.num_new = count
    out.tokens = NULL
    if tokens is not None:
        note_tokens(tokens, out, ids)
    return sequence


def begin(ControlPlane control not None, tuple entries not None, read_entry):
    """Reserves slots for (sequence, number of new tokens or token ids) entries, or changes nothing.

    Entries of the usual form are read here. Any other goes to read_entry(place, entry), which
    raises, or returns (sequence, count, ids or None) with dense int32 ids.
    """
    cdef NativeStep step = NativeStep.__new__(NativeStep)
    cdef int32_t count = <int32_t>len(entries)
    cdef kv_shortage shortage
    cdef kv_status status
    cdef int32_t i
    cdef kv_step_entry *c_entries = <kv_step_entry *>PyMem_Malloc(count * sizeof(kv_step_entry) + 1)
    if c_entries == NULL:
        raise MemoryError
    sequences = []
    handles = []
    ids = []
    try:
        for i in range(count):
            sequence = plain_entry(entries[i], control, &c_entries[i], ids)
            if sequence is None:
                sequence = checked_entry(read_entry(i, entries[i]), &c_entries[i], ids)
            sequences.append(sequence)
            handles.append(sequence._handle)
        status = kv_step_begin(control.cache, c_entries, count, &step.step, &shortage)
    finally:
        PyMem_Free(c_entries)
    if status == KV_ERR_OUT_OF_BLOCKS:
        raise OutOfBlocks(shortage.group, shortage.needed, shortage.available,
                          control.raw_of(shortage.group))
    if status == KV_ERR_DUPLICATE_SEQUENCE:
        raise InvalidArgument(duplicate(sequences))
    check(status)
    step.plans = []
    step.sequences = tuple(sequences)
    step.handles = tuple(handles)
    return step


cdef str duplicate(list sequences):
    places = {}
    for i, sequence in enumerate(sequences):
        first = places.setdefault(sequence, i)
        if first != i:
            break
    return f"entries: expected each sequence once, but entries {first} and {i} are the same"
