/* Where rows lie: new ones, those of blocks, raw ones. */
#pragma once
#include "device.cuh"
#include "formats.cuh"
#include "params.cuh"

KV_DEVICE constexpr s32 dtype_bytes(s32 dtype) { return dtype == DTYPE_F32 ? 4 : 2; }

/* The dtype with the same elements as a float format. */
template <s32 FORMAT>
constexpr s32 DTYPE_OF = FORMAT == KV_FORMAT_FP32   ? DTYPE_F32
                         : FORMAT == KV_FORMAT_FP16 ? DTYPE_F16
                                                    : DTYPE_BF16;

/* What the rows of one head share. */
struct Channels {
    const float *bias, *scales; /* [D], or null */
};

template <s32 D> KV_DEVICE Channels channels_of_head(const Blocks &blocks, s32 head) {
    return {blocks.bias ? blocks.bias + head * D : nullptr,
            blocks.scales ? blocks.scales + head * D : nullptr};
}

/* ---- new rows ---------------------------------------------------------------------------------- */

/* The sequence that new token t belongs to: the last that starts there or before. */
KV_DEVICE s32 sequence_of(const Plan &plan, s32 t) {
    s32 low = 0, high = plan.num_sequences - 1;
    while (low < high) {
        const s32 middle = (low + high + 1) / 2;
        if (plan.query_starts[middle] <= t)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

KV_DEVICE u8 *row_at(const Rows &rows, s64 s, s64 i, s64 head) {
    const s64 at = s * rows.sequence_stride + i * rows.token_stride + head * rows.head_stride;
    return static_cast<u8 *>(rows.data) + at * dtype_bytes(rows.dtype);
}

/* New token t of a call, one head. */
KV_DEVICE u8 *new_row(const Rows &rows, const Plan &plan, s32 t, s32 head) {
    if (!rows.padded_length)
        return row_at(rows, 0, t, head);
    const s32 s = sequence_of(plan, t);
    return row_at(rows, s, t - plan.query_starts[s], head);
}

/* ---- rows of blocks ---------------------------------------------------------------------------- */

/* The row of one slot and head: of a tile its codes. */
KV_DEVICE u8 *block_row(const Blocks &blocks, s32 block, s32 head, s32 offset) {
    return blocks.data + block * blocks.block_stride + head * blocks.head_stride +
           offset * blocks.token_stride;
}

/* The metadata of one slot and head; of its group where these are sealed. */
template <s32 FORMAT, s32 D>
KV_DEVICE u8 *block_metadata(const Blocks &blocks, s32 block, s32 head, s32 offset) {
    return block_row(blocks, block, head, 0) + blocks.metadata_offset +
           offset * METADATA_BYTES<FORMAT, D>;
}

KV_DEVICE u8 *raw_row(const Blocks &blocks, s32 block, s32 head, s32 offset) {
    return blocks.raw + block * blocks.raw_block_stride + head * blocks.raw_head_stride +
           offset * blocks.raw_token_stride;
}

/* From this key on, a query that is stored at `position` reads raw rows. */
KV_DEVICE s32 raw_start(const Blocks &blocks, s32 position) {
    return max((position + 1) / GROUP_TOKENS * GROUP_TOKENS - blocks.raw_last, 0);
}
