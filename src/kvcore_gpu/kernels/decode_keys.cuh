/* q . k of a tile by matrix products: s[n][i] as softmax.cuh has scores. */
#pragma once
#include "decode_queries.cuh"

/* Long rows are not unrolled as a whole. */
constexpr s32 UNROLL_K = HEAD_DIM <= 128 ? 16 : 4;

typedef float Scores[KEY_TILES][4];

/* Keys as floats. */
template <bool RAW>
KV_DEVICE void multiply_float_keys(Scores &s, u8 *tile, const Queries<RAW> &queries) {
#pragma unroll UNROLL_K
    for (s32 k = 0; k < K_STEPS; k++)
#pragma unroll
        for (s32 part = 0; part < PARTS<RAW>; part++) {
            u32 a[4];
            queries.get(a, part, k);
#pragma unroll
            for (s32 pair = 0; pair < KEY_TILES / 2; pair++) {
                u32 b[4];
                load_keys_fragment<K_CHUNKS>(b, tile, 16 * pair, k);
                mma<K_IS_BF16<RAW>>(s[2 * pair], a, b[0], b[1]);
                mma<K_IS_BF16<RAW>>(s[2 * pair + 1], a, b[2], b[3]);
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
KV_DEVICE float power_of_key(const u16 *minima, s32 num_groups) {
    float largest = 0.0f;
    for (s32 i = lane_id() & 3; i < num_groups; i += 4) {
        const float low = bf16_to_f32(minima[i]), step = bf16_to_f32(minima[num_groups + i]);
        largest = fmaxf(largest, fmaxf(fabsf(low), fabsf(fmaf(step, 15.0f, low))));
    }
    largest = fmaxf(largest, shfl_xor(largest, 1));
    return power_for_f16(fmaxf(largest, shfl_xor(largest, 2)));
}

/* Keys of a row format: lane l takes words l % 4 of key l / 4 of eight. Returns into `scales` what
 * sums of keys 2 (l % 4) + 0 .. 1 are to be multiplied by. */
template <s32 FORMAT>
KV_DEVICE void multiply_code_keys(Scores &s, const u8 *tile, const Queries<false> &queries,
                                  float (&scales)[KEY_TILES][2]) {
    constexpr s32 fields = FIELDS<FORMAT>, groups = HEAD_DIM / 32;
    const s32 w = lane_id() & 3;
    const u8 *metadata = tile + TILE_METADATA<FORMAT, HEAD_DIM>;
#pragma unroll
    for (s32 n = 0; n < KEY_TILES; n++) {
        const s32 key = 8 * n + (lane_id() >> 2);
        const u8 *row = tile + key * CODE_PITCH<FORMAT, HEAD_DIM>;
        const u16 *minima = reinterpret_cast<const u16 *>(metadata) + key * 2 * groups;
        float power = 1.0f;
        if constexpr (FORMAT == KV_FORMAT_INT4)
            power = power_of_key(minima, groups);
#pragma unroll UNROLL_K
        for (s32 chunk = 0; chunk < HEAD_DIM / CHUNK<FORMAT>; chunk++) {
            u32 words[NUM_WORDS<FORMAT>], pairs[fields][2];
            load_codes<FORMAT, HEAD_DIM>(row, chunk, w, words);
            levels<FORMAT, F16>(words, pairs);
            Affine affine;
            if constexpr (FORMAT == KV_FORMAT_INT4)
                affine = {same_twice(bf16_to_f32(minima[chunk]) * power),
                          same_twice(bf16_to_f32(minima[groups + chunk]) * power)};
#pragma unroll
            for (s32 field = 0; field < fields; field++) {
                u32 a[4], *b = pairs[field];
                if constexpr (FORMAT == KV_FORMAT_INT4) {
                    b[0] = hfma2(b[0], affine.step, affine.minimum);
                    b[1] = hfma2(b[1], affine.step, affine.minimum);
                }
                queries.get(a, 0, chunk * fields + field);
                mma_f16(s[n], a, b[0], b[1]);
            }
        }
        if constexpr (FORMAT == KV_FORMAT_INT4) {
            scales[n][0] = 1.0f / shfl(power, 8 * w);
            scales[n][1] = 1.0f / shfl(power, 8 * w + 4);
        } else if constexpr (FormatOf<FORMAT>::ROW_METADATA_BYTES > 0) {
            const u32 pair = reinterpret_cast<const u32 *>(metadata)[4 * n + w];
            scales[n][0] = u32_as_float(pair << 16);
            scales[n][1] = u32_as_float(pair & 0xffff0000u);
        } else {
            scales[n][0] = scales[n][1] = 1.0f;
        }
    }
}

/* Channels 16 k + 4 (lane % 4) + 0 .. 3: bfloat16 times `power` as two pairs of float16. */
KV_DEVICE void load_channels(const u16 *metadata, s32 k, float power, u32 (&pairs)[2]) {
    const u32 *from = reinterpret_cast<const u32 *>(metadata) + 8 * k + 2 * (lane_id() & 3);
#pragma unroll
    for (s32 i = 0; i < 2; i++)
        pairs[i] = pack_f16(u32_as_float(from[i] << 16) * power,
                            u32_as_float(from[i] & 0xffff0000u) * power);
}

/* The power of two that a group's elements come times. */
template <s32 DIM> KV_DEVICE float power_of_group(const u16 *minima, float largest_code) {
    float largest = 0.0f;
    for (s32 d = lane_id(); d < DIM; d += 32) {
        const float low = bf16_to_f32(minima[d]), step = bf16_to_f32(minima[DIM + d]);
        largest = fmaxf(largest, fmaxf(fabsf(low), fabsf(fmaf(step, largest_code, low))));
    }
    return power_for_f16(reduce_max(largest));
}

/* A group of a channel format: lane l takes the words of tokens l / 4 and l / 4 + 8, whose fields
 * are also those of tokens 16 later, and for chan2 those of channels half a row further. */
template <s32 FORMAT>
KV_DEVICE void multiply_channel_keys(Scores &s, const u8 *tile, const Queries<false> &queries,
                                     float (&scales)[KEY_TILES][2]) {
    constexpr s32 fields = FIELDS<FORMAT>, steps = K_STEPS / (fields / 2);
    const s32 token = lane_id() >> 2, w = lane_id() & 3;
    const u16 *minima = reinterpret_cast<const u16 *>(tile + TILE_METADATA<FORMAT, HEAD_DIM>);
    const float power = power_of_group<HEAD_DIM>(minima, (1 << FormatOf<FORMAT>::BITS) - 1);
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
            u32 a[4], minimum[2], step[2];
            load_channels(minima, k + part * steps, power, minimum);
            load_channels(minima + HEAD_DIM, k + part * steps, power, step);
            queries.get(a, 0, k + part * steps);
#pragma unroll
            for (s32 n = 0; n < 4; n++) {
                const u32 *code = pairs[n & 1][2 * part + (n >> 1)];
                mma_f16(s[n], a, hfma2(code[0], step[0], minimum[0]),
                        hfma2(code[1], step[1], minimum[1]));
            }
        }
    }
#pragma unroll
    for (s32 n = 0; n < KEY_TILES; n++)
        scales[n][0] = scales[n][1] = 1.0f / power;
}

/* The scores of a tile, before anything but their formats is done to them. */
template <bool RAW>
KV_DEVICE void multiply_keys(Scores &s, u8 *tile, const Queries<RAW> &queries,
                             const float (&factors)[2], const float (&biases)[2]) {
    if constexpr (K_ENCODED<RAW>) {
        float scales[KEY_TILES][2];
        if constexpr (IS_CHANNEL<K_FORMAT>)
            multiply_channel_keys<K_FORMAT>(s, tile, queries, scales);
        else
            multiply_code_keys<K_FORMAT>(s, tile, queries, scales);
#pragma unroll
        for (s32 n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (s32 i = 0; i < 4; i++)
                s[n][i] = fmaf(s[n][i] * factors[i >> 1], scales[n][i & 1], biases[i >> 1]);
    } else {
        multiply_float_keys(s, tile, queries);
        if constexpr (SCALED_ROWS<RAW>) {
#pragma unroll
            for (s32 n = 0; n < KEY_TILES; n++)
#pragma unroll
                for (s32 i = 0; i < 4; i++)
                    s[n][i] *= factors[i >> 1];
        }
    }
}
