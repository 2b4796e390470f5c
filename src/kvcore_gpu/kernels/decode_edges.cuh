/* Tiles of which not every row sees every key: at the ends of what rows see, and all where a mask
 * has a say. Few tiles are, so that this code is to be short.
 */
#pragma once
#include "decode_values.cuh"
#include "work.cuh"

/* Where every row of the tile sees all keys, and reads them in this pass. */
struct Whole {
    s32 begin, end;
};

/* Row `row` of the tile. Those that are not there see what the last one does, so that they ask for no
 * mask of their own. */
KV_DEVICE Sight sight_of_row(const AttendParams &p, const Work &work, s32 row) {
    return sight_of(p, work.seq, token_of(p, work.first_row + min(row, work.num_rows - 1)));
}

template <bool RAW> KV_DEVICE Whole find_whole(const AttendParams &p, const Work &work) {
    if (RAW)
        return {0, 0};
    const Sight sight = sight_of_row(p, work, lane_id() & (ROWS - 1));
    s32 begin = sight.begin, end = sight.end;
    if (QUANTIZED && work.seq.has_raw) {
        begin = max(begin, work.seq.raw_first);
        end = min(end, sight.raw_begin);
    }
    if (may_miss_some(p, sight))
        end = 0;
    return {reduce_max(begin), reduce_min(end)};
}

/* What rows see of a tile: a lane's bits 4 n + i are for s[n][i], those of `any` for keys. */
struct Seen {
    u32 own, any;
    bool mixed; /* a key that some rows see and others do not */
};

template <bool RAW> KV_DEVICE Seen look_at_tile(const AttendParams &p, const Work &work, s32 j) {
    u32 own = 0, some = 0, not_all = 0;
#pragma unroll 1
    for (s32 half = 0; half < 2; half++) {
        const Sight sight = sight_of_row(p, work, (lane_id() >> 2) + 8 * half);
#pragma unroll 1
        for (s32 i = 0; i < TILE<RAW> / 4; i++) {
            const s32 key = 8 * (i >> 1) + 2 * (lane_id() & 3) + (i & 1);
            const bool sees_it = sees(p, work.seq, sight, j + key) &&
                                 (!QUANTIZED || reads_raw(work.seq, sight, j + key) == RAW);
            own |= (u32)sees_it << (4 * (i >> 1) + 2 * half + (i & 1));
            some |= (u32)sees_it << key;
            not_all |= (u32)!sees_it << key;
        }
    }
    const u32 any = reduce_or(some);
    return {own, any, (any & reduce_or(not_all)) != 0};
}

template <s32 N> KV_DEVICE void mask_scores(float (&s)[N][4], u32 own) {
#pragma unroll
    for (s32 i = 0; i < 4 * N; i++)
        if (!(own >> i & 1))
            s[i >> 2][i & 3] = MINUS_INFINITY;
}

/* Values that no row sees may be anything: zeros for them, or for what they are multiplied with. */
template <bool RAW> KV_DEVICE void clear_unseen(u8 *tile, u32 seen) {
    constexpr s32 numbers = METADATA_BYTES<V_FORMAT, HEAD_DIM_V> / 2;
#pragma unroll 1
    for (s32 key = 0; key < TILE<RAW>; key++) {
        if (seen >> key & 1)
            continue;
        if constexpr (V_ENCODED<RAW>) {
            u16 *metadata = reinterpret_cast<u16 *>(tile + TILE_METADATA<V_FORMAT, HEAD_DIM_V>);
#pragma unroll 1
            for (s32 i = lane_id(); i < numbers; i += 32)
                metadata[key * numbers + i] = 0;
        } else {
#pragma unroll 1
            for (s32 column = lane_id(); column < V_CHUNKS; column += 32)
                *reinterpret_cast<uint4 *>(chunk_of<V_CHUNKS>(tile, key, column)) = uint4{};
        }
    }
    sync_warp();
}

/* Whether one of the tile's values of the slice is an infinity or a NaN. */
KV_DEVICE bool has_not_finite(u8 *tile, s32 num_keys, s32 first, s32 columns) {
    u32 found = 0;
#pragma unroll 1
    for (s32 i = lane_id(); i < num_keys * columns; i += 32) {
        const uint4 chunk = *reinterpret_cast<const uint4 *>(
            chunk_of<V_CHUNKS>(tile, i / columns, first + i % columns));
        found |= not_finite_halves<V_IS_BF16>(chunk.x) | not_finite_halves<V_IS_BF16>(chunk.y) |
                 not_finite_halves<V_IS_BF16>(chunk.z) | not_finite_halves<V_IS_BF16>(chunk.w);
    }
    return any(found != 0);
}

/* Infinities and NaN among values that other rows do not see: these rows' weights are 0, and 0 times
 * such a value would be a NaN. They are added to the sums of the rows that see them, and zeros put in
 * their place. */
KV_DEVICE void add_not_finite(Sums &o, u8 *tile, s32 num_keys, u32 own, s32 slice) {
    constexpr s32 most = 2 * V_STEPS;
    const s32 first = V_IN_K ? slice * most : 0, pair = lane_id() & 3;
    const s32 columns = V_IN_K && SLICES > 1 ? min(most, K_CHUNKS - first) : most;
    if (!has_not_finite(tile, num_keys, first, columns))
        return;
#pragma unroll 1
    for (s32 i = 0; i < num_keys * columns; i++) {
        const s32 key = i / columns, column = i % columns;
        u32 *word = reinterpret_cast<u32 *>(chunk_of<V_CHUNKS>(tile, key, first + column)) + pair;
        const u32 halves = not_finite_halves<V_IS_BF16>(*word);
        const u32 bits =
            shfl(own, (lane_id() & ~3) | (key >> 1 & 3)) >> (4 * (key >> 3) + (key & 1));
        if (!any(halves != 0))
            continue;
        const float low = halves & 0x8000u ? unpack<V_IS_BF16>((u16)*word) : 0.0f;
        const float high = halves >> 16 ? unpack<V_IS_BF16>((u16)(*word >> 16)) : 0.0f;
#pragma unroll
        for (s32 n = 0; n < most; n++)
#pragma unroll
            for (s32 half = 0; half < 2; half++)
                if (n == column && bits >> 2 * half & 1) {
                    o[n][2 * half] += low;
                    o[n][2 * half + 1] += high;
                }
        sync_warp();
        bool found = false;
        if (lane_id() < 4)
            *word = finite_pair<V_IS_BF16>(*word, found);
    }
    sync_warp();
}

/* Makes a tile's values such that a weight of 0 keeps a row from them. */
template <bool RAW> KV_DEVICE void part_values(Sums &o, u8 *tile, const Seen &seen, s32 slice) {
    if (V_IN_K) /* when no lane reads them as keys any more */
        sync_warp();
    clear_unseen<RAW>(tile, seen.any);
    if constexpr (!V_ENCODED<RAW>)
        if (seen.mixed)
            add_not_finite(o, tile, TILE<RAW>, seen.own, slice);
}
