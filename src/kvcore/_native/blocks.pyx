"""The control plane and the storage of the C core."""

cimport cython
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.string cimport memcpy
cimport numpy as cnp

import numpy as np

from kvcore._native.capi cimport *
from kvcore.errors import CacheCorrupt, InvalidArgument

cnp.import_array()


def format_table():
    """The rows of formats.h by format number, each as its fields; the kind is a number."""
    cdef int i
    cdef const kv_format_info *info
    table = []
    for i in range(KV_FORMAT_COUNT):
        info = kv_format_get_info(i)
        table.append((info.name.decode(), info.kind, info.element_bits,
                      info.element_metadata_bits, info.row_metadata_bytes,
                      info.head_dim_multiple))
    return table


def status_table():
    """The names of all statuses, by number."""
    names = []
    cdef int i = 0
    while True:
        name = kv_status_name(i).decode()
        if name == "UNKNOWN":
            return names
        names.append(name)
        i += 1


cdef class Memory:
    """Aligned memory from the core, through the buffer protocol as writable bytes."""

    def __cinit__(self, size_t nbytes):
        check(kv_memory_allocate(nbytes, &self.data))
        self.nbytes = nbytes

    def __dealloc__(self):
        kv_memory_free(self.data, self.nbytes)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        self.shape[0] = <Py_ssize_t>self.nbytes
        self.strides[0] = 1
        buffer.buf = self.data
        buffer.obj = self
        buffer.len = <Py_ssize_t>self.nbytes
        buffer.itemsize = 1
        buffer.readonly = 0
        buffer.ndim = 1
        buffer.format = b"B"
        buffer.shape = self.shape
        buffer.strides = self.strides
        buffer.suboffsets = NULL
        buffer.internal = NULL

    def __releasebuffer__(self, Py_buffer *buffer):
        pass


cdef class Blocks:
    """K or V of one layer, and the array that it lies in."""

    @staticmethod
    def of_rows(cnp.ndarray rows not None, int format, bint heads_last=False):
        """Of an array [N, H, B, D], or [N, B, H, D] with heads_last, in a float format.

        Its elements are the format's storage type (uint16 for bf16).
        """
        cdef Blocks blocks = Blocks.__new__(Blocks)
        cdef int h = 2 if heads_last else 1
        cdef int b = 1 if heads_last else 2
        blocks.array = rows
        blocks.c.data = cnp.PyArray_DATA(rows)
        blocks.c.format = format
        blocks.c.num_blocks = <int32_t>rows.shape[0]
        blocks.c.num_heads = <int32_t>rows.shape[h]
        blocks.c.block_size = <int32_t>rows.shape[b]
        blocks.c.head_dim = <int32_t>rows.shape[3]
        blocks.c.block_stride = rows.strides[0]
        blocks.c.head_stride = rows.strides[h]
        blocks.c.token_stride = rows.strides[b]
        return blocks

    @staticmethod
    def of_tiles(cnp.ndarray tiles not None, int format, int32_t block_size, int32_t head_dim,
                 Blocks raw=None, int32_t raw_first=0, int32_t raw_last=0,
                 cnp.ndarray bias=None, cnp.ndarray scales=None, bint saturate=False):
        """Of dense tiles, uint8 [N, H, nbytes], in a quantized format.

        bias and scales are dense float32 [H, D]; raw is what raw rows lie in.
        """
        cdef Blocks blocks = Blocks.__new__(Blocks)
        check(kv_blocks_init(&blocks.c, cnp.PyArray_DATA(tiles), format, <int32_t>tiles.shape[0],
                             <int32_t>tiles.shape[1], block_size, head_dim))
        blocks.array = tiles
        blocks.kept = raw, bias, scales
        if raw is not None:
            blocks.c.raw = &raw.c
        if bias is not None:
            blocks.c.bias = <const float *>cnp.PyArray_DATA(bias)
        if scales is not None:
            blocks.c.scales = <const float *>cnp.PyArray_DATA(scales)
        blocks.c.raw_first, blocks.c.raw_last = raw_first, raw_last
        blocks.c.saturate = saturate
        return blocks

    @property
    def num_heads(self):
        return self.c.num_heads

    @property
    def block_size(self):
        return self.c.block_size

    @property
    def head_dim(self):
        return self.c.head_dim

    @property
    def nbytes(self):
        return kv_blocks_nbytes(&self.c)

    @property
    def needs_finite(self):
        """Whether append refuses rows that have a NaN or an infinity."""
        return self.c.metadata_offset > 0 and not self.c.saturate


cdef object copied(const int32_t *data, int64_t count):
    """A NumPy copy, because the step's buffer is used again by later steps."""
    cdef cnp.npy_intp n = count
    cdef cnp.ndarray array = cnp.PyArray_EMPTY(1, &n, cnp.NPY_INT32, 0)
    memcpy(cnp.PyArray_DATA(array), data, count * sizeof(int32_t))
    return array


cdef inline int64_t padded(int64_t count) noexcept:
    """A part of a packed plan begins at a multiple of 16 bytes."""
    return (count + 3) // 4 * 4


cdef int64_t put(cnp.ndarray target, int64_t start, const int32_t *data,
                 int64_t count) except -1:
    """Copies a part of a packed plan and returns where the next begins."""
    cdef int64_t end = start + padded(count)
    if start < 0 or end > target.shape[0]:
        raise InvalidArgument(f"target: expected at least {end} elements, got {target.shape[0]}")
    if count > 0:
        memcpy(<int32_t *>cnp.PyArray_DATA(target) + start, data, count * sizeof(int32_t))
    return end


cdef class Plan:
    """What a step means for one group; see kv_plan in kvcore.h. Properties return copies.

    `raw` is the plan of the group's raw rows, or None.
    """

    def __dealloc__(self):
        PyMem_Free(self.rows)

    @staticmethod
    def from_tables(cnp.ndarray block_tables not None, cnp.ndarray seq_lens not None,
                    cnp.ndarray query_starts not None, int32_t block_size):
        """A plan from a caller's own books: C-contiguous int32 [S, W], [S] and [S + 1]."""
        cdef Plan plan = Plan.__new__(Plan)
        cdef int32_t count = <int32_t>seq_lens.shape[0]
        cdef int64_t width = block_tables.shape[1]
        cdef const int32_t *table = <const int32_t *>cnp.PyArray_DATA(block_tables)
        cdef const int32_t *starts = <const int32_t *>cnp.PyArray_DATA(query_starts)
        cdef int32_t s
        plan.rows = <const int32_t **>PyMem_Malloc((count + 1) * sizeof(int32_t *))
        if plan.rows == NULL:
            raise MemoryError
        for s in range(count):
            plan.rows[s] = table + s * width
            plan.c.max_new = max(plan.c.max_new, starts[s + 1] - starts[s])
        plan.c.block_size = block_size
        plan.c.num_sequences = count
        plan.c.num_tokens = starts[count]
        plan.c.query_starts = starts
        plan.c.seq_lens = <const int32_t *>cnp.PyArray_DATA(seq_lens)
        plan.c.block_rows = plan.rows
        plan.owner = (block_tables, seq_lens, query_starts)
        return plan

    @staticmethod
    def from_slots(cnp.ndarray slots not None, int32_t block_size):
        """A plan that only names the slots of new tokens: C-contiguous int32 [T], for append."""
        cdef Plan plan = Plan.__new__(Plan)
        plan.c.block_size = block_size
        plan.c.num_sequences = 1
        plan.c.num_tokens = plan.c.max_new = <int32_t>slots.shape[0]
        starts = np.array([0, slots.shape[0], slots.shape[0]], np.int32)
        plan.c.query_starts = <const int32_t *>cnp.PyArray_DATA(<cnp.ndarray>starts)
        plan.c.seq_lens = plan.c.query_starts + 2
        plan.c.slots = <const int32_t *>cnp.PyArray_DATA(slots)
        plan.owner = (slots, starts)
        return plan

    @property
    def block_size(self):
        return self.c.block_size

    @property
    def num_sequences(self):
        return self.c.num_sequences

    @property
    def num_tokens(self):
        return self.c.num_tokens

    @property
    def max_new(self):
        return self.c.max_new

    @property
    def num_copies(self):
        return self.c.num_copies

    @property
    def query_starts(self):
        # A closed step's buffer is not its own any more: its plans are empty.
        count = self.c.num_sequences
        return copied(self.c.query_starts, count + 1 if count else 0)

    @property
    def seq_lens(self):
        return copied(self.c.seq_lens, self.c.num_sequences)

    @property
    def slots(self):
        return copied(self.c.slots, self.c.num_tokens)

    @property
    def copies(self):
        return copied(self.c.copies, 3 * self.c.num_copies).reshape(-1, 3)

    @property
    def new_blocks(self):
        return copied(self.c.new_blocks, 3 * self.c.num_new_blocks).reshape(-1, 3)

    @property
    def num_restores(self):
        return self.c.num_restores

    @property
    def restores(self):
        return copied(self.c.restores, 3 * self.c.num_restores).reshape(-1, 3)

    @property
    def buffer(self):
        return copied(self.c.buffer, self.c.buffer_size)

    @property
    def num_columns(self):
        """Blocks of the longest sequence, released ones included; 0 without block tables."""
        cdef int32_t longest = 0
        cdef int32_t s
        if self.c.block_rows == NULL:
            return 0
        for s in range(self.c.num_sequences):
            longest = max(longest, self.c.seq_lens[s])
        return (longest + self.c.block_size - 1) // self.c.block_size

    def packed_size(self, int32_t width):
        """How many elements `pack` writes."""
        cdef int64_t count = self.c.num_sequences
        cdef int64_t slots = self.c.num_tokens if self.c.slots != NULL else 0
        return padded(count + 1) + padded(count) + padded(slots) + padded(count * width)

    def pack(self, cnp.ndarray target not None, int64_t start, int32_t width):
        """Writes the plan into a dense int32 array from `start` on, for another memory.

        width: the block tables' number of columns, at least num_columns; 0 leaves them out.

        Returns:
            Where query_starts [S + 1], seq_lens [S], slots [T] and tables [S, width] begin.
        """
        cdef int64_t count = self.c.num_sequences
        cdef int64_t lens = put(target, start, self.c.query_starts, count + 1)
        cdef int64_t slots = put(target, lens, self.c.seq_lens, count)
        cdef int64_t tables = put(target, slots, self.c.slots,
                                  self.c.num_tokens if self.c.slots != NULL else 0)
        if tables + padded(count * width) > target.shape[0]:
            raise InvalidArgument(
                f"target: expected room for {count} tables of {width}, got {target.shape[0]} "
                "elements in all")
        if width > 0:
            check(kv_plan_block_tables(&self.c, <int32_t *>cnp.PyArray_DATA(target) + tables,
                                       width))
        return start, lens, slots, tables

    def packed_changes_size(self):
        """How many elements `pack_changes` writes."""
        return padded(3 * self.c.num_copies) + padded(3 * self.c.num_restores)

    def pack_changes(self, cnp.ndarray target not None, int64_t start):
        """Writes copies [C, 3] and then restores [R, 3] likewise; returns where they begin."""
        cdef int64_t restores = put(target, start, self.c.copies, 3 * self.c.num_copies)
        put(target, restores, self.c.restores, 3 * self.c.num_restores)
        return start, restores

    @property
    def block_tables(self):
        """[S, W] int32 with the longest sequence's W; -1 beyond a sequence's last block."""
        cdef int32_t width = self.num_columns
        tables = np.empty((self.c.num_sequences, width), np.int32)
        check(kv_plan_block_tables(&self.c, <int32_t *>cnp.PyArray_DATA(<cnp.ndarray>tables),
                                   width))
        return tables


# Ctrl-C can fall between any two instructions of Python, so whatever must be given back belongs to
# an object of C from its first moment, and goes when that is dropped. The core's lock is never held
# while Python code runs, so a drop cannot meet itself.


@cython.no_gc_clear
cdef class SequenceHandle:
    """A sequence. Dropped while live, it is freed; an open step holds its sequences' handles."""

    def __dealloc__(self):
        if self.value != 0:
            kv_sequence_free(self.control.cache, self.value)

    @property
    def is_live(self):
        return self.value != 0


cdef class ControlPlane:
    """Pools, sequences and steps: which token lives in which block."""

    def __cinit__(self, groups, layers):
        """groups: (block_size, num_blocks, retention or 0, slack, raw_blocks, raw_first, raw_last);
        layers: (group, kv_source)."""
        cdef kv_cache_config config
        cdef kv_group_config[16] group_configs
        cdef kv_layer_config *layer_configs
        cdef int i
        if len(groups) > KV_MAX_GROUPS:
            raise InvalidArgument(f"groups: at most {KV_MAX_GROUPS}, got {len(groups)}")
        self.num_groups, self.raw_groups = len(groups), []
        for i, (block_size, num_blocks, retention, slack, *raw) in enumerate(groups):
            raw_blocks, raw_first, raw_last = raw
            if raw_blocks:
                self.raw_groups.append(i)
            group_configs[i] = kv_group_config(block_size, num_blocks, retention, slack,
                                               raw_blocks, raw_first, raw_last)
        layer_configs = <kv_layer_config *>PyMem_Malloc(len(layers) * sizeof(kv_layer_config) + 1)
        if layer_configs == NULL:
            raise MemoryError
        try:
            for i, (group, kv_source) in enumerate(layers):
                layer_configs[i] = kv_layer_config(group, kv_source)
            config.struct_size = sizeof(config)
            config.num_groups = len(groups)
            config.groups = group_configs
            config.num_layers = len(layers)
            config.layers = layer_configs
            check(kv_cache_create(&config, &self.cache))
        finally:
            PyMem_Free(layer_configs)

    def __dealloc__(self):
        kv_cache_destroy(self.cache)

    cdef object raw_of(self, int32_t pool):
        """The group whose raw rows lie in a pool, None when it is a group's own."""
        return self.raw_groups[pool - self.num_groups] if pool >= self.num_groups else None

    def create(self):
        cdef SequenceHandle handle = SequenceHandle.__new__(SequenceHandle)
        handle.control = self
        check(kv_sequence_create(self.cache, &handle.value))
        return handle

    def create_cached(self, cnp.ndarray tokens not None, uint64_t salt):
        """tokens: C-contiguous int32 [n]."""
        cdef SequenceHandle handle = SequenceHandle.__new__(SequenceHandle)
        handle.control = self
        check(kv_sequence_create_cached(self.cache, <const int32_t *>cnp.PyArray_DATA(tokens),
                                        <int32_t>tokens.shape[0], salt, &handle.value))
        return handle

    def fork(self, SequenceHandle source not None, int32_t length):
        cdef SequenceHandle handle = SequenceHandle.__new__(SequenceHandle)
        handle.control = self
        check(kv_sequence_fork(self.cache, source.value, length, &handle.value))
        return handle

    def truncate(self, SequenceHandle sequence not None, int32_t length, bint exact):
        check(kv_sequence_truncate(self.cache, sequence.value, length, exact))

    def free(self, SequenceHandle sequence not None):
        check(kv_sequence_free(self.cache, sequence.value))
        sequence.value = 0

    def length(self, SequenceHandle sequence not None):
        cdef int32_t length
        check(kv_sequence_length(self.cache, sequence.value, &length))
        return length

    def blocks(self, SequenceHandle sequence not None, int32_t group):
        cdef int32_t count
        check(kv_sequence_blocks(self.cache, sequence.value, group, NULL, 0, &count))
        blocks = np.empty(count, np.int32)
        check(kv_sequence_blocks(self.cache, sequence.value, group,
                                 <int32_t *>cnp.PyArray_DATA(<cnp.ndarray>blocks), count, &count))
        return blocks

    def stats(self):
        cdef kv_cache_stats stats
        stats.struct_size = sizeof(stats)
        check(kv_cache_get_stats(self.cache, &stats))
        return stats

    def group_stats(self, int32_t group):
        cdef kv_group_stats stats
        stats.struct_size = sizeof(stats)
        check(kv_cache_get_group_stats(self.cache, group, &stats))
        return stats

    def check(self):
        cdef char[256] message
        cdef kv_status status = kv_cache_check(self.cache, message, sizeof(message))
        if status == KV_ERR_CORRUPT:
            raise CacheCorrupt(message.decode())
        check(status)

    def drop_prefixes(self):
        check(kv_cache_drop_prefixes(self.cache))
