/* kvcore: the KV-cache core of an LLM inference engine.
 *
 * Two planes. The control plane (kv_cache, sequences, steps) decides which token lives in which
 * block and knows no dtype. The data plane (kv_append, kv_attend, ...) are functions without state
 * over buffers that the caller owns and a plan that a step made.
 *
 * Conventions: every function that can fail returns a kv_status and then has changed nothing; index
 * arrays are int32; strides are counted in elements for kv_rows and in bytes for kv_blocks; a
 * struct_size field holds sizeof the struct as the caller compiled it. Control-plane functions may
 * be called from any thread; a step belongs to one thread at a time.
 */
#ifndef KVCORE_H
#define KVCORE_H

#include <stddef.h>
#include <stdint.h>

#include "formats.h"

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define KV_API
#else
#define KV_API __attribute__((visibility("default")))
#endif

/* ---- status ---------------------------------------------------------------------------------- */

#define KV_STATUSES(KV_STATUS)                                                           \
    KV_STATUS(OK, "ok")                                                                  \
    KV_STATUS(ERR_NULL, "a required pointer is NULL")                                    \
    KV_STATUS(ERR_VALUE, "an argument has a value that no call accepts")                 \
    KV_STATUS(ERR_RANGE, "an index is outside its range")                                \
    KV_STATUS(ERR_OVERFLOW, "a size or length does not fit its type")                    \
    KV_STATUS(ERR_UNSUPPORTED, "this build or CPU has no code for the request")          \
    KV_STATUS(ERR_NO_MEMORY, "the system gave no memory")                                \
    KV_STATUS(ERR_OUT_OF_BLOCKS, "a pool has too few blocks")                            \
    KV_STATUS(ERR_STALE_SEQUENCE, "the sequence was freed")                              \
    KV_STATUS(ERR_FOREIGN_SEQUENCE, "the sequence belongs to another cache")             \
    KV_STATUS(ERR_SEQUENCE_BUSY, "the sequence is in an open step")                      \
    KV_STATUS(ERR_DUPLICATE_SEQUENCE, "the sequence stands twice in one step")           \
    KV_STATUS(ERR_STEP_CLOSED, "the step was committed or rolled back")                  \
    KV_STATUS(ERR_STEP_INCOMPLETE, "a layer was not appended; the step was rolled back") \
    KV_STATUS(ERR_ALREADY_APPENDED, "the layer was already appended in this step")       \
    KV_STATUS(ERR_NOT_APPENDED, "the layer was not appended in this step yet")           \
    KV_STATUS(ERR_NO_STORAGE, "the layer reads another layer's cache and owns none")     \
    KV_STATUS(ERR_RELEASED, "rows that the call needs were released")                    \
    KV_STATUS(ERR_CORRUPT, "the cache's books do not balance")                           \
    KV_STATUS(ERR_NOT_FINITE, "a NaN or an infinity, which quantized formats cannot hold")

typedef enum kv_status {
#define KV_STATUS_ENUM(ID, message) KV_##ID,
    KV_STATUSES(KV_STATUS_ENUM)
#undef KV_STATUS_ENUM
        KV_STATUS_COUNT
} kv_status;

/* "OUT_OF_BLOCKS" and the like for programs, a sentence for people. */
KV_API const char *kv_status_name(kv_status status);
KV_API const char *kv_status_string(kv_status status);
KV_API const char *kv_version(void);

/* ---- formats and dtypes ---------------------------------------------------------------------- */

typedef enum kv_format {
#define KV_FORMAT_ENUM(ID, ...) KV_FORMAT_##ID,
    KV_FORMATS(KV_FORMAT_ENUM)
#undef KV_FORMAT_ENUM
        KV_FORMAT_COUNT
} kv_format;

/* How tokens are encoded: as floats, each row alone, or in groups of 32 tokens channel by channel. */
typedef enum kv_format_kind { KV_KIND_FLOAT, KV_KIND_ROW, KV_KIND_CHANNEL } kv_format_kind;

/* A token of one head takes head_dim * (element_bits + element_metadata_bits) / 8 +
 * row_metadata_bytes bytes. head_dim is a multiple of head_dim_multiple. */
typedef struct kv_format_info {
    const char *name;
    kv_format_kind kind;
    int32_t element_bits;
    int32_t element_metadata_bits;
    int32_t row_metadata_bytes;
    int32_t head_dim_multiple;
} kv_format_info;

/* NULL when `format` is not one. */
KV_API const kv_format_info *kv_format_get_info(kv_format format);

/* What callers hand in and get back. */
typedef enum kv_dtype { KV_DTYPE_F32, KV_DTYPE_F16, KV_DTYPE_BF16, KV_DTYPE_COUNT } kv_dtype;

/* ---- control plane: the cache ---------------------------------------------------------------- */

typedef struct kv_cache kv_cache;
typedef struct kv_step kv_step;
typedef uint64_t kv_sequence; /* a handle tagged with its cache and generation; 0 is none */

#define KV_MAX_GROUPS 16 /* groups and raw pools together */

/* With a retention of r, a new token at i reads only tokens j with i - r < j <= i, as a window of r
 * or less does. A commit at length n then releases the blocks that lie wholly below
 * n - r + 1 - slack: their columns in the block tables are -1 from then on.
 *
 * Raw rows are for groups with quantized layers. A new token at i reads the rows of tokens
 * j < raw_first and j >= 32 * ((i + 1) / 32) - raw_last as they came, and those between encoded. A
 * group with raw_blocks keeps these rows in a pool of its own, of blocks of KV_RAW_BLOCK_SIZE
 * tokens. Raw pools are numbered after the groups, in the groups' order, and have statistics, block
 * tables and plans under these numbers. One behaves like a group with a retention of raw_last whose
 * first block stays, except that truncate and fork never fail for its sake: the rows that a
 * sequence lacks are restored when its next step begins, see kv_plan. */
typedef struct kv_group_config {
    int32_t block_size; /* token slots of a block: a power of two, 16 .. 4096 */
    int32_t num_blocks;
    int32_t retention;  /* 0: every token is kept */
    int32_t slack;      /* tokens (and raw rows) kept beyond, which truncate and fork may then take
                           back */
    int32_t raw_blocks; /* 0: the group has no raw rows */
    int32_t raw_first;  /* 0 .. KV_RAW_BLOCK_SIZE */
    int32_t raw_last; /* a multiple of KV_RAW_BLOCK_SIZE; at 0 those of an unfinished block stay */
} kv_group_config;

#define KV_RAW_BLOCK_SIZE 32

typedef struct kv_layer_config {
    int32_t group;
    int32_t kv_source; /* the layer whose cache it reads: its own index, or a lower one's */
} kv_layer_config;

typedef struct kv_cache_config {
    size_t struct_size;
    int32_t num_groups; /* 1 .. KV_MAX_GROUPS */
    const kv_group_config *groups;
    int32_t num_layers;
    const kv_layer_config *layers;
} kv_cache_config;

KV_API kv_status kv_cache_create(const kv_cache_config *config, kv_cache **out);
/* Frees the cache with its sequences. No step may be open: KV_ERR_SEQUENCE_BUSY otherwise. */
KV_API kv_status kv_cache_destroy(kv_cache *cache);

typedef struct kv_cache_stats {
    size_t struct_size;
    int64_t num_sequences;
    int64_t open_steps;
    int64_t prefix_queries;    /* sequences created with tokens to look up */
    int64_t prefix_hits;       /* ... that found at least one block */
    int64_t prefix_hit_tokens; /* tokens adopted from cached blocks */
} kv_cache_stats;

typedef struct kv_group_stats {
    size_t struct_size;
    int32_t total, in_use, cached, free; /* in_use + cached + free = total */
    int64_t allocations;                 /* blocks handed out so far */
    int64_t evictions;                   /* cached blocks given up for new ones */
    int64_t copies;                      /* blocks copied on write */
    int64_t released;                    /* columns released behind the retention */
    int64_t reencoded_rows;              /* raw rows restored from encoded ones, see kv_plan */
} kv_group_stats;

KV_API kv_status kv_cache_get_stats(const kv_cache *cache, kv_cache_stats *out);
/* Of a group or a raw pool, by number. */
KV_API kv_status kv_cache_get_group_stats(const kv_cache *cache, int32_t group,
                                          kv_group_stats *out);
/* Recounts everything from the sequences up. On KV_ERR_CORRUPT the message says what is wrong. */
KV_API kv_status kv_cache_check(const kv_cache *cache, char *message, size_t message_size);
/* Gives every cached block back: forgets all prefixes that no sequence holds. */
KV_API kv_status kv_cache_drop_prefixes(kv_cache *cache);

/* ---- control plane: sequences ---------------------------------------------------------------- */

KV_API kv_status kv_sequence_create(kv_cache *cache, kv_sequence *out);
/* A sequence that starts with the longest cached prefix of `tokens`, at most num_tokens - 1 of
 * them, so that one is left to compute. Only prefixes published under the same salt match. */
KV_API kv_status kv_sequence_create_cached(kv_cache *cache, const int32_t *tokens,
                                           int32_t num_tokens, uint64_t salt, kv_sequence *out);
/* A sequence that shares the first `length` tokens of `source`; -1 means all of them.
 * KV_ERR_RELEASED, here and from truncate: at that length the next token would read tokens that a
 * group's retention has released; or, where `exact` is not 0, raw rows that would be restored. */
KV_API kv_status kv_sequence_fork(kv_cache *cache, kv_sequence source, int32_t length,
                                  kv_sequence *out);
KV_API kv_status kv_sequence_truncate(kv_cache *cache, kv_sequence sequence, int32_t length,
                                      int32_t exact);
KV_API kv_status kv_sequence_free(kv_cache *cache, kv_sequence sequence);
KV_API kv_status kv_sequence_length(const kv_cache *cache, kv_sequence sequence, int32_t *out);
/* Writes at most `capacity` block numbers of one group or raw pool; *count is how many there are.
 * Columns that were released are -1. */
KV_API kv_status kv_sequence_blocks(const kv_cache *cache, kv_sequence sequence, int32_t group,
                                    int32_t *out, int32_t capacity, int32_t *count);

/* ---- control plane: steps -------------------------------------------------------------------- */

typedef struct kv_step_entry {
    kv_sequence sequence;
    int32_t num_new;       /* > 0 */
    const int32_t *tokens; /* [num_new] token ids, or NULL: the new blocks are then never published
                              for prefix reuse */
} kv_step_entry;

typedef struct kv_shortage {
    int32_t group; /* or a raw pool's number */
    int64_t needed;
    int64_t available; /* free + cached */
} kv_shortage;

/* Reserves slots for every entry or changes nothing. `shortage` may be NULL; it is filled with
 * KV_ERR_OUT_OF_BLOCKS. */
KV_API kv_status kv_step_begin(kv_cache *cache, const kv_step_entry *entries, int32_t num_entries,
                               kv_step **out, kv_shortage *shortage);
/* Commit makes the new lengths visible and rollback drops them; both close the step and end the
 * life of its plans. A commit that returns KV_ERR_STEP_INCOMPLETE has rolled back. */
KV_API kv_status kv_step_commit(kv_step *step);
KV_API kv_status kv_step_rollback(kv_step *step);

/* Each layer that owns storage is appended exactly once a step: check before, mark after. */
KV_API kv_status kv_step_check_append(const kv_step *step, int32_t layer);
KV_API kv_status kv_step_mark_appended(kv_step *step, int32_t layer);
KV_API kv_status kv_step_check_attend(const kv_step *step, int32_t layer);

/* What a step means for one group or raw pool. All arrays but block_rows lie in one int32 buffer
 * (`buffer`, `buffer_size` elements) that the step owns, the same for all its plans.
 *
 * Restores are for a raw pool: rows that the next token reads raw, but that a truncate or fork left
 * released. After the copies and before anything else, the first `rows` rows of that column's block
 * are to be decoded from the group's own blocks, except where these were released too. */
typedef struct kv_plan {
    int32_t block_size;
    int32_t num_sequences;            /* S */
    int32_t num_tokens;               /* T = query_starts[S] */
    int32_t max_new;                  /* the largest number of new tokens of one sequence */
    const int32_t *query_starts;      /* [S + 1] where each sequence's new tokens start */
    const int32_t *seq_lens;          /* [S] stored + new tokens */
    const int32_t *slots;             /* [T] block * block_size + offset of each new token */
    int32_t num_copies;               /* C */
    const int32_t *copies;            /* [C, 3] from block, to block, rows: before any write */
    int32_t num_new_blocks;           /* M */
    const int32_t *new_blocks;        /* [M, 3] sequence's place in the step, column, block: what
                                     changed in the block tables since the last step, but for
                                     released columns, which nothing reads any more */
    const int32_t *const *block_rows; /* [S] each sequence's blocks, in order; -1: released */
    const int32_t *buffer;
    int64_t buffer_size;
    const struct kv_plan *raw; /* the plan of the group's raw rows, as long as this one; or NULL */
    int32_t num_restores;      /* R */
    const int32_t *restores;   /* [R, 3] sequence's place in the step, column, rows */
} kv_plan;

KV_API kv_status kv_step_get_plan(const kv_step *step, int32_t group, kv_plan *out);
/* The block tables as one array [S, width], -1 beyond a sequence's last block and where the group's
 * retention released it. `width` must be at least the longest sequence's number of blocks. */
KV_API kv_status kv_plan_block_tables(const kv_plan *plan, int32_t *out, int32_t width);

/* ---- data plane: storage --------------------------------------------------------------------- */

/* K or V of one layer, [num_blocks, num_heads, block_size, head_dim], by strides in bytes. The
 * elements of one row are dense.
 *
 * In a quantized format a block and head are a tile: the codes of its tokens without gaps, then at
 * metadata_offset their metadata without gaps. docs/formats.md says what they are.
 *
 * Of quantized tokens some are read raw, as bfloat16: a query stored at i sees key j so if
 * j < raw_first or j >= (i + 1) / 32 * 32 - raw_last. `raw` has these rows, in blocks of 32 tokens
 * that plan->raw places.
 *
 * Where V is the first elements of K and stored there alone (multi-head latent attention), V is a
 * copy of K's kv_blocks with the smaller head_dim. kv_attend and kv_read take it like any other;
 * kv_append and kv_copy_blocks are called for K only. */
typedef struct kv_blocks {
    void *data;
    kv_format format;
    int32_t num_blocks, num_heads, block_size, head_dim;
    int64_t block_stride, head_stride, token_stride;
    int64_t metadata_offset;     /* from the start of a tile; 0 for fp32, fp16 and bf16 */
    const float *bias;           /* [H, D] subtracted before encoding; NULL: none */
    const float *scales;         /* [H, D] of int8_static; NULL in other formats */
    const struct kv_blocks *raw; /* bf16, with block_size 32; NULL: every token is read encoded */
    int32_t raw_first, raw_last; /* raw_last is a multiple of 32 */
    int32_t saturate; /* non-zero: append takes NaN as 0 and infinity as 65504, else it fails */
} kv_blocks;

/* Fills `out` for a dense buffer, [N, H, B, D] or tiles; data may be NULL to learn the sizes. */
KV_API kv_status kv_blocks_init(kv_blocks *out, void *data, kv_format format, int32_t num_blocks,
                                int32_t num_heads, int32_t block_size, int32_t head_dim);
KV_API int64_t kv_blocks_nbytes(const kv_blocks *blocks);

/* Memory aligned to 64 bytes, backed by large pages where the system has them, zeroed when first
 * touched. */
KV_API kv_status kv_memory_allocate(size_t nbytes, void **out);
KV_API void kv_memory_free(void *memory, size_t nbytes);

/* ---- data plane: operations ------------------------------------------------------------------ */

/* New rows of a step, [T, H, D] ragged or [S, padded_length, H, D] padded, by strides in elements;
 * the last axis is dense. Token i of sequence s lies at
 *   ragged: (query_starts[s] + i) * token_stride
 *   padded: s * sequence_stride + i * token_stride */
typedef struct kv_rows {
    void *data;
    kv_dtype dtype;
    int32_t num_heads, head_dim;
    int32_t padded_length; /* 0: ragged */
    int64_t sequence_stride, token_stride, head_stride;
} kv_rows;

/* Runs plan->copies on one array of blocks. */
KV_API kv_status kv_copy_blocks(const kv_plan *plan, const kv_blocks *blocks);

/* Decodes the raw rows that plan->raw->restores names from the encoded ones. */
KV_API kv_status kv_restore_raw(const kv_plan *plan, const kv_blocks *blocks);

/* KV_ERR_NOT_FINITE if a new row has a NaN or an infinity; *token, *head say where the first is. */
KV_API kv_status kv_check_finite(const kv_plan *plan, const kv_rows *rows, int32_t *token,
                                 int32_t *head);

/* Encodes rows into the plan's slots. Call once for K and once for V. A slot of -1 is skipped.
 * KV_ERR_NOT_FINITE, with nothing stored: quantized formats have no code for such a row. */
KV_API kv_status kv_append(const kv_plan *plan, const kv_rows *rows, const kv_blocks *blocks);

/* One sequence as its next token would read it. */
typedef struct kv_read_source {
    const int32_t *block_row; /* [num_columns] the sequence's blocks */
    int32_t num_columns;
    const int32_t *raw_row; /* [num_raw_columns] those of its raw rows; NULL: there are none */
    int32_t num_raw_columns;
    int32_t length; /* tokens that it holds, for raw rows */
} kv_read_source;

/* Decodes tokens [start, stop) into rows [stop - start, H, D] (ragged, `out` with padded_length 0).
 * Raw rows that were lost are read encoded. */
KV_API kv_status kv_read(const kv_blocks *blocks, const kv_read_source *sequence, int32_t start,
                         int32_t stop, const kv_rows *out);

/* In the order in which they act. A struct_size that ends before a field leaves that option off, as
 * 0 and NULL do; scale and exact are required. i is a query's position and j a key's: positions[t]
 * for those of the plan's new tokens, or else where the token is stored, counted from 0. */
typedef struct kv_attend_options {
    size_t struct_size;
    float scale;   /* s = (q . k) * scale */
    int32_t exact; /* non-zero: never take a path whose bits depend on how a prompt was chunked, as
                      bf16 dot products are for sequences with 32 new tokens or more */
    int32_t non_causal;        /* non-zero: a sequence's tokens all see all of it */
    int32_t window;            /* only keys with i - window < j <= i are seen; 0: off */
    float softcap;             /* s = softcap * tanh(s / softcap); 0: off */
    const float *alibi_slopes; /* [Hq] s -= slope * (i - j) */
    const int32_t *positions;  /* [T], from 0: for alibi_slopes and window */
    const uint8_t *mask;       /* mask_size bytes. A new token has a row of (seq_len + 7) / 8 bytes,
                                  with bit j % 8 of byte j / 8 set if it sees key j */
    int64_t mask_size;
    const int64_t *mask_offsets; /* [S] the byte where a sequence's rows start, which stand instead
                                    of causality; -1: it has none */
    const float *sinks; /* [Hq] one more logit in the softmax's denominator, with no value */
} kv_attend_options;

/* Attention of the plan's new tokens over everything their sequences hold: causal and bottom-right
 * aligned, unless options say otherwise. q and out: [T, Hq, D] and [T, Hq, Dv]; Hq is a multiple of
 * the blocks' num_heads. Blocks with which several sequences of few new tokens begin are read once
 * for all of them. Padding of `out` is set to zero. lse: [T, Hq], natural logarithm, sinks
 * included, or NULL. A row that sees nothing has out 0 and lse -inf, or its sink.
 *
 * Only those of a sequence's blocks are looked at that hold a token which one of its new tokens sees,
 * or lie between two of them. KV_ERR_RELEASED: one of these is -1; nothing has been read then.
 *
 * K and V in one contiguous array need no copy: blocks may overlap. With block_stride =
 * token_stride, a block_size (a power of two) of at least the longest sequence and one block for
 * each sequence, the number of its first token, a sequence's rows are the array's own. */
KV_API kv_status kv_attend(const kv_plan *plan, const kv_rows *q, const kv_blocks *k,
                           const kv_blocks *v, const kv_attend_options *options, const kv_rows *out,
                           float *lse);

/* What kv_attend checks of the blocks before it reads one, for a backend whose device cannot say
 * it: KV_ERR_RELEASED if a new token sees a block that is -1, KV_ERR_RANGE if one is outside
 * [0, num_blocks). Of the options only those are looked at that say what a token sees. */
KV_API kv_status kv_plan_check_sight(const kv_plan *plan, int32_t num_blocks,
                                     const kv_attend_options *options);

/* Joins attention over disjoint KV ranges: outs [P, R, D], lses [P, R] -> out [R, D], lse [R]
 * (may be NULL). A partial with lse -inf is neutral. Dense float32. */
KV_API kv_status kv_merge_states(const float *outs, const float *lses, int32_t num_partials,
                                 int64_t num_rows, int32_t head_dim, float *out, float *lse);

/* What the encoded rows of one head share, [head_dim] each. NULL: none. */
typedef struct kv_channels {
    const float *bias;   /* subtracted before encoding and added by decoding */
    const float *scales; /* int8_static: one for each channel, positive; it needs them */
} kv_channels;

/* num_rows rows of head_dim elements, dense on both sides. Quantized: the codes of a row, then its
 * metadata; formats of kind CHANNEL take a multiple of 32 rows, and each 32 become the codes of the
 * group, then its metadata. channels is NULL for float formats, and may be for others but
 * int8_static. KV_ERR_NOT_FINITE: rows that a quantized format was to hold have a NaN or an
 * infinity. */
KV_API kv_status kv_quantize(const void *rows, kv_dtype dtype, kv_format format, int64_t num_rows,
                             int32_t head_dim, const kv_channels *channels, void *out);
KV_API kv_status kv_dequantize(const void *codes, kv_format format, int64_t num_rows,
                               int32_t head_dim, const kv_channels *channels, kv_dtype dtype,
                               void *out);

/* y[r, n] = sum over k of x[r, k] * w[n, k] (+ bias[n]), float32, for few rows: each weight is read
 * once, and a row's bits do not depend on the rows beside it. Strides count elements. */
KV_API kv_status kv_linear(const float *x, int64_t x_stride, const float *w, int64_t w_stride,
                           const float *bias, float *y, int64_t y_stride, int32_t num_rows,
                           int32_t num_outputs, int32_t num_inputs);

/* ---- the machine ----------------------------------------------------------------------------- */

/* Threads of every data-plane call, the caller included, at most 256. The default is what the
 * process may use (affinity and cgroup quota, as the first call that asks finds them), or
 * KVCORE_NUM_THREADS where that is lower. More than the process may use is cut down to that, unless
 * oversubscribe is not 0; kv_get_num_threads tells what came of it. 0 restores the default. */
KV_API kv_status kv_set_num_threads(int32_t num_threads, int32_t oversubscribe);
KV_API int32_t kv_get_num_threads(void);

/* "scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "neon": chosen once from CPUID and the OS's state, or by
 * KVCORE_ISA. "avx512_vnni" is "avx512" but for few query rows over quantized caches, and
 * "avx512_bf16" is that but for prompts over bf16 caches (see kv_attend_options.exact), and is chosen
 * where it is expected to be faster: on AMD's CPUs.
 * Where KVCORE_ISA names one that is not there, it is "none", and data-plane calls return
 * KV_ERR_UNSUPPORTED. kv_set_isa is for tests and comparisons; call it while no data-plane call
 * runs. */
KV_API const char *kv_get_isa(void);
KV_API kv_status kv_set_isa(const char *name);
/* Names of the ISAs that this build and CPU can run, best first; NULL ends the list. */
KV_API const char *const *kv_available_isas(void);
/* Names of the CPU's features that kernels may use ("avx512_bf16", ...); NULL ends the list. The
 * variable KVCORE_CPU_FEATURES adds some that a hypervisor hides, as in "+avx512_bf16"; commas separate
 * several. They are believed: an instruction that the CPU lacks ends the process. */
KV_API const char *const *kv_cpu_features(void);

#ifdef __cplusplus
}
#endif

#endif
