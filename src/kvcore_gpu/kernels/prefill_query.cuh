/* A block's rows of q into shared memory, as the products of a pass take them. */
#pragma once
#include "prefill_sight.cuh"
#include "queries.cuh"

/* Where a row of q or out lies, in elements. */
KV_DEVICE s64 offset_of_row(const Rows &rows, const AttendParams &p, const Sequence &seq, s32 head,
                            s32 row) {
    const s32 token = (u32)row / (u32)p.group;
    return row_offset(rows, seq, token, head * p.group + row - token * p.group);
}

/* Where q is taken as it is. */
KV_DEVICE void copy_query(const AttendParams &p, const Place &place, s32 head,
                          const Shared &shared) {
    const u16 *data = static_cast<const u16 *>(p.q.data);
    const s32 num_rows = num_rows_of(p, place.seq);
#pragma unroll 1
    for (s32 i = threadIdx.x; i < ROWS * K_CHUNKS; i += THREADS) {
        const s32 row = i / K_CHUNKS, column = i % K_CHUNKS;
        const bool there = place.first_row + row < num_rows && column < HEAD_DIM / 8;
        const s64 at = there ? offset_of_row(p.q, p, place.seq, head, place.first_row + row) : 0;
        cp_async16(chunk_of<K_CHUNKS>(shared.query, row, column), data + at + 8 * column, there);
    }
    cp_async_commit();
}

constexpr s32 PER_LANE = (8 * K_CHUNKS + 31) / 32; /* elements l, l + 32, ... of a row */

/* What scores of a pass are to be multiplied with and added to, as the softmax to base 2 has them.
 * Options have their own order, and the factor is above 0: -inf is to stay that. */
KV_DEVICE float factor_of_row(const AttendParams &p, float factor) {
    constexpr float smallest = 0x1p-126f;
    return OPTIONS ? factor : fmaxf(factor * (p.scale * LOG2E), smallest);
}
KV_DEVICE float bias_of_scores(const AttendParams &p, float bias) {
    return OPTIONS ? bias : bias * (p.scale * LOG2E);
}

KV_DEVICE void load_query(const AttendParams &p, const Place &place, s32 head, const Shared &shared,
                          bool raw) {
    if constexpr (!K_QUANTIZED && QUERY_PARTS == 1) {
        copy_query(p, place, head, shared);
        return;
    }
    const s32 num_rows = num_rows_of(p, place.seq);
    const bool encoded = K_QUANTIZED && !raw;
#pragma unroll 1
    for (s32 row = warp_id(); row < ROWS; row += WARPS) {
        float x[PER_LANE] = {}, factor = 1.0f, bias = 0.0f;
        if (place.first_row + row < num_rows)
            load_query_row<HEAD_DIM>(
                p, offset_of_row(p.q, p, place.seq, head, place.first_row + row), x);
        if (encoded) {
            bias = bias_of_row<HEAD_DIM>(p, head, x);
            transform_query_row<K_FORMAT, HEAD_DIM>(p, head, x);
        }
        if (K_QUANTIZED ? encoded : SCALED_ROWS<false>)
            factor = scale_row(x);
        if (lane_id() == 0) {
            shared.row_factors[row] = factor_of_row(p, factor);
            shared.row_biases[row] = bias_of_scores(p, bias);
        }
        if (encoded)
            store_query_row<false, 1, K_CHUNKS>(shared.query, QUERY_PART_BYTES, row, x);
        else
            store_query_row<K_IS_BF16<QUANTIZED>, QUERY_PARTS, K_CHUNKS>(shared.query,
                                                                         QUERY_PART_BYTES, row, x);
    }
}
