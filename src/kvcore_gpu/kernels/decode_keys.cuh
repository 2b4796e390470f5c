/* q . k of a tile by matrix products: s[n][i] as softmax.cuh has scores. */
#pragma once
#include "decode_queries.cuh"

/* Long rows are not unrolled as a whole. */
constexpr s32 UNROLL_K = HEAD_DIM <= 128 ? 16 : 1, UNROLL_FLOAT_K = HEAD_DIM <= 128 ? 16 : 4;

typedef float Scores[KEY_TILES][4];

/* Keys as floats. */
KV_DEVICE void multiply_float_keys(Scores &s, u8 *tile, const Queries &queries) {
#pragma unroll UNROLL_FLOAT_K
    for (s32 k = 0; k < K_STEPS; k++)
#pragma unroll
        for (s32 pair = 0; pair < KEY_TILES / 2; pair++) {
            u32 b[4];
            load_keys_fragment<K_CHUNKS>(b, tile, 16 * pair, k);
#pragma unroll
            for (s32 part = 0; part < QUERY_PARTS; part++) {
                u32 a[4];
                queries.get(a, part, k);
                mma<K_IS_BF16>(s[2 * pair], a, b[0], b[1]);
                mma<K_IS_BF16>(s[2 * pair + 1], a, b[2], b[3]);
            }
        }
}

/* Raw keys, of which there are few: a loop, which loads its queries. */
KV_DEVICE void multiply_raw_keys(Scores &s, u8 *tile, u8 *query) {
#pragma unroll 1
    for (s32 k = 0; k < K_STEPS; k++) {
        u32 b[4];
        load_keys_fragment<K_CHUNKS>(b, tile, 0, k);
#pragma unroll
        for (s32 part = 0; part < QUERY_PARTS; part++) {
            u32 a[4];
            load_rows_fragment<K_CHUNKS>(a, query + part * QUERY_PART_BYTES, 0, k);
            mma_bf16(s[0], a, b[0], b[1]);
            mma_bf16(s[1], a, b[2], b[3]);
        }
    }
}

/* A bfloat16 minimum and step of a chunk, times `power`, as pairs of the same float16. */
struct Affine {
    u32 minimum, step;
};
KV_DEVICE u32 same_twice(float x) { return pack_f16(x, x); }

/* int4: the largest magnitude of a key's elements, at most, and from it the power of two that its
 * elements come times. The four lanes of a key share the work. */
template <s32 GROUPS> KV_DEVICE float power_of_key(const u16 *minima) {
    float largest = 0.0f;
#pragma unroll
    for (s32 first = 0; first < GROUPS; first += 4) {
        const s32 i = GROUPS % 4 ? min(first + (s32)(lane_id() & 3), GROUPS - 1)
                                 : first + (s32)(lane_id() & 3);
        const float low = bf16_to_f32(minima[i]), step = bf16_to_f32(minima[GROUPS + i]);
        largest = fmaxf(largest, fmaxf(fabsf(low), fabsf(fmaf(step, 15.0f, low))));
    }
    largest = fmaxf(largest, shfl_xor(largest, 1));
    return power_for_f16(fmaxf(largest, shfl_xor(largest, 2)));
}

/* Keys of a row format: lane l takes words of key l / 4 of eight, as queries have them. Scores are
 * then multiplied by their keys' scales. */
template <s32 FORMAT>
KV_DEVICE void multiply_code_keys(Scores &s, const u8 *tile, const Queries &queries,
                                  const HalfTable &table) {
    constexpr s32 fields = FIELDS<FORMAT>, groups = HEAD_DIM / 32, tiles = KEY_TILES;
    constexpr s32 words = KEY_WORDS<FORMAT, HEAD_DIM>, pitch = CODE_PITCH<FORMAT, HEAD_DIM>;
    static_assert(pitch % (4 * words) == 0, "words that are loaded at once are aligned");
    const s32 key = lane_id() >> 2, w = lane_id() & 3;
    const u8 *metadata = tile + TILE_METADATA<FORMAT, HEAD_DIM>;
    const u16 *minima = reinterpret_cast<const u16 *>(metadata) + key * 2 * groups;
    float powers[tiles];
    if constexpr (FORMAT == KV_FORMAT_INT4) {
#pragma unroll
        for (s32 n = 0; n < tiles; n++)
            powers[n] = power_of_key<groups>(minima + 8 * n * 2 * groups);
    }
#pragma unroll UNROLL_K
    for (s32 first = 0; first < K_STEPS; first += words * fields) {
        const s32 word = first / fields * 4 + words * w;
        u32 codes[tiles][words][NUM_WORDS<FORMAT>];
#pragma unroll
        for (s32 n = 0; n < tiles; n++)
            load_row_words<FORMAT, HEAD_DIM>(tile + (8 * n + key) * pitch, word, codes[n]);
        Affine affine[tiles];
#pragma unroll
        for (s32 i = 0; i < words; i++) {
            u32 pairs[tiles][fields][2];
#pragma unroll
            for (s32 n = 0; n < tiles; n++) {
                levels<FORMAT, F16>(codes[n][i], pairs[n], table);
                if constexpr (FORMAT == KV_FORMAT_INT4) {
                    const u16 *own = minima + 8 * n * 2 * groups + ((word + i) >> 2);
                    if (i % 4 == 0)
                        affine[n] = {same_twice(bf16_to_f32(own[0]) * powers[n]),
                                     same_twice(bf16_to_f32(own[groups]) * powers[n])};
#pragma unroll
                    for (s32 j = 0; j < 4; j++)
                        pairs[n][j >> 1][j & 1] =
                            hfma2(pairs[n][j >> 1][j & 1], affine[n].step, affine[n].minimum);
                }
            }
#pragma unroll
            for (s32 field = 0; field < fields; field++) {
                u32 a[4];
                queries.get(a, 0, first + i * fields + field);
#pragma unroll
                for (s32 n = 0; n < tiles; n++)
                    mma_f16(s[n], a, pairs[n][field][0], pairs[n][field][1]);
            }
        }
    }
#pragma unroll
    for (s32 n = 0; n < tiles; n++) {
        float scales[2];
        if constexpr (FORMAT == KV_FORMAT_INT4) {
            const float inverse = inverse_of_power(powers[n]);
            scales[0] = shfl(inverse, 8 * w);
            scales[1] = shfl(inverse, 8 * w + 4);
        } else if constexpr (FormatOf<FORMAT>::ROW_METADATA_BYTES > 0) {
            const u32 pair = reinterpret_cast<const u32 *>(metadata)[4 * n + w];
            scales[0] = u32_as_float(pair << 16);
            scales[1] = u32_as_float(pair & 0xffff0000u);
        } else {
            return;
        }
#pragma unroll
        for (s32 i = 0; i < 4; i++)
            s[n][i] *= scales[i & 1];
    }
}

/* A group's minima and steps as float16 where they were bfloat16, times a power of two of the
 * group's, which is returned. */
template <s32 FORMAT> KV_DEVICE float scale_group(u16 *minima) {
    constexpr float largest_code = (1 << FormatOf<FORMAT>::BITS) - 1;
    constexpr s32 PAIRS = HEAD_DIM / 2, COUNT = (PAIRS + 31) / 32;
    u32 *low = reinterpret_cast<u32 *>(minima), *step = low + PAIRS;
    float largest = 0.0f, x[COUNT][4];
#pragma unroll
    for (s32 i = 0; i < COUNT; i++) {
        const s32 at = 32 * i + (s32)lane_id();
        const bool there = PAIRS % 32 == 0 || at < PAIRS;
        const u32 a = there ? low[at] : 0, b = there ? step[at] : 0;
        x[i][0] = u32_as_float(a << 16);
        x[i][1] = u32_as_float(a & 0xffff0000u);
        x[i][2] = u32_as_float(b << 16);
        x[i][3] = u32_as_float(b & 0xffff0000u);
#pragma unroll
        for (s32 j = 0; j < 2; j++)
            largest = fmaxf(largest,
                            fmaxf(fabsf(x[i][j]), fabsf(fmaf(x[i][2 + j], largest_code, x[i][j]))));
    }
    /* As integers magnitudes have the same order. */
    const float power = power_for_f16(u32_as_float((u32)reduce_max((s32)float_as_u32(largest))));
#pragma unroll
    for (s32 i = 0; i < COUNT; i++) {
        const s32 at = 32 * i + (s32)lane_id();
        if (PAIRS % 32 == 0 || at < PAIRS) {
            low[at] = pack_f16(x[i][0] * power, x[i][1] * power);
            step[at] = pack_f16(x[i][2] * power, x[i][3] * power);
        }
    }
    sync_warp();
    return power;
}

/* Four channels of scaled metadata: 16 k + 4 (lane % 4) + 0 .. 3. */
KV_DEVICE uint2 four_channels(const u16 *scaled, s32 k) {
    return reinterpret_cast<const uint2 *>(scaled)[4 * k + (lane_id() & 3)];
}

/* A group of a channel format: lane l takes the words of tokens l / 4 and l / 4 + 8, whose fields
 * are also those of tokens 16 later, and for chan2 those of channels half a row further. */
template <s32 FORMAT>
KV_DEVICE void multiply_channel_keys(Scores &s, u8 *tile, const Queries &queries) {
    constexpr s32 fields = FIELDS<FORMAT>, steps = K_STEPS / (fields / 2);
    /* Long rows leave no registers to keep addresses in. */
    const s32 lane = HEAD_DIM <= 128 ? (s32)lane_id() : opaque(lane_id());
    const s32 token = lane >> 2, w = lane & 3;
    u16 *minima = reinterpret_cast<u16 *>(tile + TILE_METADATA<FORMAT, HEAD_DIM>);
    const float power = scale_group<FORMAT>(minima);
#pragma unroll UNROLL_K
    for (s32 k = 0; k < steps; k++) {
        u32 pairs[2][fields][2];
#pragma unroll
        for (s32 n = 0; n < 2; n++) {
            const u32 word[1] = {
                reinterpret_cast<const u32 *>(tile)[16 * (4 * k + w) + token + 8 * n]};
            levels<FORMAT, F16>(word, pairs[n]);
        }
#pragma unroll
        for (s32 part = 0; part < fields / 2; part++) {
            u32 a[4];
            const uint2 minimum = four_channels(minima, k + part * steps);
            const uint2 step = four_channels(minima + HEAD_DIM, k + part * steps);
            queries.get(a, 0, k + part * steps);
#pragma unroll
            for (s32 n = 0; n < 4; n++) {
                const u32 *code = pairs[n & 1][2 * part + (n >> 1)];
                mma_f16(s[n], a, hfma2(code[0], step.x, minimum.x),
                        hfma2(code[1], step.y, minimum.y));
            }
        }
    }
    const float scale = inverse_of_power(power);
#pragma unroll
    for (s32 n = 0; n < KEY_TILES; n++)
#pragma unroll
        for (s32 i = 0; i < 4; i++)
            s[n][i] *= scale;
}

/* q . k, less q . bias where keys are encoded, and without the rows' factors. */
KV_DEVICE void multiply_keys(Scores &s, u8 *tile, const Queries &queries, const HalfTable &table,
                             bool raw) {
    if constexpr (!K_QUANTIZED)
        multiply_float_keys(s, tile, queries);
    else if (raw)
        multiply_raw_keys(s, tile, queries.tile);
    else if constexpr (IS_CHANNEL<K_FORMAT>)
        multiply_channel_keys<K_FORMAT>(s, tile, queries);
    else
        multiply_code_keys<K_FORMAT>(s, tile, queries, table);
}
