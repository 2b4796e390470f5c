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
 * that the mma take; some 900 instructions are issued, half of that time; 2048 exponentials, a third.
 * Two blocks share a multiprocessor, so that one's softmax runs beside the other's products. Rows of
 * the query heads of a KV head lie together: 32 tokens of 4 heads read a key once, and causality
 * halves the work but for two tiles.
 *
 * Quantized rows are expanded once for all rows of a block (prefill_expand.cuh), which costs about a
 * tenth of a tile's products with 128 rows; what is left of their transforms is done once, on o.
 */
#include "prefill_expand.cuh"
#include "prefill_query.cuh"
#include "prefill_tile.cuh"

/* The sequence and its tile of ROWS rows that block `index` of the grid takes; -1: none is left.
 * Sequences with few rows have no tiles. The last ones see most and come first. */
KV_DEVICE s32 find_tile(const AttendParams &p, s32 index, s32 &sequence) {
    for (s32 start = 0; start < p.plan.num_sequences; start += 32) {
        const s32 s = start + lane_id();
        s32 tiles = 0;
        if (s < p.plan.num_sequences) {
            const s32 rows = (p.plan.query_starts[s + 1] - p.plan.query_starts[s]) * p.group;
            tiles = rows > p.few_rows ? (rows + ROWS - 1) / ROWS : 0;
        }
        s32 end = tiles; /* of tiles up to this lane's */
        for (u32 delta = 1; delta < 32; delta *= 2) {
            const s32 before = shfl_up(end, delta);
            end += lane_id() >= delta ? before : 0;
        }
        const u32 beyond = ballot(index < end);
        if (beyond) {
            const s32 lane = count_bits((beyond & -beyond) - 1);
            sequence = start + lane;
            return shfl(end, lane) - 1 - index;
        }
        index -= shfl(end, 31);
    }
    return -1;
}

/* The rows that a block takes of a KV head. */
struct Place {
    Sequence seq;
    s32 first_row; /* of the sequence's */
};

KV_DEVICE bool find_place(const AttendParams &p, Place &place) {
    s32 sequence = 0;
    const s32 tile = find_tile(p, opaque(blockIdx.x), sequence);
    if (tile < 0)
        return false;
    place.seq = sequence_of(p, sequence);
    place.first_row = ROWS * tile;
    return true;
}

/* Tiles of keys that a pass visits: the first, for the head, and those from `first` to `last`. */
struct Tiles {
    s32 head, first, last;
};

KV_DEVICE Tiles tiles_of(const Wanted &wanted) {
    Tiles tiles;
    tiles.first = wanted.begin < wanted.end ? wanted.begin / KEYS : 0;
    tiles.last = wanted.begin < wanted.end ? (wanted.end + KEYS - 1) / KEYS : 0;
    tiles.head = wanted.head > 0 && (tiles.first > 0 || tiles.last == 0);
    return tiles;
}

/* The keys that pass RAW reads for some row of the block. */
template <bool RAW> KV_DEVICE Wanted wanted_by(const AttendParams &p, const Place &place) {
    const Sequence &seq = place.seq;
    const s32 last_row = min(place.first_row + ROWS, seq.num_new * p.group) - 1;
    const JointSight joint = joint_sight(p, seq, place.first_row / p.group, last_row / p.group);
    Wanted wanted = {0, joint.begin, joint.end};
    if (RAW) {
        wanted.head = joint.begin < seq.raw_first ? min(seq.raw_first, joint.end) : 0;
        wanted.begin = max(joint.begin, joint.raw_begin);
    } else if (QUANTIZED && seq.has_raw) {
        wanted.begin = max(joint.begin, seq.raw_first);
        wanted.end = min(joint.end, joint.raw_end);
    }
    return wanted;
}

/* Whether all rows of the block see all keys of the tile: as its first and its last token do, unless
 * options have a say. */
template <bool RAW>
KV_DEVICE bool block_takes_all(const AttendParams &p, const Place &place, s32 first) {
    if (OPTIONS)
        return false;
    const Sequence &seq = place.seq;
    const s32 last_row = min(place.first_row + ROWS, seq.num_new * p.group) - 1;
    return takes_all<RAW>(p, seq, sight_of(p, seq, place.first_row / p.group), first) &&
           takes_all<RAW>(p, seq, sight_of(p, seq, last_row / p.group), first);
}

/* Keeps values that are not finite from rows that do not see them. */
template <bool RAW>
KV_DEVICE void part_not_finite(const AttendParams &p, const Place &place, const Shared &shared,
                               s32 stage, s32 first, const WarpTokens &tokens, WarpState &state) {
    u8 *values = v_tile<RAW>(shared, stage);
    if (block_takes_all<RAW>(p, place, first) || !has_not_finite(values))
        return;
    if (tokens.first <= tokens.last)
        add_not_finite<RAW>(p, place.seq, place.first_row, state, values, first);
    sync_threads();
    clear_not_finite(values);
    sync_threads();
}

template <bool RAW>
KV_DEVICE void attend_pass(const AttendParams &p, const Place &place, const Shared &shared,
                           WarpState &state) {
    const Sequence &seq = place.seq;
    const s32 head = blockIdx.y;
    const Wanted wanted = wanted_by<RAW>(p, place);
    const Source k = {p.k, p.plan, seq, head}, v = {p.v, p.plan, seq, head};
    const Tiles tiles = tiles_of(wanted);
    const s32 count = tiles.head + tiles.last - tiles.first;
    if (count == 0)
        return;
    const auto first_key = [&](s32 i) {
        return KEYS * (i < tiles.head ? 0 : tiles.first + i - tiles.head);
    };
    sync_threads(); /* the pass before is done with what this one loads over */
    load_tile<RAW>(shared, 0, k, v, first_key(0), wanted);
    load_query<RAW>(p, seq, head, place.first_row, shared);
    const WarpTokens tokens = tokens_of_warp(p, seq, place.first_row);
#pragma unroll 1
    for (s32 i = 0; i < count; i++) {
        const s32 stage = i & 1;
        cp_async_wait<0>();
        sync_threads(); /* this stage is there, and nobody reads the other any more */
        if (i + 1 < count)
            load_tile<RAW>(shared, stage ^ 1, k, v, first_key(i + 1), wanted);
        if constexpr (K_ENCODED<RAW> || V_ENCODED<RAW>) {
            expand_tile(shared, stage, first_key(i), wanted);
            sync_threads();
        }
        if constexpr (!V_ENCODED<RAW>)
            part_not_finite<RAW>(p, place, shared, stage, first_key(i), tokens, state);
        if (tokens.first <= tokens.last)
            attend_tile<RAW>(p, seq, place.first_row, tokens, shared, k_tile<RAW>(shared, stage),
                             v_tile<RAW>(shared, stage), first_key(i), state);
    }
}

/* Of encoded values: o was summed over levels. */
KV_DEVICE void undo_transform(const AttendParams &p, WarpState &state) {
    const s32 head = blockIdx.y, pair = 2 * (lane_id() & 3);
#pragma unroll
    for (s32 t = 0; t < ROW_TILES; t++) {
        if constexpr (IS_ROTATED<V_FORMAT>)
            rotate_back<HEAD_DIM_V>(state.o[t]);
        if constexpr (V_FORMAT == KV_FORMAT_INT8_STATIC)
#pragma unroll
            for (s32 n = 0; n < HEAD_DIM_V / 8; n++)
#pragma unroll
                for (s32 i = 0; i < 4; i++)
                    state.o[t][n][i] *= p.v.scales[head * HEAD_DIM_V + 8 * n + pair + (i & 1)];
    }
}

KV_DEVICE void store_pair(const Rows &out, s64 at, float a, float b) {
    if (out.dtype == 0) {
        float *to = static_cast<float *>(out.data) + at;
        *reinterpret_cast<float2 *>(to) = float2{a, b};
    } else {
        u16 *to = static_cast<u16 *>(out.data) + at;
        *reinterpret_cast<u32 *>(to) = out.dtype == 1 ? pack_f16(a, b) : pack_bf16(a, b);
    }
}

KV_DEVICE void store_rows(const AttendParams &p, const Place &place, const WarpState &state) {
    const Sequence &seq = place.seq;
    const s32 head = opaque(blockIdx.y), pair = 2 * (lane_id() & 3);
#pragma unroll
    for (s32 t = 0; t < ROW_TILES; t++)
#pragma unroll
        for (s32 half = 0; half < 2; half++) {
            State total = {state.m[t][half], sum_of_quad(state.l[t][half])};
            const s32 row = place.first_row + row_of_lane(t, half);
            if (row >= seq.num_new * p.group)
                continue;
            const s32 query_head = head * p.group + row % p.group;
            float keep = 1.0f;
            if (p.sinks) {
                float take;
                merge_state(total, {p.sinks[query_head] * LOG2E, 1.0f}, keep, take);
            }
            keep = total.l == 0.0f ? 0.0f : keep / total.l;
            const s64 at = offset_of_row(p.out, p, seq, head, row);
#pragma unroll
            for (s32 n = 0; n < HEAD_DIM_V / 8; n++)
                store_pair(p.out, at + 8 * n + pair, keep * state.o[t][n][2 * half],
                           keep * state.o[t][n][2 * half + 1]);
            if (p.lse && (lane_id() & 3) == 0)
                p.lse[(s64)(seq.first_token + row / p.group) * p.q.num_heads + query_head] =
                    natural_lse(total);
        }
}

/* Registers are short within a pass: what can be found again is found again after it. */
KV_KERNEL(prefill, AttendParams, THREADS, ROW_TILES) {
    KV_DYNAMIC_SHARED(u8, bytes);
    const Shared shared = cut_shared(bytes);
    Place place;
    if (!find_place(p, place))
        return;
    WarpState state = {};
#pragma unroll
    for (s32 t = 0; t < ROW_TILES; t++)
        state.m[t][0] = state.m[t][1] = MINUS_INFINITY;
    attend_pass<false>(p, place, shared, state);
    if constexpr (QUANTIZED) {
        undo_transform(p, state);
        find_place(p, place);
        if (place.seq.has_raw)
            attend_pass<true>(p, place, shared, state);
    }
    find_place(p, place);
    store_rows(p, place, state);
}
