/* Elements of a key or a value in the lanes that share it: as they are stored until they are used.
 *
 * A row is cut into items, and lane l of LANES takes items l, l + LANES, ...: 16 bytes of floats, or
 * the elements of a word of codes.
 */
#pragma once
#include "formats.cuh"
#include "sight.cuh"

template <s32 FORMAT, s32 DIM, s32 LANES> struct FloatElements {
    static constexpr s32 SIZE = FORMAT == KV_FORMAT_FP32 ? 4 : 8; /* elements of an item */
    static constexpr s32 ITEMS = DIM / SIZE, COUNT = (ITEMS + LANES - 1) / LANES;
    static constexpr bool SCALED = false;

    uint4 words[COUNT];

    /* Row `offset` of the tile at `block`. */
    KV_DEVICE void load(const u8 *block, s64 stride, s64, s32 offset, s32 lane) {
        const u8 *row = block + offset * stride;
#pragma unroll
        for (s32 i = 0; i < COUNT; i++)
            words[i] = i * LANES + lane < ITEMS ? load16(row + 16 * (i * LANES + lane)) : uint4{};
    }

    KV_DEVICE void get(s32 i, float (&x)[SIZE]) const {
        const u32 parts[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
#pragma unroll
        for (s32 j = 0; j < 4; j++) {
            if constexpr (FORMAT == KV_FORMAT_FP32) {
                x[j] = u32_as_float(parts[j]);
            } else {
                const u16 low = (u16)parts[j], high = (u16)(parts[j] >> 16);
                x[2 * j] = FORMAT == KV_FORMAT_FP16 ? f16_to_f32(low) : bf16_to_f32(low);
                x[2 * j + 1] = FORMAT == KV_FORMAT_FP16 ? f16_to_f32(high) : bf16_to_f32(high);
            }
        }
    }

    /* The row's element that is x[j] of item i of a lane; DIM or more where there is none. */
    static KV_DEVICE s32 element(s32 i, s32 j, s32 lane) { return (i * LANES + lane) * SIZE + j; }
    KV_DEVICE float scale() const { return 1.0f; }
};

/* Levels, decoded where formats have minima; an item is a word (of all planes). */
template <s32 FORMAT, s32 DIM, s32 LANES> struct EncodedElements {
    static constexpr s32 HALVES = IS_CHANNEL<FORMAT> ? 2 : 1; /* fields that are other tokens */
    static constexpr s32 SIZE = 4 * FIELDS<FORMAT> / HALVES;
    static constexpr s32 ITEMS = DIM / SIZE, COUNT = (ITEMS + LANES - 1) / LANES;
    static constexpr bool SCALED = FormatOf<FORMAT>::ROW_METADATA_BYTES > 0;

    float x[COUNT * SIZE], row_scale;

    KV_DEVICE void load(const u8 *block, s64, s64 metadata, s32 offset, s32 lane) {
        row_scale = 1.0f;
        if constexpr (SCALED)
            row_scale = bf16_to_f32(reinterpret_cast<const u16 *>(block + metadata)[offset]);
#pragma unroll
        for (s32 i = 0; i < COUNT; i++) {
            const s32 item = i * LANES + lane;
#pragma unroll
            for (s32 j = 0; j < SIZE; j++)
                x[i * SIZE + j] = 0.0f;
            if (item >= ITEMS)
                continue;
            if constexpr (IS_CHANNEL<FORMAT>)
                load_channels(block, metadata, offset, i, item);
            else
                load_word(block, metadata, offset, i, item);
        }
    }

    KV_DEVICE void put(s32 i, s32 k, const u32 (&pair)[2]) {
#pragma unroll
        for (s32 j = 0; j < 4; j++)
            x[i * SIZE + 4 * k + j] = f16_to_f32((u16)(pair[j >> 1] >> 16 * (j & 1)));
    }

    KV_DEVICE void load_word(const u8 *block, s64 metadata, s32 offset, s32 i, s32 item) {
        u32 words[NUM_WORDS<FORMAT>], pairs[FIELDS<FORMAT>][2];
        load_codes<FORMAT, DIM>(block + offset * CODE_BYTES<FORMAT, DIM>, item / 4, item % 4,
                                words);
        levels<FORMAT, F16>(words, pairs);
#pragma unroll
        for (s32 k = 0; k < FIELDS<FORMAT>; k++)
            put(i, k, pairs[k]);
        if constexpr (FORMAT == KV_FORMAT_INT4) {
            const u16 *minima =
                reinterpret_cast<const u16 *>(block + metadata) + offset * (DIM / 16);
            const float low = bf16_to_f32(minima[item / 4]);
            const float step = bf16_to_f32(minima[DIM / 32 + item / 4]);
#pragma unroll
            for (s32 j = 0; j < SIZE; j++)
                x[i * SIZE + j] = fmaf(x[i * SIZE + j], step, low);
        }
    }

    KV_DEVICE void load_channels(const u8 *block, s64 metadata, s32 offset, s32 i, s32 item) {
        constexpr s32 group_codes = GROUP_TOKENS * CODE_BYTES<FORMAT, DIM>;
        const s32 group = offset / GROUP_TOKENS, token = offset % GROUP_TOKENS;
        const u32 word[1] = {
            reinterpret_cast<const u32 *>(block + group * group_codes)[16 * item + token % 16]};
        const u16 *minima = reinterpret_cast<const u16 *>(block + metadata) + group * 2 * DIM;
        u32 pairs[FIELDS<FORMAT>][2];
        levels<FORMAT, F16>(word, pairs);
#pragma unroll
        for (s32 part = 0; part < FIELDS<FORMAT> / 2; part++) {
            if (token < 16)
                put(i, part, pairs[2 * part]);
            else
                put(i, part, pairs[2 * part + 1]);
        }
#pragma unroll
        for (s32 j = 0; j < SIZE; j++) {
            const s32 channel = DIM / (SIZE / 4) * (j / 4) + 4 * item + j % 4;
            x[i * SIZE + j] = fmaf(x[i * SIZE + j], bf16_to_f32(minima[DIM + channel]),
                                   bf16_to_f32(minima[channel]));
        }
    }

    KV_DEVICE void get(s32 i, float (&to)[SIZE]) const {
#pragma unroll
        for (s32 j = 0; j < SIZE; j++)
            to[j] = x[i * SIZE + j];
    }

    static KV_DEVICE s32 element(s32 i, s32 j, s32 lane) {
        const s32 item = i * LANES + lane;
        if (item >= ITEMS)
            return DIM;
        if constexpr (IS_CHANNEL<FORMAT>)
            return DIM / (SIZE / 4) * (j / 4) + 4 * item + j % 4;
        else
            return item / 4 * CHUNK<FORMAT> + 16 * (j / 4) + 4 * (item % 4) + j % 4;
    }
    KV_DEVICE float scale() const { return row_scale; }
};

template <bool FLOAT, s32 FORMAT, s32 DIM, s32 LANES> struct ElementsOf {
    typedef FloatElements<FORMAT, DIM, LANES> Type;
};
template <s32 FORMAT, s32 DIM, s32 LANES> struct ElementsOf<false, FORMAT, DIM, LANES> {
    typedef EncodedElements<FORMAT, DIM, LANES> Type;
};
/* Of a pass: raw rows of a quantized format are bfloat16. */
template <s32 FORMAT, bool RAW>
constexpr s32 FORMAT_READ = RAW && !IS_FLOAT<FORMAT> ? (s32)KV_FORMAT_BF16 : FORMAT;
template <s32 FORMAT, bool RAW, s32 DIM, s32 LANES>
using Elements = typename ElementsOf<IS_FLOAT<FORMAT_READ<FORMAT, RAW>>, FORMAT_READ<FORMAT, RAW>,
                                     DIM, LANES>::Type;
