/* What blocks leave for each other: the state of each row after a part of its keys, and the rows of
 * the output, which the last block of a tile makes of them.
 *
 * A part of a row is m, l and o [Dv], not yet divided by l; o of encoded values is as their levels
 * are, before the transform of their format is undone.
 */
#pragma once
#include "formats.cuh"
#include "rotation.cuh"
#include "softmax.cuh"
#include "work.cuh"

KV_DEVICE s64 partial_index(const AttendParams &p, const Work &work, s32 row, s32 part) {
    return (work.index * p.tile_rows + row) * (p.num_splits + 1) + part;
}

KV_DEVICE State load_state(const AttendParams &p, s64 index) {
    return {load_l2(p.partial_states + 2 * index), load_l2(p.partial_states + 2 * index + 1)};
}

KV_DEVICE void store_state(const AttendParams &p, s64 index, const State &state) {
    p.partial_states[2 * index] = state.m;
    p.partial_states[2 * index + 1] = state.l;
}

/* Whether this is the last of the `blocks` that share a tile's rows: it sees what all have left. The
 * counter is 0 again then, for the next launch. All threads of the block call it. */
KV_DEVICE bool is_last_block(const AttendParams &p, const Work &work, s32 blocks, s32 *shared) {
    if (blocks > 1)
        thread_fence();
    sync_threads();
    if (blocks <= 1)
        return true;
    if (threadIdx.x == 0) {
        *shared = atomic_add_s32(p.counters + work.index, 1) == blocks - 1;
        if (*shared)
            p.counters[work.index] = 0;
    }
    sync_threads();
    if (!*shared)
        return false;
    thread_fence();
    return true;
}

/* Of a row's splits together: lane l has elements l, l + 32, ... of o. Each lane loads the state of
 * one split of 32; weights then come from there. */
template <s32 DIM, s32 N>
KV_DEVICE State merge_splits(const AttendParams &p, const Work &work, s32 row, float (&o)[N]) {
    constexpr s32 TOGETHER = N <= 4 ? 4 : N <= 8 ? 2 : 1; /* splits whose loads are under way */
    const s32 first_split = shfl(work.first_split, 0), end_split = shfl(work.end_split, 0);
    const s32 lane = lane_id(), first = first_split & -32;
    const auto state_of = [&](s32 split) {
        return first_split <= split && split < end_split
                   ? load_state(p, partial_index(p, work, row, split))
                   : empty_state();
    };
    State merged = empty_state();
#pragma unroll 1
    for (s32 base = first; base < end_split; base += 32)
        merged.m = fmaxf(merged.m, state_of(base + lane).m);
    merged.m = reduce_max(merged.m);
    const float top = finite_maximum(merged.m);
    const float *const first_out =
        p.partial_out + partial_index(p, work, row, first_split) * DIM + lane;
#pragma unroll 1
    for (s32 base = first; base < end_split; base += 32) {
        const State state = state_of(base + lane);
        const float weight = exp2_approx(state.m - top);
        merged.l += reduce_add(state.l * weight);
        const s32 end = min(base + 32, end_split);
#pragma unroll 1
        for (s32 split = max(base, first_split); split < end; split += TOGETHER) {
            const float *from = first_out + (s64)(split - first_split) * DIM;
            float x[TOGETHER][N] = {};
#pragma unroll
            for (s32 j = 0; j < TOGETHER; j++)
                if (split + j < end) {
#pragma unroll
                    for (s32 i = 0; i < N; i++)
                        if (DIM % 32 == 0 || 32 * i + lane < DIM)
                            x[j][i] = load_l2(from + j * DIM + 32 * i);
                }
#pragma unroll
            for (s32 j = 0; j < TOGETHER; j++) {
                const float take = shfl(weight, (split + j) & 31); /* 0 beyond the last split */
#pragma unroll
                for (s32 i = 0; i < N; i++)
                    o[i] = fmaf(x[j][i], take, o[i]);
            }
        }
    }
    return merged;
}

/* What the sums of levels are to be multiplied or rotated by. */
template <s32 FORMAT, s32 DIM, s32 N>
KV_DEVICE void undo_transform(const AttendParams &p, s32 head, float (&o)[N]) {
    if constexpr (IS_ROTATED<FORMAT>)
        rotate_row<DIM>(o);
#pragma unroll
    for (s32 i = 0; i < N; i++) {
        const s32 d = 32 * i + lane_id();
        if (IS_ROTATED<FORMAT>)
            o[i] = with_sign(o[i], rotation_sign_of_lane(i));
        if (FORMAT == KV_FORMAT_INT8_STATIC && d < DIM)
            o[i] *= p.v.scales[head * DIM + d];
    }
}

template <s32 DIM, s32 N>
KV_DEVICE void merge_raw(const AttendParams &p, const Work &work, s32 row, State &state,
                         float (&o)[N]) {
    const s64 index = partial_index(p, work, row, p.num_splits);
    float keep, take;
    merge_state(state, load_state(p, index), keep, take);
#pragma unroll
    for (s32 i = 0; i < N; i++) {
        const s32 d = 32 * i + lane_id();
        if (d < DIM)
            o[i] = fmaf(load_l2(p.partial_out + index * DIM + d), take, o[i] * keep);
    }
}

template <s32 DIM, s32 N>
KV_DEVICE void store_row(const Rows &out, s64 at, float keep, const float (&o)[N]) {
    float *floats = static_cast<float *>(out.data) + at;
    u16 *halves = static_cast<u16 *>(out.data) + at;
    if (out.dtype == DTYPE_F32) {
#pragma unroll
        for (s32 i = 0; i < N; i++)
            if (32 * i + (s32)lane_id() < DIM)
                floats[32 * i + lane_id()] = keep * o[i];
    } else {
#pragma unroll
        for (s32 i = 0; i < N; i++) {
            const u16 f16 = f32_to_f16(keep * o[i]), bf16 = f32_to_bf16(keep * o[i]);
            if (32 * i + (s32)lane_id() < DIM)
                halves[32 * i + lane_id()] = out.dtype == DTYPE_F16 ? f16 : bf16;
        }
    }
}

/* Row `row` of a tile of which every part is there, by one warp. */
template <s32 FORMAT, s32 DIM>
KV_DEVICE void finish_row(const AttendParams &p, const Work &work, s32 row) {
    float o[(DIM + 31) / 32] = {};
    State state = merge_splits<DIM>(p, work, row, o);
    undo_transform<FORMAT, DIM>(p, work.head, o);
    if (work.some_raw)
        merge_raw<DIM>(p, work, row, state, o);
    const s32 token = token_of(p, work.first_row + row);
    const s32 head = query_head_of(p, work.head, work.first_row + row);
    float keep = 1.0f;
    if (p.sinks) {
        float take;
        merge_state(state, {p.sinks[head] * LOG2E, 1.0f}, keep, take);
    }
    keep = state.l == 0.0f ? 0.0f : keep / state.l;
    store_row<DIM>(p.out, row_offset(p.out, work.seq, token, head), keep, o);
    if (p.lse && lane_id() == 0)
        p.lse[(work.seq.first_token + (s64)token) * p.q.num_heads + head] = natural_lse(state);
}
