/* What a block of decode.cu and simt.cu works on: a part of the keys of a tile of query rows.
 *
 * Rows of a KV head and a sequence are (new token, query head of its group) pairs, those of a token
 * side by side, in tiles of at most ROWS. A part is a split, or the keys that are read raw. A part
 * that no row of the tile sees has no block.
 */
#pragma once
#include "sight.cuh"

constexpr s32 SPLIT_LOG2 = 9;
constexpr s32 SPLIT = 1 << SPLIT_LOG2;

struct Work {
    Sequence seq;
    JointSight joint;
    s32 head;                /* KV head */
    s32 first_row, num_rows; /* of the tile, counted in the sequence */
    s32 slice;               /* of V's elements */
    s32 part;                /* the split, or p.num_splits: the raw keys */
    s32 begin, end; /* of the keys that some row reads encoded, or of any where none are raw */
    s32 first_split, end_split;
    bool some_raw;
    s64 index; /* (sequence, tile, head) of the launch */
};

KV_DEVICE s32 num_parts(const Work &work) {
    return work.end_split - work.first_split + work.some_raw;
}
KV_DEVICE s32 token_of(const AttendParams &p, s32 row) { return (u32)row / (u32)p.group; }
KV_DEVICE s32 query_head_of(const AttendParams &p, s32 head, s32 row) {
    return head * p.group + (s32)((u32)row % (u32)p.group);
}

KV_DEVICE void find_parts(Work &work) {
    const Sequence &seq = work.seq;
    const JointSight &joint = work.joint;
    work.begin = joint.begin;
    work.end = joint.end;
    if (seq.has_raw) {
        work.begin = max(work.begin, seq.raw_first);
        work.end = min(work.end, joint.raw_end);
    }
    const bool some = work.begin < work.end;
    work.first_split = some ? work.begin >> SPLIT_LOG2 : 0;
    work.end_split = some ? (work.end + SPLIT - 1) >> SPLIT_LOG2 : 0;
    work.some_raw = seq.has_raw && joint.begin < joint.end &&
                    (joint.begin < seq.raw_first || joint.end > joint.raw_begin);
}

/* Blocks are ((tile, slice, part), KV head, sequence). False: there is nothing for this one. Where
 * a tile sees nothing at all, its first block has no part, but a row of zeros to write. */
template <s32 ROWS, s32 SLICES> KV_DEVICE bool find_work(const AttendParams &p, Work &work) {
    const bool has_raw = p.k.raw || p.v.raw;
    const s32 parts = p.num_splits + has_raw;
    const s32 tile = blockIdx.x / (parts * SLICES), rest = blockIdx.x % (parts * SLICES);
    work.slice = rest / parts;
    work.part = rest % parts;
    work.head = blockIdx.y;
    work.seq = sequence_of(p, p.first_sequence + blockIdx.z);
    const s32 rows = work.seq.num_new * p.group;
    work.first_row = (p.first_tile + tile) * ROWS;
    if (rows > p.few_rows || work.first_row >= rows)
        return false;
    work.num_rows = min(rows - work.first_row, ROWS);
    work.index = ((s64)blockIdx.z * p.num_tiles + tile) * gridDim.y + blockIdx.y;
    work.joint = joint_sight(p, work.seq, token_of(p, work.first_row),
                             token_of(p, work.first_row + work.num_rows - 1));
    find_parts(work);
    if (work.part == p.num_splits)
        return work.some_raw;
    if (num_parts(work) == 0)
        return work.part == 0 && work.slice == 0;
    return work.first_split <= work.part && work.part < work.end_split;
}

/* Tiles of a part, counted from the sequence's first key: one range, or two of raw keys. */
template <bool RAW> struct Ranges {
    s32 first, end;
};
template <> struct Ranges<true> {
    s32 first, end, second, second_end;
};

template <bool RAW, s32 TILE>
KV_DEVICE Ranges<RAW> tiles_of(const AttendParams &p, const Work &work) {
    if constexpr (RAW) {
        const JointSight &joint = work.joint;
        Ranges<RAW> ranges;
        ranges.first = joint.begin / TILE;
        ranges.end = (min(joint.end, work.seq.raw_first) + TILE - 1) / TILE;
        ranges.second =
            max(max(joint.begin, joint.raw_begin) / TILE, max(ranges.end, ranges.first));
        ranges.second_end = (joint.end + TILE - 1) / TILE;
        return ranges;
    } else {
        const s32 begin = max(work.begin, work.part << SPLIT_LOG2);
        const s32 end = min(work.end, (work.part + 1) << SPLIT_LOG2);
        return {begin / TILE, (end + TILE - 1) / TILE};
    }
}

/* The tiles of one of STEP warps (or groups of lanes): those whose number is its own modulo STEP, a
 * power of two, so that who takes a key depends on where it is stored alone. */
template <bool RAW, s32 STEP> struct Cursor {
    Ranges<RAW> ranges;
    s32 at;

    KV_DEVICE bool has_tile() const { return at < ranges.end; }

    KV_DEVICE void start(s32 first, s32 phase) { at = first + ((phase - first) & (STEP - 1)); }

    /* On to the second range. */
    KV_DEVICE void settle(s32 phase) {
        if constexpr (RAW)
            if (at >= ranges.end && ranges.second < ranges.second_end) {
                start(ranges.second, phase);
                ranges.end = ranges.second_end;
                ranges.second = NEVER;
            }
    }

    KV_DEVICE void advance() {
        const s32 phase = at & (STEP - 1);
        at += STEP;
        settle(phase);
    }
};

template <s32 STEP, bool RAW>
KV_DEVICE Cursor<RAW, STEP> cursor_of(const Ranges<RAW> &ranges, s32 phase) {
    Cursor<RAW, STEP> cursor;
    cursor.ranges = ranges;
    cursor.start(ranges.first, phase);
    cursor.settle(phase);
    return cursor;
}
