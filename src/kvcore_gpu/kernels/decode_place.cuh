/* Where the keys or values of a sequence and head lie: their blocks, encoded or raw. */
#pragma once
#include "sight.cuh"

/* K or V of one head in block 0, encoded or raw. */
struct Place {
    const u8 *data;
    s64 block_stride, metadata;
    u32 token_stride; /* a row's bytes, at most */
};

KV_DEVICE Place place_of(const Blocks &blocks, s32 head, bool raw) {
    if (raw && blocks.raw)
        return {blocks.raw + head * blocks.raw_head_stride, blocks.raw_block_stride, 0,
                (u32)blocks.raw_token_stride};
    return {blocks.data + head * blocks.head_stride, blocks.block_stride, blocks.metadata_offset,
            (u32)blocks.token_stride};
}

/* The row of a table that has a sequence's blocks. */
struct TableRow {
    const s32 *table;
    u32 first;
    s32 block_size_log2;

    KV_DEVICE s32 block_of(s32 j) const { return table[first + (u32)(j >> block_size_log2)]; }
    KV_DEVICE s32 offset_of(s32 j) const { return j & ((1 << block_size_log2) - 1); }
};

KV_DEVICE TableRow table_row(const Blocks &blocks, const Plan &plan, s32 sequence, bool raw) {
    if (raw && blocks.raw)
        return {plan.raw_tables, (u32)sequence * plan.raw_width, RAW_BLOCK_LOG2};
    return {plan.tables, (u32)sequence * plan.table_width, blocks.block_size_log2};
}
