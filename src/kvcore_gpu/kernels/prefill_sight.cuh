/* What rows take of a pass: the keys that they see, and read encoded or raw. */
#pragma once
#include "key_bits.cuh"
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

/* Of the tile, the keys that row l % WARP_ROWS of the warp takes. */
KV_DEVICE u64 keys_of_lane(const AttendParams &p, const Place &place, bool raw, s32 first) {
    const Sight sight = sight_of_lane(p, place);
    u64 keys = keys_seen<u64>(p, place.seq, sight, first);
    if (QUANTIZED)
        keys &= keys_read<u64>(place.seq, sight, first, raw);
    return keys;
}
