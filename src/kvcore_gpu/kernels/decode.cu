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
 * then `biases` is to be added. With OPTIONS that is done to each score. Without, both have the scale
 * in them, weights take in the factors, and m, at the end, what is the same for all keys of a row. */
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
        rows.biases[half] = shared.row_biases[row];
#if OPTIONS
        const s32 at = work.first_row + min(row, work.num_rows - 1);
        rows.positions[half] = sight_of_row(p, work, row).position;
        rows.slopes[half] = p.alibi_slopes ? p.alibi_slopes[query_head_of(p, work.head, at)] : 0.0f;
#else
        /* Scores may be 0 or -inf: a factor of infinity or 0 would make a NaN of them. */
        constexpr float LEAST = __builtin_bit_cast(float, 0x00800000u);
        constexpr float LARGEST = __builtin_bit_cast(float, 0x7f7fffffu);
        rows.factors[half] = fminf(fmaxf(rows.factors[half] * (p.scale * LOG2E), LEAST), LARGEST);
        rows.biases[half] *= p.scale * LOG2E;
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

template <bool RAW> KV_DEVICE Tables kept_tables() {
    Tables tables = {};
    if constexpr (K_ENCODED<RAW>)
        tables.k = kept_table<K_FORMAT, F16>();
    if constexpr (V_ENCODED<RAW>)
        tables.v = kept_table<V_FORMAT, BF16>();
    return tables;
}

/* A warp's sums over its tiles. */
struct WarpState {
    float m[2], l[2];
    Sums o;
};

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

template <bool RAW>
KV_DEVICE void attend_tile(const AttendParams &p, const Work &work, const Whole &whole,
                           const Rows2 &rows, const Queries<RAW> &queries, const Tables &tables,
                           u8 *stage, s32 j, WarpState &state) {
    u8 *v_tile = V_IN_K ? stage : stage + K_TILE_BYTES<RAW>;
    const bool edge = RAW || j < whole.begin || j + TILE<RAW> > whole.end;
    Seen seen = {};
    if (edge) {
        seen = look_at_tile<RAW>(p, work, j);
        if (seen.any == 0)
            return;
    }
    Scores<RAW> s = {};
    multiply_keys<RAW>(s, stage, queries, tables.k);
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
        part_values<RAW>(state.o, v_tile, seen, work.slice);
    Weights<RAW> weights;
    pack_tile<RAW>(weights, s, v_tile, state.l);
    multiply_values<RAW>(state.o, v_tile, weights, work.slice, tables.v);
}

template <bool RAW>
KV_DEVICE void attend_part(const AttendParams &p, const Work &work, const Shared &shared,
                           WarpState &state) {
    constexpr s32 ahead = (RING_STAGES<RAW> - 1) * STAGE_BYTES<RAW>;
    u8 *const ring_begin = shared.ring + warp_id() * WARP_RING_BYTES<RAW>;
    u8 *stage = ring_begin, *last = ring_begin + ahead; /* the one that was read last */
    auto cursor = cursor_of<WARPS>(tiles_of<RAW, TILE<RAW>>(p, work), warp_id());
    Ring<RAW> ring = make_ring<RAW>(p, work, cursor);
#pragma unroll 1
    for (u8 *first = ring_begin; first != last; first += STAGE_BYTES<RAW>)
        ring.copy_next(first);
    load_queries<RAW>(p, work, shared);
    sync_threads();
    Queries<RAW> queries;
    queries.tile = shared.query;
    queries.keep();
    const Rows2 rows = own_rows(p, work, shared);
    const Whole whole = find_whole<RAW>(p, work);
    const Tables tables = kept_tables<RAW>();
#pragma unroll 1
    for (; cursor.has_tile(); cursor.advance()) {
        ring.copy_next(last);
        cp_async_wait<RING_STAGES<RAW> - 1>();
        sync_warp();
        attend_tile<RAW>(p, work, whole, rows, queries, tables, stage, cursor.at * TILE<RAW>,
                         state);
        sync_warp();
        last = stage;
        stage = stage == ring_begin + ahead ? ring_begin : stage + STAGE_BYTES<RAW>;
    }
    cp_async_wait<0>();
    if constexpr (!OPTIONS) {
#pragma unroll
        for (s32 half = 0; half < 2; half++)
            state.m[half] += rows.biases[half];
    }
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
        if constexpr (QUANTIZED) {
            if (raw)
                attend_part<true>(p, work, shared, state);
            else
                attend_part<false>(p, work, shared, state);
        } else {
            attend_part<false>(p, work, shared, state);
        }
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
