/* The softmax over keys that come in tiles, and the merge of what was summed apart: to base 2, in
 * float32, as docs/numerics_gpu.md orders it.
 *
 * The scores of a tile are the sums of m16n8k16: s[n][0 .. 1] are of row lane / 4 and keys
 * 8 n + 2 (lane % 4) + 0 .. 1, s[n][2 .. 3] of row lane / 4 + 8.
 */
#pragma once
#include "sight.cuh"

/* What m is taken from, where no key was seen yet: -inf - -inf would be a NaN. */
KV_DEVICE float finite_maximum(float m) { return m == MINUS_INFINITY ? 0.0f : m; }

/* Scaled scores that a product and a difference at once would leave too far from their maximum: its
 * own, which was rounded, would not be 0. */
KV_DEVICE bool is_large(float score) { return fabsf(score) > 16777216.0f; }

/* s := 2^(c s - m), m the maximum of c s of both rows so far and c > 0 what a row's scores are still to
 * be multiplied with; what was summed before is to be multiplied by `factors`. Scores of keys that a
 * row does not see are -inf, their weights exactly 0, and a tile of which it sees nothing leaves its
 * state as it was, to the bit. A NaN stays one. */
template <s32 N>
KV_DEVICE void weigh_tile(float (&s)[N][4], float (&m)[2], const float (&c)[2],
                          float (&factors)[2]) {
    float still[2] = {c[0], c[1]}, base[2];
#pragma unroll
    for (s32 half = 0; half < 2; half++) {
        float top = s[0][2 * half];
#pragma unroll
        for (s32 n = 0; n < N; n++)
            top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        top = fmaxf(top, shfl_xor(top, 1));
        top = fmaxf(top, shfl_xor(top, 2));
        top = fmaxf(m[half], top * c[half]);
        base[half] = finite_maximum(top);
        factors[half] = exp2_approx(m[half] - base[half]);
        m[half] = top;
    }
    if (any(is_large(base[0]) || is_large(base[1]))) {
#pragma unroll
        for (s32 i = 0; i < 4 * N; i++)
            s[i >> 2][i & 3] *= c[i >> 1 & 1];
        still[0] = still[1] = 1.0f;
    }
#pragma unroll
    for (s32 i = 0; i < 4 * N; i++) {
        const s32 half = i >> 1 & 1;
        s[i >> 2][i & 3] = exp2_approx(fmaf(s[i >> 2][i & 3], still[half], -base[half]));
    }
}

template <s32 N> KV_DEVICE void weigh_tile(float (&s)[N][4], float (&m)[2], float (&factors)[2]) {
    const float ones[2] = {1.0f, 1.0f};
    weigh_tile(s, m, ones, factors);
}

/* Two weights as a pair of the mma's type; what they were rounded to is added to `sum`, so that the
 * weights of a row still add up to 1. */
template <bool BF16> KV_DEVICE u32 pack_weights(float a, float b, float &sum) {
    const u32 pair = BF16 ? pack_bf16(a, b) : pack_f16(a, b);
    if (BF16)
        sum += u32_as_float(pair << 16) + u32_as_float(pair & 0xffff0000u);
    else
        sum += f16_to_f32((u16)pair) + f16_to_f32((u16)(pair >> 16));
    return pair;
}

/* Of the four lanes that share a row. */
KV_DEVICE float sum_of_quad(float v) {
    v += shfl_xor(v, 1);
    return v + shfl_xor(v, 2);
}

/* The state of a row, or of a part of its keys: l and o are sums of 2^(s - m) and of these times the
 * values. l is 0 where nothing was seen. */
struct State {
    float m, l;
};

KV_DEVICE State empty_state() { return {MINUS_INFINITY, 0.0f}; }

/* Takes another part in: o := o * keep + o' * take. */
KV_DEVICE void merge_state(State &state, const State &other, float &keep, float &take) {
    keep = 1.0f;
    take = 0.0f;
    if (other.l == 0.0f)
        return;
    const float m = fmaxf(state.m, other.m), base = finite_maximum(m);
    keep = state.l == 0.0f ? 0.0f : exp2_approx(state.m - base);
    take = exp2_approx(other.m - base);
    state.l = fmaf(other.l, take, state.l * keep);
    state.m = m;
}

/* lse, by the natural logarithm. */
KV_DEVICE float natural_lse(const State &state) {
    return state.l == 0.0f ? MINUS_INFINITY : (state.m + log2_approx(state.l)) * LN2;
}
