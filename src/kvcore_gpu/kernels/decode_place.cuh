/* Where the keys or values of a sequence and head lie: their blocks, encoded or raw. */
#pragma once
#include "sight.cuh"

/* K or V of one sequence and head, with the blocks that its encoded or its raw rows lie in. */
struct Place {
    const u8 *data;
    s64 block_stride, token_stride, metadata;
    const s32 *table;
    s32 block_size_log2;
};

KV_DEVICE Place place_of(const Blocks &blocks, const Plan &plan, s32 sequence, s32 head, bool raw) {
    if (raw && blocks.raw)
        return {blocks.raw + head * blocks.raw_head_stride,
                blocks.raw_block_stride,
                blocks.raw_token_stride,
                0,
                plan.raw_tables + (s64)sequence * plan.raw_width,
                RAW_BLOCK_LOG2};
    return {blocks.data + head * blocks.head_stride,
            blocks.block_stride,
            blocks.token_stride,
            blocks.metadata_offset,
            plan.tables + (s64)sequence * plan.table_width,
            blocks.block_size_log2};
}
