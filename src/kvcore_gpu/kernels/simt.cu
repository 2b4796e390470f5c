/* Attention without matrix instructions, in float32: for fp32 caches, and for a group of one query
 * head, where an instruction of 16 rows would do the work of one. It takes every format.
 *
 * Specialised by HEAD_DIM, HEAD_DIM_V, K_FORMAT, V_FORMAT, OPTIONS (sight.cuh) and TILE_ROWS, the
 * query rows of a block. LANES lanes share a key and its value, so that a warp has 32 / LANES keys at once,
 * each with a softmax of its own; these are merged at the end of a split, and splits as in decode.cu.
 *
 * The floor is the time that K and V take to arrive. Lanes read 16 bytes at once, those of a key side
 * by side, and hold the next key while they work on one: at 16 bits and head_dim 128 a warp has two
 * keys and their values under way, 1 KiB, and a multiprocessor with 32 warps 32 KiB.
 */
#include "decode_place.cuh"
#include "partials.cuh"
#include "queries.cuh"
#include "simt_elements.cuh"

constexpr s32 WARPS = 4, THREADS = 32 * WARPS, ROWS = TILE_ROWS;
constexpr s32 LONGER = HEAD_DIM > HEAD_DIM_V ? HEAD_DIM : HEAD_DIM_V;
constexpr s32 LANES = LONGER <= 64 ? 8 : LONGER <= 128 ? 16 : 32;
constexpr s32 STREAMS = WARPS * 32 / LANES;
constexpr bool QUANTIZED = !IS_FLOAT<K_FORMAT> || !IS_FLOAT<V_FORMAT>;

/* simt.py reckons the bytes of these. */
struct Shared {
    float *q;      /* [ROWS, HEAD_DIM] as keys are multiplied with it */
    float *biases; /* [ROWS] */
    float *m, *l;  /* [STREAMS, ROWS] */
    float *sums;   /* [STREAMS, ROWS, HEAD_DIM_V] */
};

KV_DEVICE Shared cut_shared(float *floats) {
    Shared shared;
    shared.q = floats;
    shared.biases = shared.q + ROWS * HEAD_DIM;
    shared.m = shared.biases + ROWS;
    shared.l = shared.m + STREAMS * ROWS;
    shared.sums = shared.l + STREAMS * ROWS;
    return shared;
}

template <bool RAW>
KV_DEVICE void load_queries(const AttendParams &p, const Work &work, const Shared &shared) {
    for (s32 row = warp_id(); row < work.num_rows; row += WARPS) {
        const s32 at = work.first_row + row;
        float x[(HEAD_DIM + 31) / 32], bias = 0.0f;
        load_query_row<HEAD_DIM>(
            p, row_offset(p.q, work.seq, token_of(p, at), query_head_of(p, work.head, at)), x);
        if constexpr (!RAW && !IS_FLOAT<K_FORMAT>) {
            bias = bias_of_row<HEAD_DIM>(p, work.head, x);
            transform_query_row<K_FORMAT, HEAD_DIM>(p, work.head, x);
        }
#pragma unroll
        for (s32 i = 0; i < (HEAD_DIM + 31) / 32; i++)
            if (32 * i + (s32)lane_id() < HEAD_DIM)
                shared.q[row * HEAD_DIM + 32 * i + lane_id()] = x[i];
        if (lane_id() == 0)
            shared.biases[row] = bias;
    }
    sync_threads();
}

/* One row in the lanes of one stream. */
template <class Keys, class Values> struct RowState {
    Sight sight;
    float slope, bias, m, l;
    float q[Keys::COUNT * Keys::SIZE], o[Values::COUNT * Values::SIZE];
};

template <class Keys, class Values>
KV_DEVICE void start_row(const AttendParams &p, const Work &work, const Shared &shared, s32 row,
                         s32 lane, RowState<Keys, Values> &state) {
    row = min(row, work.num_rows - 1);
    const s32 at = work.first_row + row;
    state.sight = sight_of(p, work.seq, token_of(p, at));
    state.slope =
        OPTIONS && p.alibi_slopes ? p.alibi_slopes[query_head_of(p, work.head, at)] : 0.0f;
    state.bias = shared.biases[row];
    state.m = MINUS_INFINITY;
    state.l = 0.0f;
#pragma unroll
    for (s32 i = 0; i < Keys::COUNT; i++)
#pragma unroll
        for (s32 j = 0; j < Keys::SIZE; j++) {
            const s32 d = Keys::element(i, j, lane);
            state.q[i * Keys::SIZE + j] = d < HEAD_DIM ? shared.q[row * HEAD_DIM + d] : 0.0f;
        }
#pragma unroll
    for (s32 i = 0; i < Values::COUNT * Values::SIZE; i++)
        state.o[i] = 0.0f;
}

/* q . k over the lanes of a stream; all lanes of the warp call it. */
template <class Keys, class Values>
KV_DEVICE float multiply_key(const RowState<Keys, Values> &state, const Keys &keys) {
    float sum = 0.0f;
#pragma unroll
    for (s32 i = 0; i < Keys::COUNT; i++) {
        float x[Keys::SIZE];
        keys.get(i, x);
#pragma unroll
        for (s32 j = 0; j < Keys::SIZE; j++)
            sum = fmaf(state.q[i * Keys::SIZE + j], x[j], sum);
    }
#pragma unroll
    for (s32 mask = LANES / 2; mask; mask >>= 1)
        sum += shfl_xor(sum, mask);
    return Keys::SCALED ? fmaf(sum, keys.scale(), state.bias) : sum + state.bias;
}

template <class Keys, class Values>
KV_DEVICE void add_value(RowState<Keys, Values> &state, float s, const Values &values) {
    const float m = fmaxf(state.m, s), base = finite_maximum(m);
    const float keep = exp2_approx(state.m - base), weight = exp2_approx(s - base);
    const float scaled = Values::SCALED ? weight * values.scale() : weight;
    state.m = m;
    state.l = fmaf(state.l, keep, weight);
#pragma unroll
    for (s32 i = 0; i < Values::COUNT; i++) {
        float x[Values::SIZE];
        values.get(i, x);
#pragma unroll
        for (s32 j = 0; j < Values::SIZE; j++) {
            float &o = state.o[i * Values::SIZE + j];
            o = fmaf(scaled, x[j], o * keep);
        }
    }
}

/* The keys of a stream, one after the other, the next one under way. */
template <class Keys, class Values, bool RAW> struct Stream {
    Place k, v;
    TableRow k_table, v_table;
    Cursor<RAW, STREAMS> cursor;
    Keys keys;
    Values values;
    s32 key; /* what is held; -1: nothing */

    KV_DEVICE void load_next(s32 end, s32 lane) {
        key = -1;
        if (!cursor.has_tile())
            return;
        const s32 j = cursor.at;
        cursor.advance();
        const s32 k_block = k_table.block_of(j);
        const s32 v_block = v_table.block_of(j);
        if (j >= end || k_block < 0 || v_block < 0)
            return;
        key = j;
        keys.load(k.data + k_block * k.block_stride, k.token_stride, k.metadata,
                  k_table.offset_of(j), lane);
        values.load(v.data + v_block * v.block_stride, v.token_stride, v.metadata,
                    v_table.offset_of(j), lane);
    }
};

template <class Keys, class Values>
KV_DEVICE void store_stream(const Shared &shared, s32 stream, s32 row, s32 lane,
                            const RowState<Keys, Values> &state) {
    if (lane == 0) {
        shared.m[stream * ROWS + row] = state.m;
        shared.l[stream * ROWS + row] = state.l;
    }
#pragma unroll
    for (s32 i = 0; i < Values::COUNT; i++)
#pragma unroll
        for (s32 j = 0; j < Values::SIZE; j++) {
            const s32 d = Values::element(i, j, lane);
            if (d < HEAD_DIM_V)
                shared.sums[(stream * ROWS + row) * HEAD_DIM_V + d] = state.o[i * Values::SIZE + j];
        }
}

/* The streams of each row together, in their order, by one warp. */
KV_DEVICE void store_partials(const AttendParams &p, const Work &work, const Shared &shared) {
    for (s32 row = warp_id(); row < work.num_rows; row += WARPS) {
        const s64 index = partial_index(p, work, row, work.part);
        State all = empty_state();
        for (s32 i = 0; i < STREAMS; i++)
            all.m = fmaxf(all.m, shared.m[i * ROWS + row]);
        const float top = finite_maximum(all.m);
        for (s32 i = 0; i < STREAMS; i++)
            all.l =
                fmaf(shared.l[i * ROWS + row], exp2_approx(shared.m[i * ROWS + row] - top), all.l);
        if (lane_id() == 0)
            store_state(p, index, all);
        for (s32 d = lane_id(); d < HEAD_DIM_V; d += 32) {
            float sum = 0.0f;
            for (s32 i = 0; i < STREAMS; i++)
                sum = fmaf(shared.sums[(i * ROWS + row) * HEAD_DIM_V + d],
                           exp2_approx(shared.m[i * ROWS + row] - top), sum);
            p.partial_out[index * HEAD_DIM_V + d] = sum;
        }
    }
}

template <bool RAW>
KV_DEVICE void attend_part(const AttendParams &p, const Work &work, const Shared &shared) {
    typedef Elements<K_FORMAT, RAW, HEAD_DIM, LANES> Keys;
    typedef Elements<V_FORMAT, RAW, HEAD_DIM_V, LANES> Values;
    const s32 lane = lane_id() % LANES, stream_number = threadIdx.x / LANES;
    Stream<Keys, Values, RAW> next;
    next.k = place_of(p.k, work.head, RAW);
    next.v = place_of(p.v, work.head, RAW);
    next.k_table = table_row(p.k, p.plan, work.seq.index, RAW);
    next.v_table = table_row(p.v, p.plan, work.seq.index, RAW);
    next.cursor = cursor_of<STREAMS>(tiles_of<RAW, 1>(p, work), stream_number);
    next.load_next(work.joint.end, lane);
    load_queries<RAW>(p, work, shared);
    RowState<Keys, Values> rows[ROWS];
#pragma unroll
    for (s32 r = 0; r < ROWS; r++)
        start_row(p, work, shared, r, lane, rows[r]);
    while (any(next.key >= 0 || next.cursor.has_tile())) {
        const Stream<Keys, Values, RAW> now = next;
        next.load_next(work.joint.end, lane);
#pragma unroll
        for (s32 r = 0; r < ROWS; r++) {
            const float product = multiply_key(rows[r], now.keys);
            if (now.key >= 0 && sees(p, work.seq, rows[r].sight, now.key) &&
                reads_raw(work.seq, rows[r].sight, now.key) == RAW)
                add_value(rows[r],
                          finish_score(p, work.seq, rows[r].sight, rows[r].slope, now.key, product),
                          now.values);
        }
    }
#pragma unroll
    for (s32 r = 0; r < ROWS; r++)
        store_stream(shared, stream_number, r, lane, rows[r]);
    sync_threads();
    store_partials(p, work, shared);
}

KV_KERNEL(simt, AttendParams, THREADS, ROWS == 1 && LONGER <= 128 ? 4 : 1) {
    KV_DYNAMIC_SHARED(float, floats);
    KV_SHARED Work work; /* which no thread has to hold while it sums */
    KV_SHARED s32 yes;
    if (threadIdx.x == 0)
        yes = find_work<ROWS, 1>(p, work);
    sync_threads();
    if (!yes)
        return;
    const Shared shared = cut_shared(floats);
    const s32 parts = num_parts(work);
    if constexpr (QUANTIZED) {
        if (work.part == p.num_splits)
            attend_part<true>(p, work, shared);
        else if (parts > 0)
            attend_part<false>(p, work, shared);
    } else if (parts > 0) {
        attend_part<false>(p, work, shared);
    }
    if (!is_last_block(p, work, parts, &yes))
        return;
    for (s32 row = warp_id(); row < work.num_rows; row += WARPS)
        finish_row<V_FORMAT, HEAD_DIM_V>(p, work, row);
}
