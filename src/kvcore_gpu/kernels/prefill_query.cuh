/* A block's rows of q into shared memory, as the products of a pass take them. */
#pragma once
#include "prefill_layout.cuh"
#include "queries.cuh"

/* Rows are (new token, query head of the KV head) pairs; rows of one token lie together. */
KV_DEVICE s64 offset_of_row(const Rows &rows, const AttendParams &p, const Sequence &seq, s32 head,
                            s32 row) {
    return row_offset(rows, seq, row / p.group, head * p.group + row % p.group);
}

/* Where q is taken as it is. */
KV_DEVICE void copy_query(const AttendParams &p, const Sequence &seq, s32 head, s32 first_row,
                          const Shared &shared) {
    const u16 *data = static_cast<const u16 *>(p.q.data);
    const s32 num_rows = seq.num_new * p.group;
    for (s32 i = threadIdx.x; i < ROWS * K_CHUNKS; i += THREADS) {
        const s32 row = i / K_CHUNKS, column = i % K_CHUNKS;
        const bool there = first_row + row < num_rows && column < HEAD_DIM / 8;
        const s64 at = there ? offset_of_row(p.q, p, seq, head, first_row + row) : 0;
        cp_async16(chunk_of<K_CHUNKS>(shared.query, row, column), data + at + 8 * column, there);
    }
    cp_async_commit();
}

constexpr s32 PER_LANE = (8 * K_CHUNKS + 31) / 32; /* elements l, l + 32, ... of a row */

template <bool RAW>
KV_DEVICE void load_query(const AttendParams &p, const Sequence &seq, s32 head, s32 first_row,
                          const Shared &shared) {
    if constexpr (!K_QUANTIZED && QUERY_PARTS == 1) {
        copy_query(p, seq, head, first_row, shared);
        return;
    }
    const s32 num_rows = seq.num_new * p.group;
    for (s32 row = warp_id(); row < ROWS; row += WARPS) {
        float x[PER_LANE] = {}, factor = 1.0f, bias = 0.0f;
        if (first_row + row < num_rows)
            load_query_row<HEAD_DIM>(p, offset_of_row(p.q, p, seq, head, first_row + row), x);
        if constexpr (K_ENCODED<RAW>) {
            bias = bias_of_row<HEAD_DIM>(p, head, x);
            transform_query_row<K_FORMAT, HEAD_DIM>(p, head, x);
        }
        if constexpr (SCALED_ROWS<RAW>)
            factor = scale_row(x);
        if (lane_id() == 0) {
            shared.row_factors[row] = factor;
            shared.row_biases[row] = bias;
        }
        store_query_row<K_IS_BF16<RAW>, PARTS<RAW>, K_CHUNKS>(shared.query, QUERY_PART_BYTES, row,
                                                              x);
    }
}
