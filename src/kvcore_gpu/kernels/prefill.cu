/* Attention of sequences with many query rows: FlashAttention-2 (Dao, arXiv 2307.08691) over paged
 * keys and values, by mma.m16n8k16. Specialisations: prefill_layout.cuh.
 *
 * A block has ROWS query rows of a sequence and KV head, (new token, query head) pairs, and goes
 * over its keys in tiles: copies fill one stage of a ring while products read the other. Each warp
 * keeps the sums of its own rows in registers, so that warps meet once a tile.
 *
 * The floor is the rate of mma.sync, 4 head_dim products and sums for a row and key, which on Hopper
 * is less than two thirds of what wgmma has. Beside it, for 32 rows of a warp, 64 keys and head_dim
 * 128 (256 mma): 40 KiB of fragments are read from shared memory, about three quarters of the time
 * that the mma take; 1100 instructions are issued, the mma among them, two thirds of that time; 2048
 * exponentials, a third. Two blocks share a multiprocessor, so that one's softmax runs beside the
 * other's products. Rows of the query heads of a KV head lie together: 32 tokens of 4 heads read a
 * key once, and causality halves the work but for two tiles.
 *
 * Quantized rows are expanded once for all rows of a block (prefill_expand.cuh), which costs about a
 * tenth of a tile's products with 128 rows; what is left of their transforms is done once, on o. What
 * is rare is a loop: every pair of formats is a kernel of its own, to be compiled.
 */
#include "prefill_expand.cuh"
#include "prefill_not_finite.cuh"
#include "prefill_parts.cuh"
#include "prefill_place.cuh"

KV_DEVICE Tiles tiles_of(const Wanted &wanted) {
    Tiles tiles;
    tiles.first = wanted.begin < wanted.end ? wanted.begin / KEYS : 0;
    tiles.last = wanted.begin < wanted.end ? (wanted.end + KEYS - 1) / KEYS : 0;
    tiles.head = wanted.head > 0 && (tiles.first > 0 || tiles.last == 0);
    return tiles;
}

/* The tokens of the block's rows. */
KV_DEVICE s32 first_token_of(const AttendParams &p, const Place &place) {
    return (u32)place.first_row / (u32)p.group;
}
KV_DEVICE s32 last_token_of(const AttendParams &p, const Place &place) {
    const s32 end = min(place.first_row + ROWS, num_rows_of(p, place.seq));
    return (u32)(end - 1) / (u32)p.group;
}

/* The keys that a pass reads for some row of the block. */
KV_DEVICE Wanted wanted_by(const AttendParams &p, const Place &place, bool raw) {
    const Sequence &seq = place.seq;
    const JointSight joint = joint_sight(p, seq, first_token_of(p, place), last_token_of(p, place));
    Wanted wanted = {0, joint.begin, joint.end};
    if (QUANTIZED && raw) {
        wanted.head = joint.begin < seq.raw_first ? min(seq.raw_first, joint.end) : 0;
        wanted.begin = max(joint.begin, joint.raw_begin);
    } else if (QUANTIZED && seq.has_raw) {
        wanted.begin = max(joint.begin, seq.raw_first);
        wanted.end = min(joint.end, joint.raw_end);
    }
    return wanted;
}

/* From which key on some row of the block does not take what others do; 0 with options. What the first
 * token of a block takes without them, all others take. */
KV_DEVICE s32 end_of_shared(const AttendParams &p, const Place &place, bool raw) {
    if (OPTIONS || raw)
        return 0;
    const Sight sight = sight_of(p, place.seq, first_token_of(p, place));
    return taken_by(place.seq, sight, raw).end;
}

/* The part's keys of those that the first pass wants. Where a tile wants none at all, its first part
 * is there to say so. */
KV_DEVICE void cut_to_part(Place &place, Wanted &wanted) {
    const s32 keys = place.split_keys;
    const bool some = wanted.begin < wanted.end;
    place.first_part = some ? wanted.begin / keys : 0;
    place.end_part = some ? (wanted.end + keys - 1) / keys : 1;
    wanted.begin = max(wanted.begin, place.part * keys);
    wanted.end = min(wanted.end, (place.part + 1) * keys);
}

/* What the pass is to do, for all threads to read. */
KV_DEVICE void plan_pass(const AttendParams &p, Place &place, Pass &pass, bool raw) {
    if (threadIdx.x == 0) {
        pass.wanted = wanted_by(p, place, raw);
        if (!raw && place.split_keys)
            cut_to_part(place, pass.wanted);
        pass.tiles = tiles_of(pass.wanted);
        pass.count = pass.tiles.head + pass.tiles.last - pass.tiles.first;
        pass.shared_end = end_of_shared(p, place, raw);
    }
    const WarpSight sight = look(p, place, raw);
    const s32 warp = warp_id();
    if (lane_id() == 0) {
        pass.sights[warp] = sight;
        pass.not_finite[0][warp] = pass.not_finite[1][warp] = -1;
    }
    sync_threads();
}

/* The copies of tile i, which the loop has at i - 1, and the look into the tables for the next. */
KV_DEVICE void prepare_tile(const AttendParams &p, const Place &place, const Shared &shared, s32 i,
                            bool raw) {
    Pass &pass = *shared.pass;
    if (i >= 0 && i < pass.count)
        load_tile(p, shared, i & 1, blockIdx.y, first_key(pass.tiles, i), raw);
    if (i + 1 < pass.count)
        look_up(p, place.seq, pass, i + 1 & 1, first_key(pass.tiles, i + 1), raw);
    cp_async_commit();
}

/* Whether some warp has noted values that are not finite in tile i. */
KV_DEVICE bool is_noted(const Pass &pass, s32 i) {
    return any(lane_id() < WARPS && pass.not_finite[i & 1][lane_id() % WARPS] == i);
}

KV_DEVICE void attend_pass(const AttendParams &p, const Place &place, const Shared &shared,
                           bool raw, WarpState &state) {
    Pass &pass = *shared.pass;
    prepare_tile(p, place, shared, -1, raw);
    s32 i = -1;
#pragma unroll 1
    do {
        const s32 stage = i & 1, first = first_key(pass.tiles, i), warp = warp_id();
        u8 *const values = v_tile(shared, raw, stage);
        /* Rows of values as they are, some of which a row does not take. */
        const bool parted = (!V_QUANTIZED || raw) && i >= 0 && first + KEYS > pass.shared_end;
        cp_async_wait<0>();
        if (parted && has_copied_not_finite(values) && lane_id() == 0)
            pass.not_finite[stage][warp] = i;
        sync_threads(); /* this stage is there, and nobody reads the other any more */
        prepare_tile(p, place, shared, i + 1, raw);
        if (i < 0) {
            load_query(p, place, blockIdx.y, shared, raw);
            if (QUANTIZED && raw && threadIdx.x < KEYS)
                shared.key_scales[threadIdx.x] = shared.value_scales[threadIdx.x] = 1.0f;
            continue;
        }
        if (QUANTIZED && !raw) {
            expand_tile(shared, stage, first, range_of(pass.wanted, first));
            sync_threads();
        }
        const WarpSight sight = pass.sights[warp];
        if (parted && is_noted(pass, i))
            part_not_finite(p, place, raw, sight.end > 0, values, first, state);
        if (sight.begin < first + KEYS && first < sight.end)
            attend_tile(p, place, shared, raw,
                        first < sight.every_begin || first + KEYS > sight.every_end,
                        k_tile(shared, raw, stage), values, first, state);
    } while (++i < pass.count);
}

KV_KERNEL(prefill, AttendParams, THREADS, ROW_TILES) {
    KV_DYNAMIC_SHARED(u8, bytes);
    const Shared shared = cut_shared(bytes);
    Place &place = shared.pass->place;
    if (warp_id() == 0)
        find_place(p, place, blockIdx.x);
    sync_threads();
    if (place.first_row < 0)
        return;
    WarpState state = {};
#pragma unroll
    for (s32 t = 0; t < ROW_TILES; t++)
        state.m[t][0] = state.m[t][1] = MINUS_INFINITY;
    bool raw = false;
#pragma unroll 1
    for (;;) {
        plan_pass(p, place, *shared.pass, raw);
        if (place.split_keys && (place.part < place.first_part || place.part >= place.end_part))
            return;
        attend_pass(p, place, shared, raw, state);
        cp_async_wait<0>();
        sync_threads(); /* nobody reads a tile any more; queries have come, where none was read */
        put_rows(shared, state);
        if (place.split_keys && !raw) {
            store_part(p, place, shared);
            if (!is_last_part(p, place))
                return;
            merge_parts(p, place, shared);
        } else if (!raw) {
            undo_transform_of_rows(p, shared, blockIdx.y);
        }
        if (!QUANTIZED || raw || !place.seq.has_raw)
            break;
        get_rows(shared, state);
        raw = true;
    }
    store_rows(p, place, shared, blockIdx.y);
}
