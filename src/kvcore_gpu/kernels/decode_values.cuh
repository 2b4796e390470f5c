/* o += weights . V of a tile by matrix products.
 *
 * Sums of float values are of elements 8 n + 2 (lane % 4) + 0 .. 1, as m16n8k16 has them. Of encoded
 * ones o[2 k + i] is of elements 16 k + 4 (lane % 4) + i and two further: a lane decodes two
 * neighbours of two values at once, and each goes to a product of its own.
 */
#pragma once
#include "decode_layout.cuh"
#include "softmax.cuh"

typedef float Sums[2 * V_STEPS][4];
typedef u32 Weights[TILE / 16][4];

/* The element of o[n][i], within the slice. */
template <bool RAW> KV_DEVICE s32 element_of_sum(s32 n, s32 i) {
    const s32 w = lane_id() & 3;
    if constexpr (V_ENCODED<RAW>)
        return 16 * (n >> 1) + 4 * w + 2 * (i & 1) + (n & 1);
    else
        return 8 * n + 2 * w + (i & 1);
}

/* Which of the keys of a tile each row sees, where not all see all: a lane's bits 4 n + i are for
 * s[n][i], those of `any` for keys of the tile. */
struct Seen {
    bool everything;
    bool mixed; /* a key that some rows see and others do not */
    u32 own, any;
};

/* 1 where a row sees a key, as a first operand. */
template <bool BF16> KV_DEVICE void seen_fragment(u32 (&a)[4], const Seen &seen, s32 step) {
    constexpr u32 one = BF16 ? 0x3f80 : 0x3c00;
#pragma unroll
    for (s32 i = 0; i < 4; i++) {
        const u32 bits = seen.own >> (8 * step + 4 * (i >> 1) + 2 * (i & 1));
        a[i] = (bits & 1 ? one : 0) | (bits & 2 ? one << 16 : 0);
    }
}

/* 1 for each of a pair that is a NaN, or an infinity of this sign. */
template <bool BF16> KV_DEVICE u32 is_infinite(u32 pair, u32 sign) {
    constexpr u32 exponent = BF16 ? 0x7f80 : 0x7c00, one = BF16 ? 0x3f80 : 0x3c00;
    u32 found = 0;
#pragma unroll
    for (s32 half = 0; half < 32; half += 16) {
        const u32 bits = pair >> half & 0xffff, size = bits & 0x7fff;
        if (size > exponent || bits == (exponent | sign))
            found |= one << half;
    }
    return found;
}

/* Infinities and NaN among values that other rows do not see: these rows' weights are 0, and 0 times
 * such a value would be a NaN. They are counted apart for each row, and then added. */
template <bool BF16>
KV_DEVICE void add_not_finite(float (&o)[4], const Seen &seen, s32 step, u32 b0, u32 b1) {
    float above[4] = {}, below[4] = {};
    u32 a[4];
    seen_fragment<BF16>(a, seen, step);
    mma<BF16>(above, a, is_infinite<BF16>(b0, 0), is_infinite<BF16>(b1, 0));
    mma<BF16>(below, a, is_infinite<BF16>(b0, 0x8000), is_infinite<BF16>(b1, 0x8000));
#pragma unroll
    for (s32 i = 0; i < 4; i++) {
        if (above[i] > 0.0f)
            o[i] -= MINUS_INFINITY;
        if (below[i] > 0.0f)
            o[i] += MINUS_INFINITY;
    }
}

template <bool BF16>
KV_DEVICE void multiply_mixed(float (&o)[4], const u32 (&a)[4], const Seen &seen, s32 step, u32 b0,
                              u32 b1) {
    bool found = false;
    mma<BF16>(o, a, finite_pair<BF16>(b0, found), finite_pair<BF16>(b1, found));
    if (any(found))
        add_not_finite<BF16>(o, seen, step, b0, b1);
}

/* Values that no row sees may be anything. */
KV_DEVICE void clear_unseen(u8 *tile, u32 seen) {
    const uint4 zeros = {};
    for (s32 key = 0; key < TILE; key++)
        if (!(seen >> key & 1))
            for (s32 column = lane_id(); column < V_CHUNKS; column += 32)
                *reinterpret_cast<uint4 *>(chunk_of<V_CHUNKS>(tile, key, column)) = zeros;
    sync_warp();
}

template <bool MIXED>
KV_DEVICE void multiply_float_values(Sums &o, u8 *tile, const Weights &weights, const Seen &seen,
                                     s32 slice) {
    const s32 first = V_IN_K ? slice * V_STEPS : 0;
#pragma unroll
    for (s32 n = 0; n < V_STEPS; n++) {
        if (V_IN_K && SLICES > 1 && first + n >= K_STEPS)
            break;
#pragma unroll
        for (s32 step = 0; step < TILE / 16; step++) {
            u32 b[4];
            load_values_fragment<V_CHUNKS>(b, tile, 16 * step, first + n);
            if constexpr (MIXED) {
                multiply_mixed<V_IS_BF16>(o[2 * n], weights[step], seen, step, b[0], b[1]);
                multiply_mixed<V_IS_BF16>(o[2 * n + 1], weights[step], seen, step, b[2], b[3]);
            } else {
                mma<V_IS_BF16>(o[2 * n], weights[step], b[0], b[1]);
                mma<V_IS_BF16>(o[2 * n + 1], weights[step], b[2], b[3]);
            }
        }
    }
}

/* Bytes 0 and 1 of the words of two tokens in turn, or bytes 2 and 3 for the upper neighbours. */
KV_DEVICE u32 interleaved(u32 a, u32 b) { return byte_perm(a, b, lane_id() & 4 ? 0x7362 : 0x5140); }

/* A number of int4's metadata for two tokens; zero for one that no row sees, where it may be NaN. */
KV_DEVICE u32 metadata_pair(const u16 *metadata, s32 stride, s32 key, u32 seen) {
    const u32 low = seen >> key & 1 ? metadata[key * stride] : 0;
    const u32 high = seen >> key & 2 ? metadata[(key + 1) * stride] : 0;
    return low | high << 16;
}

/* Lane l takes tokens 2 (l % 4) + 0 .. 1 and + 8 .. 9 of sixteen, and of each word two elements. */
template <s32 FORMAT>
KV_DEVICE void multiply_code_values(Sums &o, const u8 *tile, const Weights &weights,
                                    const Seen &seen, s32 slice) {
    constexpr s32 fields = FIELDS<FORMAT>, words = NUM_WORDS<FORMAT>;
    constexpr s32 chunks = SLICE_DIM / CHUNK<FORMAT>, groups = HEAD_DIM_V / 32;
    constexpr s32 pitch = CODE_PITCH<FORMAT, HEAD_DIM_V>;
    const s32 w = lane_id() >> 3;
    const u16 *metadata = reinterpret_cast<const u16 *>(tile + TILE_METADATA<FORMAT, HEAD_DIM_V>);
    const u32 any = seen.everything ? ~0u : seen.any;
#pragma unroll
    for (s32 c = 0; c < chunks; c++) {
        const s32 chunk = slice * chunks + c;
        if (SLICES > 1 && chunk >= HEAD_DIM_V / CHUNK<FORMAT>)
            break;
#pragma unroll
        for (s32 step = 0; step < TILE / 16; step++) {
            u32 b[2][fields][2];
#pragma unroll
            for (s32 half = 0; half < 2; half++) {
                const s32 key = 16 * step + 8 * half + 2 * (lane_id() & 3);
                u32 low[words], high[words];
                load_codes<FORMAT, HEAD_DIM_V>(tile + key * pitch, chunk, w, low);
                load_codes<FORMAT, HEAD_DIM_V>(tile + (key + 1) * pitch, chunk, w, high);
#pragma unroll
                for (s32 i = 0; i < words; i++)
                    low[i] = interleaved(low[i], high[i]);
                levels<FORMAT, BF16>(low, b[half]);
                if constexpr (FORMAT == KV_FORMAT_INT4) {
                    const u32 minimum = metadata_pair(metadata + chunk, 2 * groups, key, any);
                    const u32 size = metadata_pair(metadata + groups + chunk, 2 * groups, key, any);
#pragma unroll
                    for (s32 i = 0; i < 4; i++)
                        b[half][i >> 1][i & 1] = hfma2_bf16(b[half][i >> 1][i & 1], size, minimum);
                }
            }
#pragma unroll
            for (s32 field = 0; field < fields; field++)
#pragma unroll
                for (s32 i = 0; i < 2; i++)
                    mma_bf16(o[2 * (c * fields + field) + i], weights[step], b[0][field][i],
                             b[1][field][i]);
        }
    }
}

/* Weights p as first operands; `l` takes their sums. Where values have scales, weights take these
 * in, and l sums what was not rounded yet. p of a key that a row does not see is 0, whatever the
 * key's scale. */
template <bool RAW>
KV_DEVICE void pack_tile(Weights &weights, const Scores &s, const u8 *v_tile, float (&l)[2]) {
    constexpr bool scaled = V_ENCODED<RAW> && FormatOf<V_FORMAT>::ROW_METADATA_BYTES > 0;
#pragma unroll
    for (s32 n = 0; n < KEY_TILES; n++) {
        u32 pair = 0;
        if constexpr (scaled)
            pair = reinterpret_cast<const u32 *>(
                v_tile + TILE_METADATA<V_FORMAT, HEAD_DIM_V>)[4 * n + (lane_id() & 3)];
#pragma unroll
        for (s32 half = 0; half < 2; half++) {
            const float a = s[n][2 * half], b = s[n][2 * half + 1];
            u32 &to = weights[n >> 1][2 * (n & 1) + half];
            if constexpr (scaled) {
                l[half] += a + b;
                to = pack_bf16(a == 0.0f ? 0.0f : a * u32_as_float(pair << 16),
                               b == 0.0f ? 0.0f : b * u32_as_float(pair & 0xffff0000u));
            } else {
                to = pack_weights<V_IS_BF16>(a, b, l[half]);
            }
        }
    }
}

template <bool RAW>
KV_DEVICE void multiply_values(Sums &o, u8 *tile, const Weights &weights, const Seen &seen,
                               s32 slice) {
    if constexpr (!V_ENCODED<RAW>) {
        if (!seen.everything)
            clear_unseen(tile, seen.any);
        if (!seen.everything && seen.mixed)
            multiply_float_values<true>(o, tile, weights, seen, slice);
        else
            multiply_float_values<false>(o, tile, weights, seen, slice);
    } else {
        multiply_code_values<V_FORMAT>(o, tile, weights, seen, slice);
    }
}
