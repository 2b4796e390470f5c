/* What rows take of a pass: the keys that they see, and read encoded or raw. */
#pragma once
#include "prefill_layout.cuh"

KV_DEVICE s32 num_rows_of(const AttendParams &p, const Sequence &seq) {
    return seq.num_new * p.group;
}

/* Of the block's rows: lane l has rows l / 4 and l / 4 + 8 of each 16 of its warp's. */
KV_DEVICE s32 row_of_lane(s32 t, s32 half, u32 warp = warp_id()) {
    return WARP_ROWS * warp + 16 * t + 8 * half + (lane_id() >> 2);
}

/* Keys j with begin <= j < end, of which j < head or j >= tail. */
struct Taken {
    s32 begin, end, head, tail;
};

KV_DEVICE Taken taken_by(const Sequence &seq, const Sight &sight, bool raw) {
    Taken taken = {sight.begin, sight.end, 0, sight.begin};
    if (!QUANTIZED || !seq.has_raw)
        return taken;
    if (raw) {
        taken.head = seq.raw_first;
        taken.tail = sight.raw_begin;
    } else {
        taken.begin = taken.tail = max(sight.begin, seq.raw_first);
        taken.end = min(sight.end, sight.raw_begin);
    }
    return taken;
}

/* Row l % WARP_ROWS of the warp, by lane l. Rows beyond the sequence's last stand for it, and are not
 * stored. */
KV_DEVICE Sight sight_of_lane(const AttendParams &p, const Place &place) {
    const s32 row = place.first_row + WARP_ROWS * warp_id() + lane_id() % WARP_ROWS;
    const s32 last = num_rows_of(p, place.seq) - 1;
    return sight_of(p, place.seq, (u32)min(row, last) / (u32)p.group);
}

/* Whether Taken says all: neither a mask nor positions leave keys out within. */
KV_DEVICE bool is_range(const AttendParams &p, const Sight &sight) {
#if OPTIONS
    return !sight.mask && !(p.window > 0 && p.positions);
#else
    return true;
#endif
}

KV_DEVICE WarpSight look(const AttendParams &p, const Place &place, bool raw) {
    if (place.first_row + WARP_ROWS * (s32)warp_id() >= num_rows_of(p, place.seq))
        return {0, 0, 0, 0};
    const Sight sight = sight_of_lane(p, place);
    const Taken taken = taken_by(place.seq, sight, raw);
    WarpSight warp;
    warp.begin = reduce_min(taken.begin < taken.end ? taken.begin : NEVER);
    warp.end = reduce_max(taken.end);
    warp.every_begin = reduce_max(max(taken.begin, taken.tail));
    warp.every_end = reduce_min(is_range(p, sight) ? taken.end : 0);
    return warp;
}

/* The lower `count` bits of 64; all of them from 64 on. */
KV_DEVICE u64 low_bits(s32 count) { return count >= 64 ? ~0ull : (1ull << max(count, 0)) - 1; }

/* Bit i: whether row l % WARP_ROWS of the warp takes key first + i of the tile. */
KV_DEVICE u64 keys_of_lane(const AttendParams &p, const Place &place, bool raw, s32 first) {
    const Sight sight = sight_of_lane(p, place);
    const Taken taken = taken_by(place.seq, sight, raw);
    u64 keys = low_bits(taken.end - first) & ~low_bits(taken.begin - first);
    if (QUANTIZED)
        keys &= low_bits(taken.head - first) | ~low_bits(taken.tail - first);
    if constexpr (OPTIONS) {
        static_assert(!OPTIONS || WARP_ROWS == 16, "two lanes have a row, and take turns");
        if (is_range(p, sight)) /* as the sequence's other rows */
            return keys;
#pragma unroll 1
        for (s32 i = lane_id() / WARP_ROWS; i < KEYS; i += 2)
            if (!sees(p, place.seq, sight, first + i))
                keys &= ~(1ull << i);
        keys &= shfl_xor(keys, WARP_ROWS);
    }
    return keys;
}
