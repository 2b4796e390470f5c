/* The parameters of the kernels, one plain struct each; mirrored by kvcore_gpu/params.py. */
#pragma once
#include "device.cuh"

/* q, k, v and out of a step: ragged [T, H, D], or padded [S, padded_length, H, D]. */
struct Rows {
    void *data;
    s64 sequence_stride, token_stride, head_stride; /* elements */
    s32 dtype;                                      /* 0 float32, 1 float16, 2 bfloat16 */
    s32 num_heads, head_dim;
    s32 padded_length; /* 0: ragged */
};

/* K or V of a layer, as kv_blocks of kvcore.h. */
struct Blocks {
    u8 *data;
    s64 block_stride, head_stride, token_stride; /* bytes */
    s64 metadata_offset;
    const float *bias;   /* [H, D], or null */
    const float *scales; /* [H, D], or null */
    u8 *raw;             /* bf16 rows [N, H, 32, D], or null */
    s64 raw_block_stride, raw_head_stride, raw_token_stride;
    s32 num_blocks, num_heads, block_size_log2, raw_first, raw_last;
    s32 saturate;
};

/* What a step means for a group, as kv_plan of kvcore.h. */
struct Plan {
    const s32 *query_starts, *seq_lens, *slots, *tables;
    const s32 *raw_slots, *raw_tables, *copies, *restores;
    s32 num_sequences, num_tokens, table_width, raw_width;
    s32 num_copies, num_restores, max_new;
};

struct CopyParams {
    Blocks blocks;
    Plan plan;
};

struct AppendParams {
    Rows k, v; /* v.data null: V lies in K */
    Blocks k_blocks, v_blocks;
    Plan plan;
    s32 *not_finite;
};

struct ReadParams {
    Blocks blocks;
    const s32 *row, *raw_row;
    s32 start, stop, length;
    Rows out;
};

struct RestoreParams {
    Blocks blocks;
    Plan plan;
};

struct QuantizeParams {
    void *rows;
    u8 *codes;
    const float *bias, *scales;
    s64 num_rows;
    s32 dtype;
};

struct MergeParams {
    const float *outs, *lses; /* [P, R, D], [P, R] */
    float *out, *lse;         /* [R, D], [R] */
    s64 num_rows;
    s32 num_partials, head_dim;
};

struct AttendParams {
    Rows q, out;
    float *lse; /* [T, Hq], or null */
    Blocks k, v;
    Plan plan;
    float scale, softcap;
    const float *alibi_slopes, *sinks; /* [Hq], or null */
    const s32 *positions;              /* [T], or null */
    const u8 *mask;
    const s64 *mask_offsets; /* [S], -1: causal */
    s32 causal, window;      /* window 0: none */
    s32 group;               /* query heads of a KV head */
    float *partial_out, *partial_lse;
    s32 *counters;
    s32 num_splits;
};
