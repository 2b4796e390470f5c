/* Which rows and keys each block of the grid takes. */
#pragma once
#include "prefill_layout.cuh"

/* How the rows and keys of a sequence are cut: the same whatever else the call has. */
struct Cut {
    s32 tiles, parts, split_keys;
};

KV_DEVICE Cut cut_of(const AttendParams &p, s32 sequence) {
    Cut cut = {0, 1, 0};
    if (sequence >= p.plan.num_sequences)
        return cut;
    const s32 rows = (p.plan.query_starts[sequence + 1] - p.plan.query_starts[sequence]) * p.group;
    if (rows <= p.few_rows)
        return cut;
    const u32 length = p.plan.seq_lens[sequence], tiles = (u32)(rows + ROWS - 1) / ROWS;
    const u32 parts =
        min(min((u32)MOST_PARTS, MOST_BLOCKS / (gridDim.y * tiles)), length / LEAST_KEYS);
    cut.tiles = tiles;
    if (parts >= 2) {
        const u32 keys = (length + parts - 1) / parts;
        cut.split_keys = (keys + SPLIT_KEYS - 1) / SPLIT_KEYS * SPLIT_KEYS;
        cut.parts = (length + cut.split_keys - 1) / cut.split_keys;
    }
    return cut;
}

/* Of the lanes up to this one. */
KV_DEVICE s32 sum_so_far(s32 x) {
    for (u32 delta = 1; delta < 32; delta *= 2) {
        const s32 before = shfl_up(x, delta);
        x += lane_id() >= delta ? before : 0;
    }
    return x;
}

/* The place of block `index` of the grid, by the first warp; the caller waits. Sequences with few rows
 * have none. Of those whose keys are cut, a launch takes p.num_tiles from p.first_tile on; the first
 * takes all others. A sequence's last rows see most and come first. */
KV_DEVICE void find_place(const AttendParams &p, Place &place, s32 index) {
    s32 num_cut = 0; /* sequences before */
    for (s32 start = 0; start < p.plan.num_sequences; start += 32) {
        const Cut cut = cut_of(p, start + lane_id());
        const u32 are_cut = ballot(cut.split_keys > 0);
        const s32 slot = num_cut + count_bits(are_cut & ((1u << lane_id()) - 1)) - p.first_tile;
        const bool here = cut.split_keys ? 0 <= slot && slot < p.num_tiles : p.first_tile == 0;
        const s32 units = here ? cut.tiles * cut.parts : 0, end = sum_so_far(units);
        const bool found = end - units <= index && index < end;
        if (found) {
            const u32 unit = end - 1 - index, tile = unit / (u32)cut.parts;
            place.seq = sequence_of(p, start + lane_id());
            place.first_row = ROWS * tile;
            place.part = unit - tile * cut.parts;
            place.split_keys = cut.split_keys;
            place.first_unit = slot * (s32)(MOST_BLOCKS / gridDim.y) + tile * cut.parts;
        }
        if (any(found))
            return;
        index -= shfl(end, 31);
        num_cut += count_bits(are_cut);
    }
    if (lane_id() == 0)
        place.first_row = -1;
}
