# The C door (kvcore.h) as Cython sees it.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t


cdef extern from "kvcore/kvcore.h" nogil:
    ctypedef int kv_status
    kv_status KV_OK
    kv_status KV_ERR_RANGE
    kv_status KV_ERR_OUT_OF_BLOCKS
    kv_status KV_ERR_DUPLICATE_SEQUENCE
    kv_status KV_ERR_CORRUPT
    kv_status KV_ERR_NOT_FINITE
    const char *kv_status_name(kv_status status)
    const char *kv_status_string(kv_status status)
    const char *kv_version()

    ctypedef int kv_format
    int KV_FORMAT_COUNT
    ctypedef int kv_format_kind
    ctypedef struct kv_format_info:
        const char *name
        kv_format_kind kind
        int32_t element_bits
        int32_t element_metadata_bits
        int32_t row_metadata_bytes
        int32_t head_dim_multiple
    const kv_format_info *kv_format_get_info(kv_format format)

    ctypedef int kv_dtype
    kv_dtype KV_DTYPE_F32
    kv_dtype KV_DTYPE_F16
    kv_dtype KV_DTYPE_BF16

    # ---- control plane
    ctypedef struct kv_cache:
        pass
    ctypedef struct kv_step:
        pass
    ctypedef uint64_t kv_sequence

    int KV_MAX_GROUPS
    ctypedef struct kv_group_config:
        int32_t block_size
        int32_t num_blocks
        int32_t retention
        int32_t slack
        int32_t raw_blocks
        int32_t raw_first
        int32_t raw_last
    ctypedef struct kv_layer_config:
        int32_t group
        int32_t kv_source
    ctypedef struct kv_cache_config:
        size_t struct_size
        int32_t num_groups
        const kv_group_config *groups
        int32_t num_layers
        const kv_layer_config *layers
    kv_status kv_cache_create(const kv_cache_config *config, kv_cache **out)
    kv_status kv_cache_destroy(kv_cache *cache)

    ctypedef struct kv_cache_stats:
        size_t struct_size
        int64_t num_sequences
        int64_t open_steps
        int64_t prefix_queries
        int64_t prefix_hits
        int64_t prefix_hit_tokens
    ctypedef struct kv_group_stats:
        size_t struct_size
        int32_t total
        int32_t in_use
        int32_t cached
        int32_t free
        int64_t allocations
        int64_t evictions
        int64_t copies
        int64_t released
        int64_t reencoded_rows
    kv_status kv_cache_get_stats(const kv_cache *cache, kv_cache_stats *out)
    kv_status kv_cache_get_group_stats(const kv_cache *cache, int32_t group, kv_group_stats *out)
    kv_status kv_cache_check(const kv_cache *cache, char *message, size_t message_size)
    kv_status kv_cache_drop_prefixes(kv_cache *cache)

    kv_status kv_sequence_create(kv_cache *cache, kv_sequence *out)
    kv_status kv_sequence_create_cached(kv_cache *cache, const int32_t *tokens,
                                        int32_t num_tokens, uint64_t salt, kv_sequence *out)
    kv_status kv_sequence_fork(kv_cache *cache, kv_sequence source, int32_t length,
                               kv_sequence *out)
    kv_status kv_sequence_truncate(kv_cache *cache, kv_sequence sequence, int32_t length,
                                   int32_t exact)
    kv_status kv_sequence_free(kv_cache *cache, kv_sequence sequence)
    kv_status kv_sequence_length(const kv_cache *cache, kv_sequence sequence, int32_t *out)
    kv_status kv_sequence_blocks(const kv_cache *cache, kv_sequence sequence, int32_t group,
                                 int32_t *out, int32_t capacity, int32_t *count)

    ctypedef struct kv_step_entry:
        kv_sequence sequence
        int32_t num_new
        const int32_t *tokens
    ctypedef struct kv_shortage:
        int32_t group
        int64_t needed
        int64_t available
    kv_status kv_step_begin(kv_cache *cache, const kv_step_entry *entries, int32_t num_entries,
                            kv_step **out, kv_shortage *shortage)
    kv_status kv_step_commit(kv_step *step)
    kv_status kv_step_rollback(kv_step *step)
    kv_status kv_step_check_append(const kv_step *step, int32_t layer)
    kv_status kv_step_mark_appended(kv_step *step, int32_t layer)
    kv_status kv_step_check_attend(const kv_step *step, int32_t layer)

    ctypedef struct kv_plan:
        int32_t block_size
        int32_t num_sequences
        int32_t num_tokens
        int32_t max_new
        const int32_t *query_starts
        const int32_t *seq_lens
        const int32_t *slots
        int32_t num_copies
        const int32_t *copies
        int32_t num_new_blocks
        const int32_t *new_blocks
        const int32_t *const *block_rows
        const int32_t *buffer
        int64_t buffer_size
        const kv_plan *raw
        int32_t num_restores
        const int32_t *restores
    kv_status kv_step_get_plan(const kv_step *step, int32_t group, kv_plan *out)
    kv_status kv_plan_block_tables(const kv_plan *plan, int32_t *out, int32_t width)

    # ---- data plane
    ctypedef struct kv_blocks:
        void *data
        kv_format format
        int32_t num_blocks
        int32_t num_heads
        int32_t block_size
        int32_t head_dim
        int64_t block_stride
        int64_t head_stride
        int64_t token_stride
        int64_t metadata_offset
        const float *bias
        const float *scales
        const kv_blocks *raw
        int32_t raw_first
        int32_t raw_last
        int32_t saturate
    kv_status kv_blocks_init(kv_blocks *out, void *data, kv_format format, int32_t num_blocks,
                             int32_t num_heads, int32_t block_size, int32_t head_dim)
    int64_t kv_blocks_nbytes(const kv_blocks *blocks)
    kv_status kv_memory_allocate(size_t nbytes, void **out)
    void kv_memory_free(void *memory, size_t nbytes)

    ctypedef struct kv_rows:
        void *data
        kv_dtype dtype
        int32_t num_heads
        int32_t head_dim
        int32_t padded_length
        int64_t sequence_stride
        int64_t token_stride
        int64_t head_stride
    kv_status kv_copy_blocks(const kv_plan *plan, const kv_blocks *blocks)
    kv_status kv_restore_raw(const kv_plan *plan, const kv_blocks *blocks)
    kv_status kv_check_finite(const kv_plan *plan, const kv_rows *rows, int32_t *token,
                              int32_t *head)
    kv_status kv_append(const kv_plan *plan, const kv_rows *rows, const kv_blocks *blocks)
    ctypedef struct kv_read_source:
        const int32_t *block_row
        int32_t num_columns
        const int32_t *raw_row
        int32_t num_raw_columns
        int32_t length
    kv_status kv_read(const kv_blocks *blocks, const kv_read_source *sequence, int32_t start,
                      int32_t stop, const kv_rows *out)

    ctypedef struct kv_attend_options:
        size_t struct_size
        float scale
        int32_t exact
        int32_t non_causal
        int32_t window
        float softcap
        const float *alibi_slopes
        const int32_t *positions
        const uint8_t *mask
        int64_t mask_size
        const int64_t *mask_offsets
        const float *sinks
    kv_status kv_attend(const kv_plan *plan, const kv_rows *q, const kv_blocks *k,
                        const kv_blocks *v, const kv_attend_options *options,
                        const kv_rows *out, float *lse)
    kv_status kv_plan_check_sight(const kv_plan *plan, int32_t num_blocks,
                                  const kv_attend_options *options)
    kv_status kv_merge_states(const float *outs, const float *lses, int32_t num_partials,
                              int64_t num_rows, int32_t head_dim, float *out, float *lse)
    ctypedef struct kv_channels:
        const float *bias
        const float *scales
    kv_status kv_quantize(const void *rows, kv_dtype dtype, kv_format format, int64_t num_rows,
                          int32_t head_dim, const kv_channels *channels, void *out)
    kv_status kv_dequantize(const void *codes, kv_format format, int64_t num_rows,
                            int32_t head_dim, const kv_channels *channels, kv_dtype dtype,
                            void *out)
    kv_status kv_linear(const float *x, int64_t x_stride, const float *w, int64_t w_stride,
                        const float *bias, float *y, int64_t y_stride, int32_t num_rows,
                        int32_t num_outputs, int32_t num_inputs)

    # ---- the machine
    kv_status kv_set_num_threads(int32_t num_threads, int32_t oversubscribe)
    int32_t kv_get_num_threads()
    const char *kv_get_isa()
    kv_status kv_set_isa(const char *name)
    const char *const *kv_available_isas()
    const char *const *kv_cpu_features()


cdef inline int check(kv_status status) except -1:
    """Raises what errors.STATUS_EXCEPTIONS says a status becomes."""
    if status == KV_OK:
        return 0
    from kvcore.errors import STATUS_EXCEPTIONS
    name = kv_status_name(status).decode()
    raise STATUS_EXCEPTIONS[name](kv_status_string(status).decode())
