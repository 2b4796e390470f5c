/* Rows of sums, which lanes hold in pieces, in shared memory, and from there to the output. Each warp
 * has its own rows there. */
#pragma once
#include "partials.cuh"
#include "prefill_query.cuh"
#include "prefill_tile.cuh"

KV_DEVICE float *sums_of(const Shared &shared) { return reinterpret_cast<float *>(shared.query); }

/* Element d of a row of the block's; neighbouring rows' lie in other banks. */
KV_DEVICE s32 sum_index(s32 row, s32 d) {
    return row * SUMS_PITCH + (SUMS_PITCH % 32 == 0 ? d ^ (row & 3) << 3 : d);
}

/* All rows of the warp; m and l go where row_factors and row_biases were. */
KV_DEVICE void put_rows(const Shared &shared, const WarpState &state) {
    float *sums = sums_of(shared);
    const s32 pair = 2 * (lane_id() & 3), warp = warp_id();
#pragma unroll
    for (s32 t = 0; t < ROW_TILES; t++)
#pragma unroll
        for (s32 half = 0; half < 2; half++) {
            const s32 row = row_of_lane(t, half, warp);
#pragma unroll
            for (s32 n = 0; n < V_CHUNKS; n++)
                *reinterpret_cast<float2 *>(sums + sum_index(row, 8 * n + pair)) =
                    float2{state.o[t][n][2 * half], state.o[t][n][2 * half + 1]};
            const float l = sum_of_quad(state.l[t][half]);
            if (pair == 0) {
                shared.row_factors[row] = state.m[t][half];
                shared.row_biases[row] = l;
            }
        }
    sync_warp();
}

/* The other way; l goes to one of the lanes that share a row. */
KV_DEVICE void get_rows(const Shared &shared, WarpState &state) {
    const float *sums = sums_of(shared);
    const s32 pair = 2 * (lane_id() & 3), warp = warp_id();
#pragma unroll
    for (s32 t = 0; t < ROW_TILES; t++)
#pragma unroll
        for (s32 half = 0; half < 2; half++) {
            const s32 row = row_of_lane(t, half, warp);
#pragma unroll
            for (s32 n = 0; n < V_CHUNKS; n++) {
                const float2 both =
                    *reinterpret_cast<const float2 *>(sums + sum_index(row, 8 * n + pair));
                state.o[t][n][2 * half] = both.x;
                state.o[t][n][2 * half + 1] = both.y;
            }
            state.m[t][half] = shared.row_factors[row];
            state.l[t][half] = pair == 0 ? shared.row_biases[row] : 0.0f;
        }
}

constexpr s32 SUMS_PER_LANE = (HEAD_DIM_V + 31) / 32; /* elements l, l + 32, ... of a row */

KV_DEVICE void load_sums(const Shared &shared, s32 row, float (&o)[SUMS_PER_LANE]) {
#pragma unroll
    for (s32 i = 0; i < SUMS_PER_LANE; i++) {
        const s32 d = 32 * i + lane_id();
        o[i] = d < HEAD_DIM_V ? sums_of(shared)[sum_index(row, d)] : 0.0f;
    }
}

KV_DEVICE void store_sums(const Shared &shared, s32 row, const float (&o)[SUMS_PER_LANE]) {
#pragma unroll
    for (s32 i = 0; i < SUMS_PER_LANE; i++) {
        const s32 d = 32 * i + lane_id();
        if (d < HEAD_DIM_V)
            sums_of(shared)[sum_index(row, d)] = o[i];
    }
}

/* Of the block's rows, the end of the warp's, which begin at `first`. */
KV_DEVICE s32 end_of_rows(const AttendParams &p, const Place &place, s32 first) {
    return min(first + WARP_ROWS, num_rows_of(p, place.seq) - place.first_row);
}

/* Sums over levels of encoded values to sums over values. */
KV_DEVICE void undo_transform_of_rows(const AttendParams &p, const Shared &shared, s32 head) {
    if constexpr (IS_ROTATED<V_FORMAT> || V_FORMAT == KV_FORMAT_INT8_STATIC) {
        const s32 first = WARP_ROWS * warp_id();
#pragma unroll 1
        for (s32 row = first; row < first + WARP_ROWS; row++) {
            float o[SUMS_PER_LANE];
            load_sums(shared, row, o);
            undo_transform<V_FORMAT, HEAD_DIM_V>(p, head, o);
            store_sums(shared, row, o);
        }
        sync_warp();
    }
}

KV_DEVICE void store_four(const Rows &out, s64 at, const float4 &x, float keep) {
    if (out.dtype == DTYPE_F32) {
        *reinterpret_cast<float4 *>(static_cast<float *>(out.data) + at) =
            float4{keep * x.x, keep * x.y, keep * x.z, keep * x.w};
        return;
    }
    uint2 *to = reinterpret_cast<uint2 *>(static_cast<u16 *>(out.data) + at);
    if (out.dtype == DTYPE_F16)
        *to = uint2{pack_f16(keep * x.x, keep * x.y), pack_f16(keep * x.z, keep * x.w)};
    else
        *to = uint2{pack_bf16(keep * x.x, keep * x.y), pack_bf16(keep * x.z, keep * x.w)};
}

/* The warp's rows, as put_rows has left them. */
KV_DEVICE void store_rows(const AttendParams &p, const Place &place, const Shared &shared,
                          s32 head) {
    static_assert(HEAD_DIM_V % 4 == 0, "whole stores");
    const Sequence &seq = place.seq;
    const s32 first = WARP_ROWS * warp_id(), end = end_of_rows(p, place, first);
#pragma unroll 1
    for (s32 row = first; row < end; row++) {
        const s32 token = (u32)(place.first_row + row) / (u32)p.group;
        const s32 query_head = head * p.group + place.first_row + row - token * p.group;
        State total = {shared.row_factors[row], shared.row_biases[row]};
        float keep = 1.0f;
        if (p.sinks) {
            float take;
            merge_state(total, {p.sinks[query_head] * LOG2E, 1.0f}, keep, take);
        }
        keep = total.l == 0.0f ? 0.0f : keep / total.l;
        const s64 at = row_offset(p.out, seq, token, query_head);
#pragma unroll
        for (s32 d = 4 * lane_id(); d < HEAD_DIM_V; d += 128)
            store_four(p.out, at + d,
                       *reinterpret_cast<const float4 *>(sums_of(shared) + sum_index(row, d)),
                       keep);
        if (p.lse && lane_id() == 0)
            p.lse[(s64)(seq.first_token + token) * p.q.num_heads + query_head] = natural_lse(total);
    }
}
