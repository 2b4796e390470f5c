/* A tile's rows of q: into shared memory as the products of a pass take them, and out of it as
 * fragments. */
#pragma once
#include "decode_layout.cuh"
#include "queries.cuh"

constexpr s32 PER_LANE = (16 * K_STEPS + 31) / 32; /* elements l, l + 32, ... of a row */

/* All rows of the tile, one warp each in turn; those that are not there are zeros. */
KV_DEVICE void load_queries(const AttendParams &p, const Work &work, const Shared &shared,
                            bool raw) {
    const bool encoded = K_QUANTIZED && !raw;
#pragma unroll 1
    for (s32 row = warp_id(); row < ROWS; row += WARPS) {
        float x[PER_LANE] = {}, factor = 1.0f, bias = 0.0f;
        if (row < work.num_rows) {
            const s32 at = work.first_row + row;
            load_query_row<HEAD_DIM>(
                p, row_offset(p.q, work.seq, token_of(p, at), query_head_of(p, work.head, at)), x);
        }
        if (encoded) {
            bias = bias_of_row<HEAD_DIM>(p, work.head, x);
            transform_query_row<K_FORMAT, HEAD_DIM>(p, work.head, x);
        }
        if (encoded || SCALED_ROWS)
            factor = scale_row(x);
        if (lane_id() == 0) {
            shared.row_factors[row] = factor;
            shared.row_biases[row] = bias;
        }
        if (encoded)
            store_query_row<false, 1, K_CHUNKS>(shared.query, QUERY_PART_BYTES, row, x);
        else
            store_query_row<K_IS_BF16, QUERY_PARTS, K_CHUNKS>(shared.query, QUERY_PART_BYTES, row,
                                                              x);
    }
}

/* Fragments of q: a k-step of encoded keys has, in the words that a lane of them takes at once one
 * after the other, one field (formats.cuh): four neighbours where an mma's has 2 (lane % 4) + 0 .. 1
 * and + 8 .. 9. */
struct Queries {
    u8 *tile;
    u32 kept[QUERIES_IN_REGISTERS ? PARTS * K_STEPS : 1][4];

    /* The first of this lane's four elements. */
    static KV_DEVICE s32 element(s32 step) {
        constexpr s32 fields = FIELDS<K_FORMAT>, words = KEY_WORDS<K_FORMAT, HEAD_DIM>;
        const s32 load = step / (fields * words), i = step / fields % words, k = step % fields;
        if constexpr (IS_CHANNEL<K_FORMAT>)
            return 16 * step + 4 * (lane_id() & 3);
        const s32 word = words * (4 * load + (s32)(lane_id() & 3)) + i;
        return CHUNK<K_FORMAT> * (word >> 2) + 16 * k + 4 * (word & 3);
    }

    KV_DEVICE void load(u32 (&a)[4], s32 part, s32 step) const {
        u8 *rows = tile + part * QUERY_PART_BYTES;
        if constexpr (K_QUANTIZED) {
            const s32 row = lane_id() >> 2, d = element(step);
#pragma unroll
            for (s32 half = 0; half < 2; half++) {
                const uint2 pairs = *reinterpret_cast<const uint2 *>(
                    chunk_of<K_CHUNKS>(rows, row + 8 * half, d >> 3) + 2 * (d & 7));
                a[half] = pairs.x;
                a[half + 2] = pairs.y;
            }
        } else {
            load_rows_fragment<K_CHUNKS>(a, rows, 0, step);
        }
    }

    KV_DEVICE void keep() {
        if constexpr (QUERIES_IN_REGISTERS) {
#pragma unroll
            for (s32 i = 0; i < PARTS * K_STEPS; i++)
                load(kept[i], i / K_STEPS, i % K_STEPS);
        }
    }

    KV_DEVICE void get(u32 (&a)[4], s32 part, s32 step) const {
        if constexpr (QUERIES_IN_REGISTERS) {
#pragma unroll
            for (s32 i = 0; i < 4; i++)
                a[i] = kept[part * K_STEPS + step][i];
        } else {
            load(a, part, step);
        }
    }
};
