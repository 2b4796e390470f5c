/* Rows of which each of several blocks has a part of the keys: what they leave for each other, and how
 * the last of them puts it together. A unit is a part of a tile of rows. */
#pragma once
#include "prefill_rows.cuh"

KV_DEVICE s64 index_of_part(const Place &place, s32 part, s32 row) {
    const s64 unit = place.first_unit + part;
    return (unit * gridDim.y + blockIdx.y) * ROWS + row;
}

/* The warp's rows, as put_rows has left them. */
KV_DEVICE void store_part(const AttendParams &p, const Place &place, const Shared &shared) {
    const s32 first = WARP_ROWS * warp_id(), end = end_of_rows(p, place, first);
#pragma unroll 1
    for (s32 row = first; row < end; row++) {
        const s64 index = index_of_part(place, place.part, row);
        float o[SUMS_PER_LANE];
        load_sums(shared, row, o);
#pragma unroll
        for (s32 n = 0; n < SUMS_PER_LANE; n++)
            if (32 * n + (s32)lane_id() < HEAD_DIM_V)
                p.partial_out[index * HEAD_DIM_V + 32 * n + lane_id()] = o[n];
        if (lane_id() == 0)
            store_state(p, index, {shared.row_factors[row], shared.row_biases[row]});
    }
}

/* Whether this block is the last of the tile's, which then sees what the others have left. */
KV_DEVICE bool is_last_part(const AttendParams &p, Place &place) {
    Work tile;
    tile.index = (s64)place.first_unit * gridDim.y + blockIdx.y;
    return is_last_block(p, tile, place.end_part - place.first_part, &place.is_last);
}

/* The warp's rows, each of whose parts is there, to where put_rows would leave them. */
KV_DEVICE void merge_parts(const AttendParams &p, const Place &place, const Shared &shared) {
    static_assert(MOST_PARTS <= 32, "a lane for each");
    const s32 first_part = place.first_part, count = place.end_part - first_part;
    const s64 stride = (s64)gridDim.y * ROWS * HEAD_DIM_V; /* of parts */
    const s32 first = WARP_ROWS * warp_id(), end = end_of_rows(p, place, first);
#pragma unroll 1
    for (s32 row = first; row < end; row++) {
        const State state = (s32)lane_id() < count
                                ? load_state(p, index_of_part(place, first_part + lane_id(), row))
                                : empty_state();
        const float m = reduce_max(state.m);
        const float weight = exp2_approx(state.m - finite_maximum(m));
        const float l = reduce_add(state.l * weight);
        const float *from =
            p.partial_out + index_of_part(place, first_part, row) * HEAD_DIM_V + lane_id();
        float o[SUMS_PER_LANE] = {};
#pragma unroll 2
        for (s32 part = 0; part < count; part++, from += stride) {
            const float take = shfl(weight, part);
#pragma unroll
            for (s32 n = 0; n < SUMS_PER_LANE; n++)
                if (32 * n + (s32)lane_id() < HEAD_DIM_V)
                    o[n] = fmaf(load_l2(from + 32 * n), take, o[n]);
        }
        undo_transform<V_FORMAT, HEAD_DIM_V>(p, blockIdx.y, o);
        store_sums(shared, row, o);
        if (lane_id() == 0) {
            shared.row_factors[row] = m;
            shared.row_biases[row] = l;
        }
    }
    sync_warp();
}
