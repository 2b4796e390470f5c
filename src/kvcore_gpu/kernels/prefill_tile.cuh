/* One warp's rows against one tile of keys and values. */
#pragma once
#include "prefill_sight.cuh"
#include "softmax.cuh"

/* Unnormalised, as the online softmax has them; sums l are this lane's part of its rows. */
struct WarpState {
    float o[ROW_TILES][V_CHUNKS][4];
    float m[ROW_TILES][2], l[ROW_TILES][2];
};

typedef float Scores[ROW_TILES][KEYS / 8][4];

/* ---- fragments at addresses of which all but two bits of a step are constants of an instruction */

/* Chunk 2 k + odd, and `rows` rows further down, a multiple of 8; `offset` is that of chunk `odd`. */
template <s32 CHUNKS> KV_DEVICE u8 *chunk_at(u8 *tile, u32 offset, s32 k, s32 rows) {
    const u32 at = CHUNKS % 8 == 0 ? (offset ^ 32 * (k & 3)) + 128 * (k >> 2) : offset + 32 * k;
    return tile + at + 16 * TILE_PITCH<CHUNKS> * rows;
}

/* Products of raw keys of a quantized cache, of which there are few, are a loop. */
template <bool RAW> KV_DEVICE void add_products(Scores &s, u8 *query, u8 *keys, s32 lane) {
    constexpr s32 UNROLL = RAW ? 1 : 4;
    const s32 matrix = lane >> 3;
    const u32 of_query = opaque(chunk_offset<K_CHUNKS>((lane & 7) + 8 * (matrix & 1), matrix >> 1));
    const u32 of_keys = opaque(chunk_offset<K_CHUNKS>((lane & 7) + 8 * (matrix >> 1), matrix & 1));
#pragma unroll UNROLL
    for (s32 k = 0; k < K_CHUNKS / 2; k++) {
        u32 a[PARTS<RAW>][ROW_TILES][4];
#pragma unroll
        for (s32 part = 0; part < PARTS<RAW>; part++)
#pragma unroll
            for (s32 t = 0; t < ROW_TILES; t++)
                ldmatrix_x4(a[part][t], chunk_at<K_CHUNKS>(query + part * QUERY_PART_BYTES,
                                                           of_query, k, 16 * t));
#pragma unroll
        for (s32 n = 0; n < KEYS / 16; n++) {
            u32 b[4];
            ldmatrix_x4(b, chunk_at<K_CHUNKS>(keys, of_keys, k, 16 * n));
#pragma unroll
            for (s32 part = 0; part < PARTS<RAW>; part++)
#pragma unroll
                for (s32 t = 0; t < ROW_TILES; t++) {
                    mma<K_IS_BF16<RAW>>(s[t][2 * n], a[part][t], b[0], b[1]);
                    mma<K_IS_BF16<RAW>>(s[t][2 * n + 1], a[part][t], b[2], b[3]);
                }
        }
    }
}

/* Times the scales of the keys, which are 1 for raw ones. */
KV_DEVICE void scale_keys(const float *key_scales, Scores &s) {
#pragma unroll
    for (s32 n = 0; n < KEYS / 8; n++) {
        const float2 scales =
            *reinterpret_cast<const float2 *>(key_scales + 8 * n + 2 * (lane_id() & 3));
#pragma unroll
        for (s32 t = 0; t < ROW_TILES; t++) {
            s[t][n][0] *= scales.x;
            s[t][n][1] *= scales.y;
            s[t][n][2] *= scales.x;
            s[t][n][3] *= scales.y;
        }
    }
}

/* What turns a row's scores into those of the softmax to base 2: s * factor + bias. */
struct Line {
    float factor, bias;
};

KV_DEVICE Line line_of_row(const AttendParams &p, const Shared &shared, s32 row) {
    if (K_QUANTIZED)
        return {shared.row_factors[row], shared.row_biases[row]};
    if (SCALED_ROWS<false>)
        return {shared.row_factors[row], 0.0f};
    return {OPTIONS ? 1.0f : p.scale * LOG2E, 0.0f};
}

/* With options scores are finished one by one, and no line is left to do. */
KV_DEVICE void apply_options(const AttendParams &p, const Place &place, const Shared &shared,
                             s32 first, Scores &s) {
#pragma unroll
    for (s32 t = 0; t < ROW_TILES; t++)
#pragma unroll
        for (s32 half = 0; half < 2; half++) {
            const Sequence &seq = place.seq;
            const s32 row = min(place.first_row + row_of_lane(t, half), num_rows_of(p, seq) - 1);
            const s32 token = (u32)row / (u32)p.group;
            const Sight sight = sight_of(p, seq, token);
            const float slope = p.alibi_slopes
                                    ? p.alibi_slopes[blockIdx.y * p.group + row - token * p.group]
                                    : 0.0f;
            const Line line = line_of_row(p, shared, row_of_lane(t, half));
#pragma unroll
            for (s32 n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (s32 i = 0; i < 2; i++) {
                    float &x = s[t][n][2 * half + i];
                    x = finish_score(p, seq, sight, slope, first + 8 * n + 2 * (lane_id() & 3) + i,
                                     fmaf(x, line.factor, line.bias));
                }
        }
}

/* Scores of keys that a row does not take become -inf. */
KV_DEVICE void mask_scores(const AttendParams &p, const Place &place, bool raw, s32 first,
                           Scores &s) {
    const u64 keys = keys_of_lane(p, place, raw, first);
    const s32 pair = 2 * (lane_id() & 3);
#pragma unroll
    for (s32 t = 0; t < ROW_TILES; t++)
#pragma unroll
        for (s32 half = 0; half < 2; half++) {
            const s32 lane = 16 * t + 8 * half + (lane_id() >> 2);
            const u32 words[2] = {shfl((u32)keys, lane) >> pair,
                                  shfl((u32)(keys >> 32), lane) >> pair};
#pragma unroll
            for (s32 n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (s32 i = 0; i < 2; i++)
                    if (!(words[n / 4] >> (8 * (n % 4) + i) & 1))
                        s[t][n][2 * half + i] = MINUS_INFINITY;
        }
}

/* What is left to do to a row's scores. */
KV_DEVICE Line line_of_scores(const AttendParams &p, const Shared &shared, s32 t, s32 half) {
    return OPTIONS ? Line{1.0f, 0.0f} : line_of_row(p, shared, row_of_lane(t, half));
}

KV_DEVICE void apply_lines(const AttendParams &p, const Shared &shared, Scores &s) {
#pragma unroll
    for (s32 t = 0; t < ROW_TILES; t++)
#pragma unroll
        for (s32 half = 0; half < 2; half++) {
            const Line line = line_of_scores(p, shared, t, half);
#pragma unroll
            for (s32 n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (s32 i = 2 * half; i < 2 * half + 2; i++)
                    s[t][n][i] = fmaf(s[t][n][i], line.factor, line.bias);
        }
}

/* Scores to weights. Sums so far are scaled down where a row's maximum grew; a factor of 1 changes
 * no bit, so that other rows of the warp have no say. */
KV_DEVICE void weigh(const AttendParams &p, const Shared &shared, WarpState &state, Scores &s) {
    float factors[ROW_TILES][2];
    bool grew = false, large = false;
#pragma unroll
    for (s32 t = 0; t < ROW_TILES; t++)
#pragma unroll
        for (s32 half = 0; half < 2; half++) {
            const Line line = line_of_scores(p, shared, t, half);
            float top = fmaxf(s[t][0][2 * half], s[t][0][2 * half + 1]);
#pragma unroll
            for (s32 n = 1; n < KEYS / 8; n++)
                top = fmaxf(top, fmaxf(s[t][n][2 * half], s[t][n][2 * half + 1]));
            top = fmaxf(top, shfl_xor(top, 1));
            top = fmaxf(top, shfl_xor(top, 2));
            float &m = state.m[t][half];
            top = fmaxf(m, fmaf(top, line.factor, line.bias));
            factors[t][half] = exp2_approx(m - finite_maximum(top));
            grew = grew || factors[t][half] != 1.0f;
            large = large || is_large(finite_maximum(top));
            m = top;
        }
    const bool apart = any(large);
    if (apart)
        apply_lines(p, shared, s);
#pragma unroll
    for (s32 t = 0; t < ROW_TILES; t++)
#pragma unroll
        for (s32 half = 0; half < 2; half++) {
            const Line line = apart ? Line{1.0f, 0.0f} : line_of_scores(p, shared, t, half);
            const float offset = line.bias - finite_maximum(state.m[t][half]);
#pragma unroll
            for (s32 n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (s32 i = 2 * half; i < 2 * half + 2; i++)
                    s[t][n][i] = exp2_approx(fmaf(s[t][n][i], line.factor, offset));
        }
    if (!any(grew))
        return;
#pragma unroll
    for (s32 t = 0; t < ROW_TILES; t++)
#pragma unroll
        for (s32 half = 0; half < 2; half++) {
            state.l[t][half] *= factors[t][half];
#pragma unroll
            for (s32 n = 0; n < V_CHUNKS; n++) {
                state.o[t][n][2 * half] *= factors[t][half];
                state.o[t][n][2 * half + 1] *= factors[t][half];
            }
        }
}

/* Weights of keys 16 k to 16 k + 15 as the first operand. */
KV_DEVICE void pack_step(const Scores &s, s32 t, s32 k, const float *value_scales, float (&l)[2],
                         u32 (&a)[4]) {
#pragma unroll
    for (s32 i = 0; i < 4; i++) {
        const float *weights = &s[t][2 * k + i / 2][2 * (i & 1)];
        if constexpr (V_QUANTIZED) {
            const s32 key = 16 * k + 8 * (i / 2) + 2 * (lane_id() & 3);
            l[i & 1] += weights[0] + weights[1];
            a[i] = pack_bf16(weights[0] * value_scales[key], weights[1] * value_scales[key + 1]);
        } else {
            a[i] = pack_weights<V_IS_BF16>(weights[0], weights[1], l[i & 1]);
        }
    }
}

/* o += weights . values. */
KV_DEVICE void add_values(WarpState &state, const Scores &s, u8 *values, const float *value_scales,
                          s32 lane) {
    const s32 matrix = lane >> 3;
    const u32 offset = opaque(chunk_offset<V_CHUNKS>((lane & 7) + 8 * (matrix & 1), matrix >> 1));
#pragma unroll
    for (s32 k = 0; k < KEYS / 16; k++) {
        u32 a[ROW_TILES][4];
#pragma unroll
        for (s32 t = 0; t < ROW_TILES; t++)
            pack_step(s, t, k, value_scales, state.l[t], a[t]);
#pragma unroll
        for (s32 n = 0; n < V_CHUNKS / 2; n++) {
            u32 b[4];
            ldmatrix_x4_trans(b, chunk_at<V_CHUNKS>(values, offset, n, 16 * k));
#pragma unroll
            for (s32 t = 0; t < ROW_TILES; t++) {
                mma<V_IS_BF16>(state.o[t][2 * n], a[t], b[0], b[1]);
                mma<V_IS_BF16>(state.o[t][2 * n + 1], a[t], b[2], b[3]);
            }
        }
    }
}

/* All of the warp's rows, and keys from `first` on. */
KV_DEVICE void attend_tile(const AttendParams &p, const Place &place, const Shared &shared,
                           bool raw, bool masked, u8 *keys, u8 *values, s32 first,
                           WarpState &state) {
    /* Computed anew for each tile: registers are too few to keep addresses in. */
    const s32 lane = opaque(lane_id()), warp = opaque(threadIdx.x) >> 5;
    Scores s = {};
    u8 *const query = shared.query + 16 * TILE_PITCH<K_CHUNKS> * WARP_ROWS * warp;
    if (K_QUANTIZED && raw)
        add_products<QUANTIZED>(s, query, keys, lane);
    else
        add_products<false>(s, query, keys, lane);
    if constexpr (K_QUANTIZED)
        scale_keys(shared.key_scales, s);
    if constexpr (OPTIONS)
        apply_options(p, place, shared, first, s);
    if (masked)
        mask_scores(p, place, raw, first, s);
    weigh(p, shared, state, s);
    add_values(state, s, values, shared.value_scales, lane);
}
