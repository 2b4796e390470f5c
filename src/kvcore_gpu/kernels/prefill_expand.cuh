/* Codes of a stage into tiles of 16-bit numbers: levels where a row has one scale, which goes into
 * the scores and the weights, and numbers where it has a minimum and steps. */
#pragma once
#include "prefill_load.cuh"

/* Metadata of the stage's tokens, or groups of tokens, one after the other. */
template <s32 FORMAT, s32 DIM> KV_DEVICE const u16 *metadata_of(const u8 *stage) {
    return reinterpret_cast<const u16 *>(stage + KEYS * CODE_BYTES<FORMAT, DIM>);
}

/* Minima of int4 for a token, or of a channel format for a group; steps are `count` further on. */
template <s32 FORMAT, s32 DIM> KV_DEVICE const u16 *minima_of(const u8 *stage, s32 token) {
    const u16 *metadata = metadata_of<FORMAT, DIM>(stage);
    return IS_CHANNEL<FORMAT> ? metadata + token / GROUP_TOKENS * 2 * DIM
                              : metadata + token * (DIM / 16);
}
template <s32 FORMAT, s32 DIM> constexpr s32 NUM_MINIMA = IS_CHANNEL<FORMAT> ? DIM : DIM / 32;

KV_DEVICE float decode_element(const u16 *minima, s32 count, s32 i, float level) {
    return bf16_to_f32(minima[i]) + level * bf16_to_f32(minima[count + i]);
}

/* The largest magnitude that a code of one minimum can stand for. */
template <s32 FORMAT> KV_DEVICE float largest_element(const u16 *minima, s32 count, s32 i) {
    constexpr float top = (1 << FormatOf<FORMAT>::BITS) - 1;
    return fmaxf(fabsf(bf16_to_f32(minima[i])), fabsf(decode_element(minima, count, i, top)));
}

/* What sums over a key's tile row are to be multiplied with. Keys with minima are brought into the
 * range of float16 by a power of two: of the key, or of its group. */
KV_DEVICE void make_key_scales(const Shared &shared, const u8 *stage) {
    if constexpr (IS_CHANNEL<K_FORMAT>) {
        constexpr s32 count = NUM_MINIMA<K_FORMAT, HEAD_DIM>;
        for (s32 first = GROUP_TOKENS * warp_id(); first < KEYS; first += GROUP_TOKENS * WARPS) {
            const u16 *minima = minima_of<K_FORMAT, HEAD_DIM>(stage, first);
            float largest = 0.0f;
            for (s32 i = lane_id(); i < count; i += 32)
                largest = fmaxf(largest, largest_element<K_FORMAT>(minima, count, i));
            shared.key_scales[first + lane_id()] = 1.0f / power_for_f16(reduce_max(largest));
        }
    } else if (threadIdx.x < KEYS) {
        const s32 token = threadIdx.x;
        float scale = 1.0f;
        if constexpr (HAS_MINIMUM<K_FORMAT>) {
            constexpr s32 count = NUM_MINIMA<K_FORMAT, HEAD_DIM>;
            const u16 *minima = minima_of<K_FORMAT, HEAD_DIM>(stage, token);
            float largest = 0.0f;
            for (s32 i = 0; i < count; i++)
                largest = fmaxf(largest, largest_element<K_FORMAT>(minima, count, i));
            scale = 1.0f / power_for_f16(largest);
        } else if constexpr (METADATA_BYTES<K_FORMAT, HEAD_DIM> > 0) {
            scale = bf16_to_f32(metadata_of<K_FORMAT, HEAD_DIM>(stage)[token]);
        }
        shared.key_scales[token] = scale;
    }
}

/* What weights are to be multiplied with: 0 for a value that nobody wants, whose scale may be a NaN. */
KV_DEVICE void make_value_scales(const Shared &shared, const u8 *stage, s32 first,
                                 const Range &range) {
    const s32 token = threadIdx.x;
    if (token >= KEYS)
        return;
    float scale = 1.0f;
    if constexpr (!HAS_MINIMUM<V_FORMAT> && METADATA_BYTES<V_FORMAT, HEAD_DIM_V> > 0)
        scale = bf16_to_f32(metadata_of<V_FORMAT, HEAD_DIM_V>(stage)[token]);
    shared.value_scales[token] = holds(range, first + token) ? scale : 0.0f;
}

/* Elements d to d + 3 of a row of the tile. */
template <s32 CHUNKS> KV_DEVICE void store_four(u8 *tile, s32 row, s32 d, u32 low, u32 high) {
    *reinterpret_cast<uint2 *>(chunk_of<CHUNKS>(tile, row, d / 8) + 2 * (d & 7)) = uint2{low, high};
}

/* The numbers that four codes stand for, times `power`. */
template <bool IS_BF16>
KV_DEVICE void decode_four(u32 (&pairs)[2], const float (&minima)[4], const float (&steps)[4],
                           float power) {
    float x[4];
#pragma unroll
    for (s32 i = 0; i < 4; i++) {
        const float level = unpack<IS_BF16>((u16)(pairs[i / 2] >> 16 * (i & 1)));
        x[i] = power * (minima[i] + level * steps[i]);
    }
    pairs[0] = pack<IS_BF16>(x[0], x[1]);
    pairs[1] = pack<IS_BF16>(x[2], x[3]);
}

/* Four neighbours of metadata. */
KV_DEVICE void load_four(const u16 *from, float (&x)[4]) {
    const uint2 words = *reinterpret_cast<const uint2 *>(from);
    x[0] = u32_as_float(words.x << 16);
    x[1] = u32_as_float(words.x & 0xffff0000u);
    x[2] = u32_as_float(words.y << 16);
    x[3] = u32_as_float(words.y & 0xffff0000u);
}

/* The words w of a token's chunk. A value that nobody wants becomes zeros, as its minimum may be a
 * NaN. */
template <s32 FORMAT, s32 DIM, bool IS_BF16>
KV_DEVICE void expand_words(u8 *tile, const u8 *stage, const float *scales,
                            const u32 (&words)[NUM_WORDS<FORMAT>], s32 token, s32 chunk, s32 w,
                            bool wanted) {
    using Float = typename FloatType<IS_BF16>::Type;
    u32 pairs[FIELDS<FORMAT>][2];
    levels<FORMAT, Float>(words, pairs);
#pragma unroll
    for (s32 k = 0; k < FIELDS<FORMAT>; k++) {
        const s32 d = chunk * CHUNK<FORMAT> + 16 * k + 4 * w;
        if constexpr (HAS_MINIMUM<FORMAT>) {
            const u16 *minima = minima_of<FORMAT, DIM>(stage, token) + d / 32;
            const float low = bf16_to_f32(minima[0]);
            const float step = bf16_to_f32(minima[NUM_MINIMA<FORMAT, DIM>]);
            decode_four<IS_BF16>(pairs[k], {low, low, low, low}, {step, step, step, step},
                                 IS_BF16 ? 1.0f : 1.0f / scales[token]);
            if (!wanted)
                pairs[k][0] = pairs[k][1] = 0;
        }
        store_four<ROW_CHUNKS<DIM>>(tile, token, d, pairs[k][0], pairs[k][1]);
    }
}

/* Row formats. Where it fits, a thread has the same words of several tokens, some of them at a time:
 * no store is between their loads. */
template <s32 FORMAT, s32 DIM, bool IS_BF16>
KV_DEVICE void expand_row_codes(u8 *tile, const u8 *stage, const float *scales, s32 first,
                                const Range &range) {
    constexpr s32 chunks = DIM / CHUNK<FORMAT>, of_token = 4 * chunks;
    constexpr bool fits = THREADS % of_token == 0 && THREADS / of_token <= KEYS;
    constexpr s32 step = fits ? THREADS / of_token : 1;
    constexpr s32 wanted_batch = HAS_MINIMUM<FORMAT> ? 1 : 4 / FIELDS<FORMAT>;
    constexpr s32 batch = fits && wanted_batch < KEYS / step ? wanted_batch : 1;
    const u32 thread = opaque(threadIdx.x);
    const s32 end = fits ? KEYS / step : (KEYS * of_token + THREADS - 1) / THREADS;
#pragma unroll 1
    for (s32 start = 0; start < end; start += batch) {
        u32 words[batch][NUM_WORDS<FORMAT>];
        s32 token[batch], chunk = thread / 4 % chunks;
#pragma unroll
        for (s32 n = 0; n < batch; n++) {
            token[n] = thread / of_token + (start + n) * step;
            if constexpr (!fits) {
                const u32 i = thread + start * THREADS;
                token[n] = i / of_token;
                chunk = i / 4 % chunks;
                if (token[n] >= KEYS)
                    return;
            }
            load_codes<FORMAT, DIM>(stage + token[n] * CODE_BYTES<FORMAT, DIM>, chunk, thread & 3,
                                    words[n]);
        }
#pragma unroll
        for (s32 n = 0; n < batch; n++)
            expand_words<FORMAT, DIM, IS_BF16>(tile, stage, scales, words[n], token[n], chunk,
                                               thread & 3, holds(range, first + token[n]));
    }
}

/* Keys of chan4 and chan2: a word has four channels of two tokens, chan2's four more. */
template <s32 FORMAT, s32 DIM>
KV_DEVICE void expand_channel_codes(u8 *tile, const u8 *stage, const float *scales) {
    constexpr s32 lines = DIM / (2 * FIELDS<FORMAT>), items = KEYS / GROUP_TOKENS * lines * 16;
#pragma unroll 1
    for (s32 i = opaque(threadIdx.x); i < items; i += THREADS) {
        const s32 t = i & 15, line = i / 16 % lines, group = i / 16 / lines;
        const u8 *codes = stage + group * GROUP_TOKENS * CODE_BYTES<FORMAT, DIM>;
        const u32 words[1] = {reinterpret_cast<const u32 *>(codes)[16 * line + t]};
        u32 pairs[FIELDS<FORMAT>][2];
        levels<FORMAT, F16>(words, pairs);
#pragma unroll
        for (s32 k = 0; k < FIELDS<FORMAT>; k++) {
            const s32 token = group * GROUP_TOKENS + t + 16 * (k & 1);
            const s32 d = 4 * line + k / 2 * (DIM / 2);
            const u16 *minima = minima_of<FORMAT, DIM>(stage, token) + d;
            float low[4], step[4];
            load_four(minima, low);
            load_four(minima + DIM, step);
            decode_four<false>(pairs[k], low, step, 1.0f / scales[token]);
            store_four<ROW_CHUNKS<DIM>>(tile, token, d, pairs[k][0], pairs[k][1]);
        }
    }
}

/* The stage's codes into k_tile and v_tile; the caller waits before and after. */
KV_DEVICE void expand_tile(const Shared &shared, s32 stage, s32 first, const Range &range) {
    const u8 *k = k_stage(shared, false, stage), *v = v_stage(shared, false, stage);
    if constexpr (K_QUANTIZED) {
        make_key_scales(shared, k);
        if constexpr (HAS_MINIMUM<K_FORMAT>)
            sync_threads();
        if constexpr (IS_CHANNEL<K_FORMAT>)
            expand_channel_codes<K_FORMAT, HEAD_DIM>(k_tile(shared, false, stage), k,
                                                     shared.key_scales);
        else
            expand_row_codes<K_FORMAT, HEAD_DIM, false>(k_tile(shared, false, stage), k,
                                                        shared.key_scales, first, range);
    }
    if constexpr (V_QUANTIZED) {
        make_value_scales(shared, v, first, range);
        expand_row_codes<V_FORMAT, HEAD_DIM_V, true>(v_tile(shared, false, stage), v,
                                                     shared.value_scales, first, range);
    }
}
