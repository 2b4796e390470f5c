/* Values that are not finite in tiles of which some rows of a block take keys that others do not. */
#pragma once
#include "not_finite.cuh"
#include "prefill_tile.cuh"

/* Whether this warp's copies have brought any, which it looks at while others wait for theirs. */
KV_DEVICE bool has_copied_not_finite(u8 *values) {
    u32 found = 0;
#pragma unroll 1
    for (u32 i = threadIdx.x; i < KEYS * V_CHUNKS; i += THREADS)
        found |= not_finite_halves<V_IS_BF16>(
            *reinterpret_cast<uint4 *>(chunk_of<V_CHUNKS>(values, i / V_CHUNKS, i % V_CHUNKS)));
    return any(found != 0);
}

/* Adds them to the rows of the warp that take them. */
KV_DEVICE void add_not_finite(const AttendParams &p, const Place &place, bool raw, WarpState &state,
                              u8 *values, s32 first) {
    const u64 keys = keys_of_lane(p, place, raw, first);
#pragma unroll 1
    for (s32 i = 0; i < KEYS * V_CHUNKS; i++) {
        const s32 key = i / V_CHUNKS, column = i % V_CHUNKS;
        const u8 *chunk = chunk_of<V_CHUNKS>(values, key, column);
        const u32 pair = reinterpret_cast<const u32 *>(chunk)[lane_id() & 3];
        if (!any(not_finite_halves<V_IS_BF16>(pair) != 0))
            continue;
        const u32 rows = ballot(keys >> key & 1);
#pragma unroll
        for (s32 t = 0; t < ROW_TILES; t++)
            add_pair<V_IS_BF16>(state.o[t], column, pair, rows >> 16 * t);
    }
}

KV_DEVICE void clear_not_finite(u8 *values) {
#pragma unroll 1
    for (s32 i = threadIdx.x; i < KEYS * V_CHUNKS * 4; i += THREADS) {
        const s32 chunk = i / 4;
        u32 *pair = reinterpret_cast<u32 *>(
                        chunk_of<V_CHUNKS>(values, chunk / V_CHUNKS, chunk % V_CHUNKS)) +
                    i % 4;
        if (not_finite_halves<V_IS_BF16>(*pair))
            *pair = finite_pair<V_IS_BF16>(*pair);
    }
}

/* All threads of the block call it. */
KV_DEVICE void part_not_finite(const AttendParams &p, const Place &place, bool raw, bool has_rows,
                               u8 *values, s32 first, WarpState &state) {
    if (has_rows)
        add_not_finite(p, place, raw, state, values, first);
    sync_threads();
    clear_not_finite(values);
    sync_threads();
}
