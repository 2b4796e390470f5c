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
#include "decode_keys.cuh"
#include "decode_ring.cuh"
#include "decode_values.cuh"
#include "partials.cuh"

/* What a lane knows of its two rows, lane / 4 and 8 further. Rows that are not there see what the
 * tile's last row does, so that they ask for no mask of their own. */
struct Rows2 {
    Sight sights[2];
    float slopes[2], factors[2], biases[2];
};

KV_DEVICE Rows2 own_rows(const AttendParams &p, const Work &work, const Shared &shared) {
    Rows2 rows;
#pragma unroll
    for (s32 half = 0; half < 2; half++) {
        const s32 row = (lane_id() >> 2) + 8 * half;
        const s32 at = work.first_row + min(row, work.num_rows - 1);
        rows.sights[half] = sight_of(p, work.seq, token_of(p, at));
        rows.slopes[half] =
            OPTIONS && p.alibi_slopes ? p.alibi_slopes[query_head_of(p, work.head, at)] : 0.0f;
        rows.factors[half] = shared.row_factors[row];
        rows.biases[half] = shared.row_biases[row];
    }
    return rows;
}

template <bool RAW>
KV_DEVICE Seen look_at_tile(const AttendParams &p, const Sequence &seq, const Rows2 &rows, s32 j) {
    Seen seen = {true, false, ~0u, ~0u};
    bool everything = !RAW;
#pragma unroll
    for (s32 half = 0; half < 2; half++) {
        const Sight &sight = rows.sights[half];
        everything =
            everything && sees_all(p, sight, j, j + TILE - 1) &&
            (!QUANTIZED || !seq.has_raw || (j >= seq.raw_first && j + TILE <= sight.raw_begin));
    }
    if (all(everything))
        return seen;
    u32 some = 0, not_all = 0;
    seen.own = 0;
#pragma unroll
    for (s32 n = 0; n < KEY_TILES; n++)
#pragma unroll
        for (s32 i = 0; i < 4; i++) {
            const s32 key = 8 * n + 2 * (lane_id() & 3) + (i & 1);
            const Sight &sight = rows.sights[i >> 1];
            const bool sees_it =
                sees(p, seq, sight, j + key) && reads_raw(seq, sight, j + key) == RAW;
            seen.own |= (u32)sees_it << (4 * n + i);
            some |= (u32)sees_it << key;
            not_all |= (u32)!sees_it << key;
        }
    seen.everything = false;
    seen.any = reduce_or(some);
    seen.mixed = (seen.any & reduce_or(not_all)) != 0;
    return seen;
}

KV_DEVICE void finish_scores(const AttendParams &p, const Sequence &seq, const Rows2 &rows,
                             const Seen &seen, s32 j, Scores &s) {
#pragma unroll
    for (s32 n = 0; n < KEY_TILES; n++)
#pragma unroll
        for (s32 i = 0; i < 4; i++) {
            const s32 key = j + 8 * n + 2 * (lane_id() & 3) + (i & 1);
            s[n][i] = finish_score(p, seq, rows.sights[i >> 1], rows.slopes[i >> 1], key, s[n][i]);
            if (!seen.everything && !(seen.own >> (4 * n + i) & 1))
                s[n][i] = MINUS_INFINITY;
        }
}

/* A warp's sums over its tiles. */
struct WarpState {
    float m[2], l[2];
    Sums o;
};

/* Most tiles leave the maximum of a row as it was. */
KV_DEVICE void rescale(Sums &o, const float (&keep)[2]) {
    if (!any(keep[0] != 1.0f || keep[1] != 1.0f))
        return;
#pragma unroll
    for (s32 n = 0; n < 2 * V_STEPS; n++)
#pragma unroll
        for (s32 i = 0; i < 4; i++)
            o[n][i] *= keep[i >> 1];
}

template <bool RAW>
KV_DEVICE void attend_tile(const AttendParams &p, const Work &work, const Rows2 &rows,
                           const Queries<RAW> &queries, u8 *k_tile, u8 *v_tile, s32 j,
                           WarpState &state) {
    const Seen seen = look_at_tile<RAW>(p, work.seq, rows, j);
    if (seen.any == 0)
        return;
    Scores s = {};
    multiply_keys<RAW>(s, k_tile, queries, rows.factors, rows.biases);
    finish_scores(p, work.seq, rows, seen, j, s);
    float keep[2];
    weigh_tile(s, state.m, keep);
#pragma unroll
    for (s32 half = 0; half < 2; half++)
        state.l[half] *= keep[half];
    rescale(state.o, keep);
    Weights weights;
    pack_tile<RAW>(weights, s, v_tile, state.l);
    if (V_IN_K) /* whose unseen rows may be cleared when no lane reads them as keys any more */
        sync_warp();
    multiply_values<RAW>(state.o, v_tile, weights, seen, work.slice);
}

template <bool RAW> KV_DEVICE void store_warp(const Shared &shared, const WarpState &state) {
    const s32 row = lane_id() >> 2, warp = warp_id();
#pragma unroll
    for (s32 half = 0; half < 2; half++) {
        const float l = sum_of_quad(state.l[half]);
        if ((lane_id() & 3) == 0) {
            shared.m[warp * ROWS + row + 8 * half] = state.m[half];
            shared.l[warp * ROWS + row + 8 * half] = l;
        }
    }
#pragma unroll
    for (s32 n = 0; n < 2 * V_STEPS; n++)
#pragma unroll
        for (s32 i = 0; i < 4; i++)
            shared
                .sums[(warp * ROWS + row + 8 * (i >> 1)) * SUM_PITCH + element_of_sum<RAW>(n, i)] =
                state.o[n][i];
}

/* The four warps of each row together, in their order. */
KV_DEVICE void store_partials(const AttendParams &p, const Work &work, const Shared &shared) {
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
    for (s32 i = threadIdx.x; i < work.num_rows * SLICE_DIM; i += THREADS) {
        const s32 at = i / SLICE_DIM, d = i % SLICE_DIM, element = work.slice * SLICE_DIM + d;
        float sum = 0.0f;
#pragma unroll
        for (s32 warp = 0; warp < WARPS; warp++)
            sum = fmaf(shared.sums[(warp * ROWS + at) * SUM_PITCH + d],
                       shared.weights[warp * ROWS + at], sum);
        if (element < HEAD_DIM_V)
            p.partial_out[partial_index(p, work, at, work.part) * HEAD_DIM_V + element] = sum;
    }
}

template <bool RAW>
KV_DEVICE void attend_part(const AttendParams &p, const Work &work, const Shared &shared) {
    Cursor cursor = cursor_of(tiles_of<TILE>(p, work), warp_id(), WARPS);
    Ring<RAW> ring = make_ring<RAW>(p, work, shared, cursor);
    for (s32 turn = 0; turn < RING_STAGES<RAW> - 1; turn++)
        ring.copy_next(turn);
    load_queries<RAW>(p, work, shared);
    sync_threads();
    Queries<RAW> queries;
    queries.tile = shared.query;
    queries.keep();
    const Rows2 rows = own_rows(p, work, shared);
    WarpState state = {{MINUS_INFINITY, MINUS_INFINITY}, {}, {}};
    for (s32 turn = 0; has_tile(cursor); turn++, advance(cursor)) {
        ring.copy_next(turn + RING_STAGES<RAW> - 1);
        cp_async_wait<RING_STAGES<RAW> - 1>();
        sync_warp();
        attend_tile<RAW>(p, work, rows, queries, ring.k_tile(turn), ring.v_tile(turn),
                         cursor.at * TILE, state);
        sync_warp();
    }
    cp_async_wait<0>();
    sync_threads();
    store_warp<RAW>(shared, state);
    sync_threads();
    store_partials(p, work, shared);
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
    if constexpr (QUANTIZED) {
        if (work.part == p.num_splits)
            attend_part<true>(p, work, shared);
        else if (parts > 0)
            attend_part<false>(p, work, shared);
    } else if (parts > 0) {
        attend_part<false>(p, work, shared);
    }
    if (!is_last_block(p, work, parts * SLICES, &yes))
        return;
    for (s32 row = warp_id(); row < work.num_rows; row += WARPS)
        finish_row<V_FORMAT, HEAD_DIM_V>(p, work, row);
}
