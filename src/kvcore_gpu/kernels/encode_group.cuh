/* Groups of 32 tokens to codes and metadata, channel by channel: chan4 and chan2, byte for byte as
 * docs/formats.md says. A warp takes 32 channels at a time, a lane each of their 32 tokens (of
 * chan2 two channels, head_dim / 2 apart, which share their bytes). Sources that include this are
 * compiled without fused multiply-adds. */
#pragma once
#include "device.cuh"
#include "encode.cuh"
#include "formats.cuh"
#include "metadata.cuh"
#include "rows.cuh"

/* What chan2 cuts off a channel's range at each end: with four codes, what the others gain is more
 * than what the outermost lose. */
constexpr float CHAN2_CLIP = 0.075f;

/* A group's rows: token t begins t * stride bytes behind `data`. The first `left_out` tokens, which
 * are always read raw and often far larger than the others, take the values of the one after. */
template <s32 DTYPE> struct GroupRows {
    const u8 *data;
    s32 stride, left_out;
};

/* One channel; its code of token t goes to bits t / 16 * BITS + shift of byte t % 16 of `bytes`. */
template <s32 FORMAT, s32 D, s32 DTYPE>
KV_DEVICE bool encode_channel(const GroupRows<DTYPE> &rows, s32 c, const float *bias, s32 shift,
                              u32 (&bytes)[4], u16 *metadata, bool pred) {
    constexpr s32 bits = FormatOf<FORMAT>::BITS;
    constexpr float top = (1 << bits) - 1, clip = bits == 2 ? CHAN2_CLIP : 0;
    float x[GROUP_TOKENS], least = LARGEST, most = -LARGEST;
    bool finite = true;
#pragma unroll
    for (s32 t = 0; t < GROUP_TOKENS; t++) {
        const u8 *row = rows.data + max(t, rows.left_out) * rows.stride;
        const float given = load_element<DTYPE>(row, c);
        finite = finite && is_finite(given);
        x[t] = bias ? subtract_bias(saturated(given), bias[c]) : saturated(given);
        least = fminf(least, x[t]);
        most = fmaxf(most, x[t]);
    }
    const Range range = encode_range(least, most, top, clip);
#pragma unroll
    for (s32 t = 0; t < GROUP_TOKENS; t++) {
        float u = (x[t] * range.down - range.from) * range.inverse;
        if (clip > 0)
            u = fminf(fmaxf(u, 0), top);
        bytes[t % 16 / 4] |= (round_code(u, 0) & 0xff) << (t % 4 * 8 + t / 16 * bits + shift);
    }
    if (pred) {
        metadata[c] = range.minimum;
        metadata[D + c] = range.step;
    }
    return finite;
}

/* Lane i of each four gets word i of all of them. */
KV_DEVICE void transpose_quad(u32 (&words)[4]) {
#pragma unroll
    for (s32 mask = 1; mask < 4; mask *= 2) {
        const bool upper = lane_id() & mask;
#pragma unroll
        for (s32 i = 0; i < 4; i++)
            if ((i & mask) == 0) {
                u32 &low = words[i], &high = words[i + mask];
                const u32 other = shfl_xor(upper ? low : high, mask);
                low = upper ? other : low;
                high = upper ? high : other;
            }
    }
}

/* Byte j of all four to word j. */
KV_DEVICE uint4 transpose_bytes(const u32 (&words)[4]) {
    u32 a, b, c, d;
    interleave(words[0], words[1], a, b);
    interleave(words[2], words[3], c, d);
    return {byte_perm(a, c, 0x5410), byte_perm(a, c, 0x7632), byte_perm(b, d, 0x5410),
            byte_perm(b, d, 0x7632)};
}

/* Of a group and head, the channels of one warp out of `num_warps`. Whether all were finite. */
template <s32 FORMAT, s32 D, s32 DTYPE>
KV_DEVICE bool encode_group(const GroupRows<DTYPE> &rows, const float *bias, s32 warp,
                            s32 num_warps, u8 *lines, u8 *metadata) {
    constexpr s32 count = FORMAT == KV_FORMAT_CHAN2 ? D / 2 : D; /* a multiple of 16 */
    u16 *numbers = reinterpret_cast<u16 *>(metadata);
    const s32 lane = (s32)lane_id();
    bool finite = true;
    for (s32 first = 32 * warp; first < count; first += 32 * num_warps) {
        const bool pred = first + lane < count;
        const s32 c = min(first + lane, count - 1);
        u32 bytes[4] = {};
        finite &= encode_channel<FORMAT, D>(rows, c, bias, 0, bytes, numbers, pred);
        if constexpr (FORMAT == KV_FORMAT_CHAN2)
            finite &= encode_channel<FORMAT, D>(rows, c + D / 2, bias, 4, bytes, numbers, pred);
        transpose_quad(bytes);
        if (pred)
            store16(lines + 16 * c, transpose_bytes(bytes));
    }
    return finite;
}
