/* Attention of few query rows over a paged cache: decoding, and whatever has long rows.
 *
 * A block of four warps takes a split of a sequence's keys, a KV head and a tile of up to 16 query
 * rows, which the 16 rows of m16n8k16 are. Each warp streams tiles of 16 keys of its own through a
 * ring in shared memory, without a barrier between warps before the end; a group of query heads costs
 * no more reads than one. The last block of a tile merges what all have left (partials.cuh).
 *
 * The floor is the time that K and V take to arrive: 2 * head_dim * bytes an element for each token
 * and KV head, over the bandwidth. To keep the memory busy a multiprocessor has to have latency times
 * bandwidth under way (about 20 KiB on an H100): two blocks of four warps with two tiles each ahead
 * have 128 KiB at 16 bits and head_dim 128, three blocks with three each 74 KiB at 4 bits. Encoded
 * rows come as they are and are decoded in registers: K's scales go into the scores and V's into the
 * weights, and the products of matrices are the same.
 */
#include "decode_edges.cuh"
#include "decode_keys.cuh"
#include "decode_ring.cuh"
#include "partials.cuh"

/* What a lane knows of its two rows, lane / 4 and 8 further: scores are to be multiplied by `factors`,
 * then `biases` is to be added. With OPTIONS that is done to each score. Without, weights take in the
 * factors, which have the scale in them, and m what is the same for all keys of a row (add_biases). */
struct Rows2 {
    float factors[2], biases[2], slopes[2];
    s32 positions[2];
};

KV_DEVICE Rows2 own_rows(const AttendParams &p, const Work &work, const Shared &shared) {
    Rows2 rows;
#pragma unroll
    for (s32 half = 0; half < 2; half++) {
        const s32 row = (lane_id() >> 2) + 8 * half;
        rows.factors[half] = shared.row_factors[row];
#if OPTIONS
        rows.biases[half] = shared.row_biases[row];
        const s32 at = work.first_row + min(row, work.num_rows - 1);
        rows.positions[half] = sight_of_row(p, work, row).position;
        rows.slopes[half] = p.alibi_slopes ? p.alibi_slopes[query_head_of(p, work.head, at)] : 0.0f;
#else
        /* Scores may be 0 or -inf: a factor of infinity or 0 would make a NaN of them. */
        constexpr float LEAST = __builtin_bit_cast(float, 0x00800000u);
        constexpr float LARGEST = __builtin_bit_cast(float, 0x7f7fffffu);
        rows.factors[half] = fminf(fmaxf(rows.factors[half] * (p.scale * LOG2E), LEAST), LARGEST);
#endif
    }
    return rows;
}

template <s32 N>
KV_DEVICE void apply_options(const AttendParams &p, const Sequence &seq, const Rows2 &rows, s32 j,
                             float (&s)[N][4]) {
#pragma unroll
    for (s32 n = 0; n < N; n++)
#pragma unroll
        for (s32 i = 0; i < 4; i++) {
            const s32 half = i >> 1, key = j + 8 * n + 2 * (lane_id() & 3) + (i & 1);
            Sight sight = {};
            sight.position = rows.positions[half];
            const float product = fmaf(s[n][i], rows.factors[half], rows.biases[half]);
            s[n][i] = finish_score(p, seq, sight, rows.slopes[half], key, product);
        }
}

/* What codes are decoded with. */
struct Tables {
    HalfTable k, v;
};

KV_DEVICE Tables kept_tables() {
    Tables tables = {};
    if constexpr (K_QUANTIZED)
        tables.k = kept_table<K_FORMAT, F16>();
    if constexpr (V_QUANTIZED)
        tables.v = kept_table<V_FORMAT, BF16>();
    return tables;
}

/* A warp's sums over its tiles. */
struct WarpState {
    float m[2], l[2];
    Sums o;
};

/* At the end, so that no register holds them before. */
KV_DEVICE void add_biases(const AttendParams &p, const Shared &shared, WarpState &state) {
#pragma unroll
    for (s32 half = 0; half < 2; half++)
        state.m[half] += shared.row_biases[(lane_id() >> 2) + 8 * half] * (p.scale * LOG2E);
}

/* Most tiles leave the maximum of a row as it was. */
KV_DEVICE void rescale(WarpState &state, const float (&keep)[2]) {
    if (!any(keep[0] != 1.0f || keep[1] != 1.0f))
        return;
#pragma unroll
    for (s32 half = 0; half < 2; half++)
        state.l[half] *= keep[half];
#pragma unroll
    for (s32 n = 0; n < 2 * V_STEPS; n++)
#pragma unroll
        for (s32 i = 0; i < 4; i++)
            state.o[n][i] *= keep[i >> 1];
}

KV_DEVICE void attend_tile(const AttendParams &p, const Work &work, const Whole &whole,
                           const Rows2 &rows, const Queries &queries, const Tables &tables,
                           u8 *stage, s32 j, bool raw, WarpState &state) {
    u8 *v_tile = V_IN_K ? stage : stage + (raw ? RAW_K_TILE_BYTES : K_TILE_BYTES);
    bool edge = raw || j < whole.begin || j + TILE > whole.end;
    Seen seen = {};
    if (edge) {
        seen = look_at_tile(p, work, j, raw);
        if (seen.any == 0)
            return;
        edge = seen.every != low_bits<u32>(TILE);
    }
    Scores s = {};
    multiply_keys(s, stage, queries, tables.k, raw);
    if constexpr (OPTIONS)
        apply_options(p, work.seq, rows, j, s);
    if (edge)
        mask_scores(s, seen.own);
    float keep[2];
    if constexpr (OPTIONS)
        weigh_tile(s, state.m, keep);
    else
        weigh_tile(s, state.m, rows.factors, keep);
    rescale(state, keep);
    if (edge)
        part_values(state.o, v_tile, seen, work.slice, raw);
    add_values(state.o, state.l, s, v_tile, work.slice, tables.v, raw);
}

/* Raw keys, of which a warp has few: no tile is under way while it works on one. */
KV_DEVICE void attend_raw(const AttendParams &p, const Work &work, const Shared &shared,
                          const Rows2 &rows, u8 *stage, WarpState &state) {
    Queries queries;
    queries.tile = shared.query;
    if (!K_QUANTIZED) /* else each tile loads them */
        queries.keep();
    auto cursor = cursor_of<WARPS>(tiles_of<true, RAW_TILE>(p, work), warp_id());
#pragma unroll 1
    for (; cursor.has_tile(); cursor.advance()) {
        const s32 j = cursor.at * RAW_TILE;
        copy_raw_tile(p, work, stage, j);
        cp_async_wait<0>();
        sync_warp();
        attend_tile(p, work, {0, 0}, rows, queries, {}, stage, j, true, state);
        sync_warp();
    }
}

/* The keys of a split, or all raw ones. */
KV_DEVICE void attend_part(const AttendParams &p, const Work &work, const Shared &shared, bool raw,
                           WarpState &state) {
    constexpr s32 ahead = (STAGES - 1) * STAGE_BYTES;
    u8 *const ring_begin = shared.ring + warp_id() * WARP_RING_BYTES;
    u8 *stage = ring_begin, *last = ring_begin + ahead; /* the one that was read last */
    const Ranges<false> none = {0, 0};
    auto cursor = cursor_of<WARPS>(raw ? none : tiles_of<false, TILE>(p, work), warp_id());
    Ring ring = make_ring(p, work, cursor);
#pragma unroll 1
    for (u8 *first = ring_begin; first != last; first += STAGE_BYTES)
        ring.copy_next(first);
    load_queries(p, work, shared, raw);
    sync_threads();
    const Rows2 rows = own_rows(p, work, shared);
    if (raw)
        attend_raw(p, work, shared, rows, ring_begin, state);
    Queries queries;
    queries.tile = shared.query;
    queries.keep();
    const Whole whole = find_whole(p, work);
    const Tables tables = kept_tables();
#pragma unroll 1
    for (; cursor.has_tile(); cursor.advance()) {
        ring.copy_next(last);
        cp_async_wait<STAGES - 1>();
        sync_warp();
        attend_tile(p, work, whole, rows, queries, tables, stage, cursor.at * TILE, false, state);
        sync_warp();
        last = stage;
        stage = stage == ring_begin + ahead ? ring_begin : stage + STAGE_BYTES;
    }
    cp_async_wait<0>();
    if constexpr (!OPTIONS)
        add_biases(p, shared, state);
}

KV_DEVICE void store_warp(const Shared &shared, const WarpState &state) {
    const s32 row = lane_id() >> 2, warp = warp_id();
#pragma unroll
    for (s32 half = 0; half < 2; half++) {
        const s32 at = warp * ROWS + row + 8 * half;
        const float l = sum_of_quad(state.l[half]);
        if ((lane_id() & 3) == 0) {
            shared.m[at] = state.m[half];
            shared.l[at] = l;
        }
        float *sums = shared.sums + at * SUM_PITCH + 2 * (lane_id() & 3);
#pragma unroll
        for (s32 n = 0; n < 2 * V_STEPS; n++)
            *reinterpret_cast<float2 *>(sums + 8 * n) =
                float2{state.o[n][2 * half], state.o[n][2 * half + 1]};
    }
}

/* The four warps of each row together, in their order. */
KV_DEVICE void store_partials(const AttendParams &p, const Work &work, const Shared &shared,
                              bool raw) {
    const s32 row = threadIdx.x;
    if (row < work.num_rows) {
        State all = empty_state();
#pragma unroll
        for (s32 warp = 0; warp < WARPS; warp++)
            all.m = fmaxf(all.m, shared.m[warp * ROWS + row]);
        const float top = finite_maximum(all.m);
#pragma unroll
        for (s32 warp = 0; warp < WARPS; warp++) {
            const float weight = exp2_approx(shared.m[warp * ROWS + row] - top);
            shared.weights[warp * ROWS + row] = weight;
            all.l = fmaf(shared.l[warp * ROWS + row], weight, all.l);
        }
        if (work.slice == 0)
            store_state(p, partial_index(p, work, row, work.part), all);
    }
    sync_threads();
#pragma unroll 1
    for (s32 i = threadIdx.x; i < work.num_rows * SLICE_DIM; i += THREADS) {
        const s32 at = i / SLICE_DIM, d = i % SLICE_DIM, element = work.slice * SLICE_DIM + d;
        s32 column = d;
        if constexpr (V_QUANTIZED)
            column = raw ? d : column_of_code<V_FORMAT, HEAD_DIM_V>(d);
        float sum = 0.0f;
#pragma unroll
        for (s32 warp = 0; warp < WARPS; warp++)
            sum = fmaf(shared.sums[(warp * ROWS + at) * SUM_PITCH + column],
                       shared.weights[warp * ROWS + at], sum);
        if (element < HEAD_DIM_V)
            p.partial_out[partial_index(p, work, at, work.part) * HEAD_DIM_V + element] = sum;
    }
}

KV_KERNEL(decode, AttendParams, THREADS, MIN_BLOCKS) {
    KV_DYNAMIC_SHARED(u8, bytes);
    KV_SHARED Work work; /* which no thread has to hold while it sums */
    KV_SHARED s32 yes;
    if (threadIdx.x == 0)
        yes = find_work<ROWS, SLICES>(p, work);
    sync_threads();
    if (!yes)
        return;
    const Shared shared = cut_shared(bytes);
    const s32 parts = num_parts(work);
    if (parts > 0) { /* else there is a row of zeros to write */
        const bool raw = QUANTIZED && work.part == p.num_splits;
        WarpState state = {{MINUS_INFINITY, MINUS_INFINITY}, {}, {}};
        attend_part(p, work, shared, raw, state);
        sync_threads(); /* sums lie where the ring was */
        store_warp(shared, state);
        sync_threads();
        store_partials(p, work, shared, raw);
    }
    if (!is_last_block(p, work, parts * SLICES, &yes))
        return;
#pragma unroll 1
    for (s32 row = warp_id(); row < work.num_rows; row += WARPS)
        finish_row<V_FORMAT, HEAD_DIM_V>(p, work, row);
}
