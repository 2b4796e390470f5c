/* Tiles of which not every row sees every key: at the ends of what rows see, and where a mask has a
 * say. Few are, so that this code is to be short.
 */
#pragma once
#include "decode_values.cuh"
#include "key_bits.cuh"
#include "not_finite.cuh"
#include "work.cuh"

/* Where every row of the tile sees all keys, and reads none of them raw. */
struct Whole {
    s32 begin, end;
};

/* Row `row` of the tile. Those that are not there see what the last one does, so that they ask for no
 * mask of their own. */
KV_DEVICE Sight sight_of_row(const AttendParams &p, const Work &work, s32 row) {
    return sight_of(p, work.seq, token_of(p, work.first_row + min(row, work.num_rows - 1)));
}

KV_DEVICE Whole find_whole(const AttendParams &p, const Work &work) {
    const Sight sight = sight_of_row(p, work, lane_id() & (ROWS - 1));
    s32 begin = sight.begin, end = sight.end;
    if (QUANTIZED && work.seq.has_raw) {
        begin = max(begin, work.seq.raw_first);
        end = min(end, sight.raw_begin);
    }
    if (!is_range(p, sight))
        end = 0;
    return {reduce_max(begin), reduce_min(end)};
}

/* What rows take of a tile, a bit for each key: row lane % 16, some row, and every row. */
struct Seen {
    u32 own, any, every;
};

KV_DEVICE Seen look_at_tile(const AttendParams &p, const Work &work, s32 j, bool raw) {
    const Sight sight = sight_of_row(p, work, lane_id() & (ROWS - 1));
    Seen seen;
    seen.own = keys_seen<u32>(p, work.seq, sight, j) & low_bits<u32>(raw ? RAW_TILE : TILE);
    if (QUANTIZED)
        seen.own &= keys_read<u32>(work.seq, sight, j, raw);
    seen.any = reduce_or(seen.own);
    seen.every = ~reduce_or(~seen.own);
    return seen;
}

/* Scores of keys that a row does not take become -inf. */
template <s32 N> KV_DEVICE void mask_scores(float (&s)[N][4], u32 own) {
#pragma unroll
    for (s32 half = 0; half < 2; half++) {
        const u32 keys = shfl(own, (lane_id() >> 2) + 8 * half) >> 2 * (lane_id() & 3);
#pragma unroll
        for (s32 i = 0; i < 2 * N; i++)
            if (!(keys >> (8 * (i >> 1) + (i & 1)) & 1))
                s[i >> 1][2 * half + (i & 1)] = MINUS_INFINITY;
    }
}

/* Values that no row takes may be anything: zeros for them, or for what they are multiplied with. */
KV_DEVICE void clear_unseen(u8 *tile, u32 seen, bool raw) {
    constexpr s32 numbers = METADATA_BYTES<V_FORMAT, HEAD_DIM_V> / 2;
#pragma unroll 1
    for (s32 key = 0; key < (raw ? RAW_TILE : TILE); key++) {
        if (seen >> key & 1)
            continue;
        if (V_QUANTIZED && !raw) {
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
    for (s32 i = lane_id(); i < num_keys * columns; i += 32)
        found |= not_finite_halves<V_IS_BF16>(*reinterpret_cast<const uint4 *>(
            chunk_of<V_CHUNKS>(tile, i / columns, first + i % columns)));
    return any(found != 0);
}

KV_DEVICE void part_not_finite(Sums &o, u8 *tile, s32 num_keys, u32 own, s32 slice) {
    constexpr s32 most = 2 * V_STEPS;
    const s32 first = V_IN_K ? slice * most : 0;
    const s32 columns = V_IN_K && SLICES > 1 ? min(most, K_CHUNKS - first) : most;
    if (!has_not_finite(tile, num_keys, first, columns))
        return;
#pragma unroll 1
    for (s32 i = 0; i < num_keys * columns; i++) {
        const s32 key = i / columns, column = i % columns;
        u32 *pair = reinterpret_cast<u32 *>(chunk_of<V_CHUNKS>(tile, key, first + column)) +
                    (lane_id() & 3);
        if (!any(not_finite_halves<V_IS_BF16>(*pair) != 0))
            continue;
        add_pair<V_IS_BF16>(o, column, *pair, ballot(own >> key & 1));
        sync_warp();
        if (lane_id() < 4)
            *pair = finite_pair<V_IS_BF16>(*pair);
    }
    sync_warp();
}

/* Makes a tile's values such that a weight of 0 keeps a row from them. */
KV_DEVICE void part_values(Sums &o, u8 *tile, const Seen &seen, s32 slice, bool raw) {
    if (V_IN_K) /* when no lane reads them as keys any more */
        sync_warp();
    clear_unseen(tile, seen.any, raw);
    if ((!V_QUANTIZED || raw) && seen.any != seen.every)
        part_not_finite(o, tile, raw ? RAW_TILE : TILE, seen.own, slice);
}
