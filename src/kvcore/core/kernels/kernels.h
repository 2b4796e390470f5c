/* The kernels of one ISA: one table of functions, compiled from the same text for each. */
#ifndef KVCORE_CORE_KERNELS_KERNELS_H
#define KVCORE_CORE_KERNELS_KERNELS_H

#include "kvcore.h"

enum {
    KV_SPLIT = 256, /* tokens of a split: docs/numerics.md */
    KV_SPLIT_WORDS = KV_SPLIT / 32,
    KV_RUN = 32,        /* most tokens that a kernel takes from one block at a time */
    KV_MAX_RUNS = 17,   /* runs of a split: the smallest block has 16 tokens, and the first raw rows
                           may end within one */
    KV_TILE_ROWS = 240, /* most query rows that share one pass over a split */
    KV_BLOCK_ROWS = 48, /* ... of which this many have their scores at a time */
    KV_MANY_ROWS = 16,  /* from so many on, lanes are rows: prefill_kernel.h */
    KV_ENCODED_ROWS = 16, /* up to so many query rows a sequence reads encoded rows undecoded:
                             encoded_kernel.h */
    KV_DOT_TOKENS = 32,   /* new tokens from which on a sequence may take dots */
    KV_ROW_ALIGN = 16     /* scratch rows are padded to a multiple of the widest vector */
};

/* Consecutive token rows of one block and head. Of a sealed group `rows` and `metadata` are where the
 * group begins. */
typedef struct kv_run {
    const char *rows;
    const char *metadata; /* of the first token; NULL: the rows have none */
    int64_t stride;       /* bytes from token to token */
    int32_t count;
    int32_t nbytes; /* of a token's elements, or its share of the group's codes */
    int16_t first;  /* of a sealed group: the place of the first token in it; else 0 */
    int16_t raw;    /* whether these are raw rows, bf16, of a quantized K or V */
} kv_run;

/* The tokens of one split as runs; K and V are cut at the same places. A run lies within one 32
 * tokens of the split. */
typedef struct kv_split_runs {
    int32_t start; /* token of the split that the first run begins with */
    int32_t num_runs;
    kv_run k[KV_MAX_RUNS], v[KV_MAX_RUNS];
} kv_split_runs;

/* A softmax over some of a row's tokens, before the division: m = max s, l = sum exp(s - m),
 * o = sum exp(s - m) v. l is 0 for a row that saw nothing; its m and o then mean nothing. */
typedef struct kv_partial {
    float *m, *l; /* [rows] */
    float *o;     /* [rows, width]; width is head_dim_v rounded up to KV_ROW_ALIGN */
} kv_partial;

typedef struct kv_split_task {
    const float *panels;  /* the queries, by pack_queries or pack_encoded */
    const float *encoded; /* what pack_encoded made beside; NULL: encoded rows are decoded first */
    int32_t dots; /* for dot_prefill_kernel.h: in how many bf16 terms queries are given; or 0 */
    float scale;  /* with dots, of the scores; otherwise the queries have it */
    int32_t num_rows, q_width, o_width;
    const int32_t *visible; /* [num_rows] where what a row sees of the split ends; without `seen`
                               it sees all before, and `visible` never decreases */
    const uint32_t *seen; /* [num_rows, KV_SPLIT_WORDS] bits of the tokens that it sees, or NULL */
    float softcap;        /* 0: off */
    const float *slopes;  /* [num_rows] s -= slope * (distance - place), or NULL */
    const float *distances; /* [num_rows] the query's position less the split's first token's */
    const float *places;    /* [KV_SPLIT] the same of the keys, or NULL where they stand in order */
    kv_format k_format, v_format;
    kv_channels k_channels, v_channels;
    int32_t head_dim, head_dim_v;
    const kv_split_runs *runs;
    const kv_split_runs *next; /* what is read afterwards, for prefetching; may be empty */
    float *scores;             /* scratch [num_rows, KV_SPLIT], or without `encoded` for many rows
                       [KV_SPLIT, KV_BLOCK_ROWS] */
    float *decoded; /* scratch [KV_SPLIT, q_width + o_width], for many rows or quantized formats;
                       with `encoded` and [num_rows, KV_SPLIT] more */
    kv_partial out;
} kv_split_task;

typedef struct kv_linear_task {
    const float *x, *w, *bias;
    float *y;
    int64_t x_stride, w_stride, y_stride;
    int32_t num_rows, num_inputs, num_outputs;
} kv_linear_task;

typedef struct kv_kernels {
    const char *isa;
    int has_dot_bf16; /* whether tasks with `dots` may be given */
    /* `count` elements, dense on both sides, from one float format to another. */
    void (*convert)(const void *from, kv_format from_format, void *to, kv_format to_format,
                    int64_t count);
    /* Finite rows [count, head_dim], dense, in a quantized format; head_dim is one that it takes.
     * Rows follow each other in codes and in metadata. CHANNEL: one group, count is 32. */
    void (*encode)(kv_format format, const float *rows, int32_t count, int32_t head_dim,
                   const kv_channels *channels, char *codes, char *metadata);
    /* Tokens [first, first + count) of those that codes and metadata begin with (CHANNEL: of one
     * group) to rows [count, row_stride]. */
    void (*decode)(kv_format format, const char *codes, const char *metadata, int32_t first,
                   int32_t count, int32_t head_dim, const kv_channels *channels, float *rows,
                   int64_t row_stride);
    /* Whether `count` dense elements of a float format hold neither NaN nor infinity. */
    int (*is_finite)(const void *values, kv_format format, int64_t count);
    /* Scaled queries [num_rows, q_width], padded with zeros up to KV_ROW_ALIGN, in the order in
     * which attend_split reads them: as many floats, for KV_MANY_ROWS rows or more those of a
     * multiple of KV_BLOCK_ROWS rows. With `dots` they are not scaled. */
    void (*pack_queries)(const float *q, int32_t num_rows, int32_t q_width, kv_format k_format,
                         int dots, float *panels);
    /* The same for reading encoded rows undecoded, as many rows as there may be: `panels` for float
     * rows, and `encoded`, which has KV_ROW_ALIGN floats more a row. Overwrites q. */
    void (*pack_encoded)(float *q, int32_t num_rows, int32_t q_width, kv_format k_format,
                         const kv_channels *channels, float *panels, float *encoded);
    void (*attend_split)(const kv_split_task *task);
    /* Folds `from`, whose tokens come later, into `into`. */
    void (*merge_partial)(const kv_partial *into, const kv_partial *from, int32_t num_rows,
                          int32_t width);
    /* out[d] = o[d] / l */
    void (*normalize)(const float *o, float l, float *out, int32_t width);
    /* Rows [begin, end) of kv_merge_states. */
    void (*merge_states)(const float *outs, const float *lses, int32_t num_partials,
                         int64_t num_rows, int32_t head_dim, int64_t begin, int64_t end, float *out,
                         float *lse);
    /* Outputs [begin, end) of every row. */
    void (*linear)(const kv_linear_task *task, int32_t begin, int32_t end);
} kv_kernels;

extern const kv_kernels kv_kernels_scalar;
#if defined(__x86_64__)
extern const kv_kernels kv_kernels_avx2;
extern const kv_kernels kv_kernels_avx512;
extern const kv_kernels kv_kernels_avx512_vnni;
extern const kv_kernels kv_kernels_avx512_bf16;
#endif
#if defined(__aarch64__)
extern const kv_kernels kv_kernels_neon;
#endif

#endif
