/* One warp's rows against one tile of keys and values. */
#pragma once
#include "prefill_layout.cuh"
#include "softmax.cuh"

/* The rows of a warp that are in use, of tokens [first, last]; first > last: none. */
struct WarpTokens {
    s32 first, last;
};

KV_DEVICE WarpTokens tokens_of_warp(const AttendParams &p, const Sequence &seq, s32 first_row) {
    const s32 row = first_row + WARP_ROWS * (s32)warp_id();
    return {row / p.group, (min(row + WARP_ROWS, seq.num_new * p.group) - 1) / p.group};
}

/* Of the block's rows: lane l has rows l / 4 and l / 4 + 8 of each 16 of its warp's. */
KV_DEVICE s32 row_of_lane(s32 t, s32 half) {
    return WARP_ROWS * warp_id() + 16 * t + 8 * half + (lane_id() >> 2);
}

/* What a lane's rows see. Rows beyond the sequence's last stand for it, and are not stored. */
struct LaneSight {
    Sight sight[ROW_TILES][2];
    float slope[ROW_TILES][2];
};

/* Made where it is needed, as registers are short. */
KV_DEVICE LaneSight look(const AttendParams &p, const Sequence &seq, s32 first_row) {
    LaneSight look;
#pragma unroll
    for (s32 t = 0; t < ROW_TILES; t++)
#pragma unroll
        for (s32 half = 0; half < 2; half++) {
            const s32 row =
                min(opaque(first_row) + row_of_lane(t, half), seq.num_new * p.group - 1);
            look.sight[t][half] = sight_of(p, seq, row / p.group);
            look.slope[t][half] = OPTIONS && p.alibi_slopes
                                      ? p.alibi_slopes[blockIdx.y * p.group + row % p.group]
                                      : 0.0f;
        }
    return look;
}

/* Unnormalised, as the online softmax has them; sums l are this lane's part of its rows. */
struct WarpState {
    float o[ROW_TILES][V_CHUNKS][4];
    float m[ROW_TILES][2], l[ROW_TILES][2];
};

typedef float Scores[ROW_TILES][KEYS / 8][4];

/* Whether a row sees key j in this pass. */
template <bool RAW>
KV_DEVICE bool takes(const AttendParams &p, const Sequence &seq, const Sight &sight, s32 j) {
    return sees(p, seq, sight, j) && (!QUANTIZED || reads_raw(seq, sight, j) == RAW);
}

/* Whether it sees all keys of [first, first + KEYS). */
template <bool RAW>
KV_DEVICE bool takes_all(const AttendParams &p, const Sequence &seq, const Sight &sight,
                         s32 first) {
    const s32 last = first + KEYS - 1;
    if (!sees_all(p, sight, first, last))
        return false;
    if (!QUANTIZED || !seq.has_raw)
        return true;
    return RAW ? first >= sight.raw_begin : first >= seq.raw_first && last < sight.raw_begin;
}

template <bool RAW>
KV_DEVICE void add_products(Scores &s, u8 *query, u8 *keys, s32 first_row, s32 lane) {
#pragma unroll 2
    for (s32 k = 0; k < K_CHUNKS / 2; k++) {
        u32 a[PARTS<RAW>][ROW_TILES][4];
#pragma unroll
        for (s32 part = 0; part < PARTS<RAW>; part++)
#pragma unroll
            for (s32 t = 0; t < ROW_TILES; t++)
                load_rows_fragment<K_CHUNKS>(a[part][t], query + part * QUERY_PART_BYTES,
                                             first_row + 16 * t, k, lane);
#pragma unroll
        for (s32 n = 0; n < KEYS / 16; n++) {
            u32 b[4];
            load_keys_fragment<K_CHUNKS>(b, keys, 16 * n, k, lane);
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

/* Sums over elements to scores of the softmax. */
template <bool RAW>
KV_DEVICE void finish_scores(const AttendParams &p, const Sequence &seq, const LaneSight &rows,
                             const Shared &shared, s32 first, Scores &s) {
    const s32 pair = 2 * (lane_id() & 3);
#pragma unroll
    for (s32 t = 0; t < ROW_TILES; t++)
#pragma unroll
        for (s32 half = 0; half < 2; half++) {
            const s32 row = row_of_lane(t, half);
            const float factor = SCALED_ROWS<RAW> ? shared.row_factors[row] : 1.0f;
            const float bias = K_ENCODED<RAW> ? shared.row_biases[row] : 0.0f;
#pragma unroll
            for (s32 n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (s32 i = 0; i < 2; i++) {
                    const s32 key = 8 * n + pair + i;
                    float x = s[t][n][2 * half + i];
                    if constexpr (SCALED_ROWS<RAW>)
                        x *= factor;
                    if constexpr (K_ENCODED<RAW>)
                        x = fmaf(x, shared.key_scales[key], bias);
                    s[t][n][2 * half + i] = finish_score(p, seq, rows.sight[t][half],
                                                         rows.slope[t][half], first + key, x);
                }
        }
}

template <bool RAW>
KV_DEVICE void mask_scores(const AttendParams &p, const Sequence &seq, const LaneSight &rows,
                           s32 first, Scores &s) {
    const s32 pair = 2 * (lane_id() & 3);
#pragma unroll
    for (s32 t = 0; t < ROW_TILES; t++)
#pragma unroll
        for (s32 n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (s32 i = 0; i < 4; i++)
                if (!takes<RAW>(p, seq, rows.sight[t][i / 2], first + 8 * n + pair + (i & 1)))
                    s[t][n][i] = MINUS_INFINITY;
}

/* Scores to weights. Sums so far are scaled down where a row's maximum grew; a factor of 1 changes
 * no bit, so that other rows of the warp have no say. */
KV_DEVICE void weigh(WarpState &state, Scores &s) {
    float factors[ROW_TILES][2];
    bool grew = false;
#pragma unroll
    for (s32 t = 0; t < ROW_TILES; t++) {
        weigh_tile(s[t], state.m[t], factors[t]);
        grew = grew || factors[t][0] != 1.0f || factors[t][1] != 1.0f;
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
template <bool RAW>
KV_DEVICE void pack_step(const Scores &s, s32 t, s32 k, const float *value_scales, float (&l)[2],
                         u32 (&a)[4]) {
#pragma unroll
    for (s32 i = 0; i < 4; i++) {
        const float *weights = &s[t][2 * k + i / 2][2 * (i & 1)];
        if constexpr (V_ENCODED<RAW>) {
            const s32 key = 16 * k + 8 * (i / 2) + 2 * (lane_id() & 3);
            l[i & 1] += weights[0] + weights[1];
            a[i] = pack_bf16(weights[0] * value_scales[key], weights[1] * value_scales[key + 1]);
        } else {
            a[i] = pack_weights<V_IS_BF16>(weights[0], weights[1], l[i & 1]);
        }
    }
}

/* o += weights . values. */
template <bool RAW>
KV_DEVICE void add_values(WarpState &state, const Scores &s, u8 *values, const float *value_scales,
                          s32 lane) {
#pragma unroll
    for (s32 k = 0; k < KEYS / 16; k++) {
        u32 a[ROW_TILES][4];
#pragma unroll
        for (s32 t = 0; t < ROW_TILES; t++)
            pack_step<RAW>(s, t, k, value_scales, state.l[t], a[t]);
#pragma unroll
        for (s32 n = 0; n < V_CHUNKS / 2; n++) {
            u32 b[4];
            load_values_fragment<V_CHUNKS>(b, values, 16 * k, n, lane);
#pragma unroll
            for (s32 t = 0; t < ROW_TILES; t++) {
                mma<V_IS_BF16>(state.o[t][2 * n], a[t], b[0], b[1]);
                mma<V_IS_BF16>(state.o[t][2 * n + 1], a[t], b[2], b[3]);
            }
        }
    }
}

/* Whether some row of the warp sees a key of the tile, and whether one of them is to be masked. A
 * token without options sees all that those before it see, and reads raw from no earlier key on. */
template <bool RAW>
KV_DEVICE bool sees_some(const AttendParams &p, const Sequence &seq, const WarpTokens &tokens,
                         const LaneSight &rows, s32 first, bool &masked) {
    bool some = false, every = true;
    const auto count = [&](const Sight &sight) {
        some = some || (sight.begin < first + KEYS && first < sight.end);
        every = every && takes_all<RAW>(p, seq, sight, first);
    };
    if constexpr (!OPTIONS) {
        count(sight_of(p, seq, tokens.first));
        count(sight_of(p, seq, tokens.last));
        masked = !every;
        return some;
    }
#pragma unroll
    for (s32 t = 0; t < ROW_TILES; t++)
#pragma unroll
        for (s32 half = 0; half < 2; half++)
            count(rows.sight[t][half]);
    masked = !all(every);
    return any(some);
}

/* All of the warp's rows, and keys from `first` on. */
template <bool RAW>
KV_DEVICE void attend_tile(const AttendParams &p, const Sequence &seq, s32 first_row,
                           const WarpTokens &tokens, const Shared &shared, u8 *keys, u8 *values,
                           s32 first, WarpState &state) {
    LaneSight rows = {};
    if constexpr (OPTIONS)
        rows = look(p, seq, first_row);
    bool masked;
    if (!sees_some<RAW>(p, seq, tokens, rows, first, masked))
        return;
    const s32 lane = opaque(lane_id());
    Scores s = {};
    add_products<RAW>(s, shared.query, keys, WARP_ROWS * warp_id(), lane);
    finish_scores<RAW>(p, seq, rows, shared, first, s);
    if (masked) {
        if constexpr (!OPTIONS)
            rows = look(p, seq, first_row);
        mask_scores<RAW>(p, seq, rows, first, s);
    }
    weigh(state, s);
    add_values<RAW>(state, s, values, shared.value_scales, lane);
}

/* ---- values that are not finite, where some rows of the block see them and others do not */

/* Whether the tile has any, as every warp finds by itself. */
KV_DEVICE bool has_not_finite(u8 *values) {
    u32 found = 0;
#pragma unroll 1
    for (s32 i = lane_id(); i < KEYS * V_CHUNKS; i += 32) {
        const uint4 chunk =
            *reinterpret_cast<uint4 *>(chunk_of<V_CHUNKS>(values, i / V_CHUNKS, i % V_CHUNKS));
        found |= not_finite_halves<V_IS_BF16>(chunk.x) | not_finite_halves<V_IS_BF16>(chunk.y) |
                 not_finite_halves<V_IS_BF16>(chunk.z) | not_finite_halves<V_IS_BF16>(chunk.w);
    }
    return any(found != 0);
}

/* Adds them to the rows of the warp that see them, with a weight of 1. */
template <bool RAW>
KV_DEVICE void add_not_finite(const AttendParams &p, const Sequence &seq, s32 first_row,
                              WarpState &state, u8 *values, s32 first) {
#pragma unroll 1
    for (s32 i = 0; i < KEYS * V_CHUNKS; i++) {
        const s32 key = i / V_CHUNKS, column = i % V_CHUNKS;
        const u8 *chunk = chunk_of<V_CHUNKS>(values, key, column);
        const u32 pair = reinterpret_cast<const u32 *>(chunk)[lane_id() & 3];
        const u32 halves = not_finite_halves<V_IS_BF16>(pair);
        if (!any(halves != 0))
            continue;
        const float low = halves & 0x8000u ? unpack<V_IS_BF16>((u16)pair) : 0.0f;
        const float high = halves >> 16 ? unpack<V_IS_BF16>((u16)(pair >> 16)) : 0.0f;
        const LaneSight rows = look(p, seq, first_row);
#pragma unroll
        for (s32 t = 0; t < ROW_TILES; t++)
#pragma unroll
            for (s32 half = 0; half < 2; half++) {
                const bool seen = takes<RAW>(p, seq, rows.sight[t][half], first + key);
#pragma unroll
                for (s32 n = 0; n < V_CHUNKS; n++)
                    if (seen && n == column) {
                        state.o[t][n][2 * half] += low;
                        state.o[t][n][2 * half + 1] += high;
                    }
            }
    }
}

/* Puts zeros in their place: a weight of 0 does not keep them out of a product. */
KV_DEVICE void clear_not_finite(u8 *values) {
    for (s32 i = threadIdx.x; i < KEYS * V_CHUNKS * 4; i += THREADS) {
        const s32 chunk = i / 4;
        u32 *pair = reinterpret_cast<u32 *>(
                        chunk_of<V_CHUNKS>(values, chunk / V_CHUNKS, chunk % V_CHUNKS)) +
                    i % 4;
        bool found = false;
        const u32 finite = finite_pair<V_IS_BF16>(*pair, found);
        if (found)
            *pair = finite;
    }
}
