/* o += weights . V of a tile by matrix products.
 *
 * A lane has sums of columns 8 n + 2 (lane % 4) + 0 .. 1, as m16n8k16 has them. Of floats these are a
 * slice's elements in order. Encoded values are decoded two tokens at once, a word of each, whose
 * elements go to products of their own: a column's are those of the word that lanes 4 c to 4 c + 3
 * of m16n8k16 take, c the column modulo 8.
 */
#pragma once
#include "decode_layout.cuh"
#include "softmax.cuh"

typedef float Sums[2 * V_STEPS][4];
typedef u32 Weights[TILE / 16][4];

/* The column of an element of the slice. */
template <s32 FORMAT, s32 DIM> KV_DEVICE s32 column_of_code(s32 element) {
    constexpr s32 fields = FIELDS<FORMAT>, chunk = CHUNK<FORMAT>, words = VALUE_WORDS<FORMAT, DIM>;
    const s32 field = element % chunk / 16, part = element >> 1 & 1, pair = element & 1;
    const s32 word = element / chunk * 4 + element % 16 / 4;
    if constexpr (HALF_WORDS<FORMAT, DIM>)
        return 8 * ((element / chunk * fields + field) * 2 + pair) + word % 4 * 2 + part;
    const s32 decoded = word / (8 * words) * words + word % words; /* by the same lanes before it */
    return 8 * (((decoded * 2 + part) * fields + field) * 2 + pair) + word % (8 * words) / words;
}

/* Values as floats, of `num_keys` keys. */
KV_DEVICE void multiply_float_values(Sums &o, u8 *tile, const Weights &weights, s32 slice,
                                     s32 num_keys) {
    const s32 first = V_IN_K ? slice * V_STEPS : 0;
#pragma unroll
    for (s32 n = 0; n < V_STEPS; n++) {
        if (V_IN_K && SLICES > 1 && first + n >= K_STEPS)
            break;
#pragma unroll
        for (s32 step = 0; step < TILE / 16; step++) {
            if (16 * step >= num_keys)
                break;
            u32 b[4];
            load_values_fragment<V_CHUNKS>(b, tile, 16 * step, first + n);
            mma<V_IS_BF16>(o[2 * n], weights[step], b[0], b[1]);
            mma<V_IS_BF16>(o[2 * n + 1], weights[step], b[2], b[3]);
        }
    }
}

/* What is decoded of a word of each of two tokens: bytes 0 and 1 of both in turn (part 0), or bytes 2
 * and 3. Of half words each lane has its own part. */
template <bool HALF> KV_DEVICE u32 part_of_words(u32 a, u32 b, s32 part) {
    if constexpr (HALF)
        return byte_perm(a, b, lane_id() & 4 ? 0x7362 : 0x5140);
    return byte_perm(a, b, part ? 0x7362 : 0x5140);
}

/* int4: numbers of two tokens, `stride` apart. */
KV_DEVICE u32 metadata_pair(const u16 *metadata, s32 stride) {
    return metadata[0] | (u32)metadata[stride] << 16;
}

/* Lane l takes tokens 2 (l % 4) + 0 .. 1 and + 8 .. 9 of sixteen. */
template <s32 FORMAT>
KV_DEVICE void multiply_code_values(Sums &o, const u8 *tile, const Weights &weights, s32 slice,
                                    const HalfTable &table) {
    constexpr s32 fields = FIELDS<FORMAT>, planes = NUM_WORDS<FORMAT>, dim = HEAD_DIM_V;
    constexpr s32 words = VALUE_WORDS<FORMAT, dim>, pitch = CODE_PITCH<FORMAT, dim>;
    constexpr bool half_words = HALF_WORDS<FORMAT, dim>;
    constexpr s32 parts = half_words ? 1 : 2, load_chunks = half_words ? 1 : 2 * words;
    constexpr s32 chunks = SLICE_DIM / CHUNK<FORMAT>, groups = dim / 32;
    static_assert(pitch % (4 * words) == 0, "words that are loaded at once are aligned");
    const s32 key = 2 * (lane_id() & 3), w = half_words ? lane_id() >> 3 : lane_id() >> 2;
    const u16 *minima = reinterpret_cast<const u16 *>(tile + TILE_METADATA<FORMAT, dim>);
#pragma unroll
    for (s32 c = 0; c < chunks; c += load_chunks) {
        const s32 chunk = SLICES > 1 ? slice * chunks + c : c;
        if (SLICES > 1 && chunk >= dim / CHUNK<FORMAT>)
            break;
        const s32 word = 4 * chunk + words * w;
#pragma unroll
        for (s32 step = 0; step < TILE / 16; step++) {
            u32 codes[4][words][planes];
#pragma unroll
            for (s32 i = 0; i < 4; i++)
                load_row_words<FORMAT, dim>(
                    tile + (16 * step + key + 8 * (i >> 1) + (i & 1)) * pitch, word, codes[i]);
            u32 minimum[2], size[2];
            if constexpr (FORMAT == KV_FORMAT_INT4) {
#pragma unroll
                for (s32 half = 0; half < 2; half++) {
                    const u16 *own =
                        minima + (16 * step + key + 8 * half) * 2 * groups + (word >> 2);
                    minimum[half] = metadata_pair(own, 2 * groups);
                    size[half] = metadata_pair(own + groups, 2 * groups);
                }
            }
#pragma unroll
            for (s32 i = 0; i < words * parts; i++) {
                u32 b[2][fields][2];
#pragma unroll
                for (s32 half = 0; half < 2; half++) {
                    u32 both[planes];
#pragma unroll
                    for (s32 plane = 0; plane < planes; plane++)
                        both[plane] = part_of_words<half_words>(
                            codes[2 * half][i / parts][plane],
                            codes[2 * half + 1][i / parts][plane], i % parts);
                    levels<FORMAT, BF16>(both, b[half], table);
                    if constexpr (FORMAT == KV_FORMAT_INT4) {
#pragma unroll
                        for (s32 j = 0; j < 4; j++)
                            b[half][j >> 1][j & 1] =
                                hfma2_bf16(b[half][j >> 1][j & 1], size[half], minimum[half]);
                    }
                }
#pragma unroll
                for (s32 j = 0; j < 2 * fields; j++)
                    mma_bf16(o[2 * fields * (c / load_chunks * words * parts + i) + j],
                             weights[step], b[0][j >> 1][j & 1], b[1][j >> 1][j & 1]);
            }
        }
    }
}

/* Weights p as first operands; `l` takes their sums. Where values have scales, weights take these
 * in, and l sums what was not rounded yet. */
template <bool SCALED>
KV_DEVICE void pack_tile(Weights &weights, const float (&s)[KEY_TILES][4], const u8 *v_tile,
                         float (&l)[2]) {
#pragma unroll
    for (s32 n = 0; n < KEY_TILES; n++) {
        u32 pair = 0;
        if constexpr (SCALED)
            pair = reinterpret_cast<const u32 *>(
                v_tile + TILE_METADATA<V_FORMAT, HEAD_DIM_V>)[4 * n + (lane_id() & 3)];
#pragma unroll
        for (s32 half = 0; half < 2; half++) {
            const float a = s[n][2 * half], b = s[n][2 * half + 1];
            u32 &to = weights[n >> 1][2 * (n & 1) + half];
            if constexpr (SCALED) {
                l[half] += a + b;
                to = pack_bf16(a * u32_as_float(pair << 16), b * u32_as_float(pair & 0xffff0000u));
            } else {
                to = pack_weights<V_IS_BF16>(a, b, l[half]);
            }
        }
    }
}

/* o += p . V, of which p are the weights so far. */
KV_DEVICE void add_values(Sums &o, float (&l)[2], const float (&s)[KEY_TILES][4], u8 *tile,
                          s32 slice, const HalfTable &table, bool raw) {
    constexpr bool scaled = V_QUANTIZED && FormatOf<V_FORMAT>::ROW_METADATA_BYTES > 0;
    Weights weights;
    if constexpr (V_QUANTIZED)
        if (!raw) {
            pack_tile<scaled>(weights, s, tile, l);
            multiply_code_values<V_FORMAT>(o, tile, weights, slice, table);
            return;
        }
    pack_tile<false>(weights, s, tile, l);
    multiply_float_values(o, tile, weights, slice, raw ? RAW_TILE : TILE);
}
