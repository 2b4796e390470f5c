/* What a launch passes to a kernel: plain structs, mirrored field by field in kvcore_gpu/params.py. */
#pragma once
#include "device.cuh"

enum Dtype : s32 { DTYPE_F32, DTYPE_F16, DTYPE_BF16 };

/* New rows of a call, [T, H, D] ragged or [S, padded_length, H, D] padded. Token i of sequence s
 * lies at
 *   ragged: (query_starts[s] + i) * token_stride
 *   padded: s * sequence_stride + i * token_stride
 * Rows are dense; data and strides are multiples of 16 bytes. */
struct Rows {
    void *data;                                     /* null: none */
    s64 sequence_stride, token_stride, head_stride; /* in elements */
    s32 dtype;                                      /* a Dtype */
    s32 num_heads, head_dim;
    s32 padded_length; /* 0: ragged */
};

/* K or V of one layer, as kv_blocks in kvcore.h: [N, H, B, D] by strides, or tiles of bytes. */
struct Blocks {
    u8 *data;
    s64 block_stride, head_stride, token_stride; /* in bytes */
    s64 metadata_offset;                         /* in a tile; 0 for float formats */
    const float *bias;                           /* [H, D], or null */
    const float *scales;                         /* [H, D] of int8_static, or null */
    u8 *raw;                                     /* bf16 rows [N, H, 32, D], or null */
    s64 raw_block_stride, raw_head_stride, raw_token_stride;
    s32 num_blocks, num_heads, block_size_log2;
    s32 raw_first, raw_last;
    s32 saturate; /* 0: what is not finite is noted; stored it is the same either way */
};

/* What a step means for one group, as kv_plan in kvcore.h. */
struct Plan {
    const s32 *query_starts; /* [S + 1] */
    const s32 *seq_lens;     /* [S] stored and new tokens */
    const s32 *slots;        /* [T]; -1: skip */
    const s32 *tables;       /* [S, table_width]; -1: no block, which no token sees */
    const s32 *raw_slots;    /* [T] */
    const s32 *raw_tables;   /* [S, raw_width] */
    const s32 *copies;       /* [C, 3] from block, to block, rows */
    const s32 *restores;     /* [R, 3] sequence, raw column, rows */
    s32 num_sequences, num_tokens;
    s32 table_width, raw_width; /* columns in memory, maybe more than any sequence has */
    s32 num_copies, num_restores;
    s32 max_new; /* the largest number of new tokens of one sequence */
};

struct CopyParams {
    Blocks blocks;
    Plan plan;
};

struct AppendParams {
    Rows k, v; /* v.data null: V lies in K */
    Blocks k_blocks, v_blocks;
    Plan plan;
    s32 *not_finite; /* set to 1, never cleared */
};

/* Rows of tokens [start, stop) of a sequence of `length`, as its next token reads them. */
struct ReadParams {
    Blocks blocks;
    const s32 *row;
    const s32 *raw_row; /* null: no raw rows */
    s32 start, stop, length;
    Rows out;
};

struct RestoreParams {
    Blocks blocks;
    Plan plan;
};

/* Dense rows and their codes; formats that seal groups take 32 rows at a time. */
struct QuantizeParams {
    void *rows;
    u8 *codes;
    const float *bias, *scales; /* [D], or null */
    s32 *not_finite;            /* null when decoding */
    s64 num_rows;
    s32 dtype;
};

/* Dense: outs [P, R, D], lses [P, R] -> out [R, D], lse [R]. */
struct MergeParams {
    const float *outs, *lses;
    float *out, *lse;
    s64 num_rows;
    s32 num_partials, head_dim;
};

struct AttendParams {
    Rows q, out;
    float *lse; /* [T, Hq], or null */
    Blocks k, v;
    Plan plan;
    float scale, softcap;              /* softcap 0: off */
    const float *alibi_slopes, *sinks; /* [Hq], or null */
    const s32 *positions;              /* [T], or null */
    const u8 *mask;                    /* bits, or null */
    const s64 *mask_offsets;           /* [S] bytes into mask; -1: the sequence has none */
    s32 causal, window;                /* window 0: off */
    s32 group;                         /* query heads of a KV head */
    s32 few_rows;                      /* sequences with at most so many query rows of a KV head
                                          are decode's, the others prefill's */
    /* A tile is 16 query rows of a KV head and a sequence: new tokens x group. In prefill.cu it is a
     * sequence whose keys are cut, with MOST_BLOCKS / H units, each a part of a tile of ROWS rows. */
    s32 first_tile, num_tiles; /* which tiles of every sequence this launch takes */
    s32 first_sequence;        /* decode's; its grid has as many sequences as it takes */
    s32 num_splits;            /* of the longest sequence */
    float *partial_out;        /* [S of the launch, num_tiles, H, tile_rows, num_splits + 1, Dv] */
    float *partial_states;     /* the same without Dv, and 2: m and l */
    s32 *counters; /* [S of the launch, num_tiles, H]; 0 before and after every launch */
    s32 tile_rows; /* rows of a tile that can be in use: 16 or fewer */
};
