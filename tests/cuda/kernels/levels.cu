/* Decodes rows with what attention takes from formats.cuh: one thread a word, pairs written as two
 * 16-bit floats where docs/formats.md has their elements. -DK_FORMAT, -DHEAD_DIM. */
#include "device.cuh"
#include "formats.cuh"

struct LevelsParams {
    const u8 *rows, *other_rows; /* codes of num_rows rows or groups, dense */
    u16 *f16, *bf16; /* levels [num_rows, HEAD_DIM], of groups [num_rows, 32, HEAD_DIM] */
    u16 *of_both;    /* bf16 [num_rows, HEAD_DIM, 2]: a row's and the other's */
    s32 num_rows;
};

constexpr s32 NUM_FIELDS = FIELDS<K_FORMAT>;

KV_DEVICE void put_pair(u16 *to, u32 pair) {
    to[0] = (u16)pair;
    to[1] = (u16)(pair >> 16);
}

template <class Float> KV_DEVICE void decode_word(const u8 *row, s32 chunk, s32 w, u16 *to) {
    u32 words[NUM_WORDS<K_FORMAT>], pairs[NUM_FIELDS][2];
    load_codes<K_FORMAT, HEAD_DIM>(row, chunk, w, words);
    levels<K_FORMAT, Float>(words, pairs);
    for (s32 k = 0; k < NUM_FIELDS; k++)
        for (s32 h = 0; h < 2; h++)
            put_pair(to + CHUNK<K_FORMAT> * chunk + 16 * k + 4 * w + 2 * h, pairs[k][h]);
}

/* As values are: pairs of the same element of two rows. */
KV_DEVICE void decode_both(const u8 *row, const u8 *other, s32 chunk, s32 w, u16 *to) {
    constexpr s32 n = NUM_WORDS<K_FORMAT>;
    u32 a[n], b[n], halves[2][n], pairs[NUM_FIELDS][2];
    load_codes<K_FORMAT, HEAD_DIM>(row, chunk, w, a);
    load_codes<K_FORMAT, HEAD_DIM>(other, chunk, w, b);
    for (s32 i = 0; i < n; i++)
        interleave(a[i], b[i], halves[0][i], halves[1][i]);
    for (s32 half = 0; half < 2; half++) {
        levels<K_FORMAT, BF16>(halves[half], pairs);
        for (s32 k = 0; k < NUM_FIELDS; k++)
            for (s32 h = 0; h < 2; h++)
                put_pair(to + 2 * (CHUNK<K_FORMAT> * chunk + 16 * k + 4 * w + 2 * half + h),
                         pairs[k][h]);
    }
}

/* Four channels of two tokens, or eight. */
template <class Float> KV_DEVICE void decode_line(const u8 *group, s32 line, s32 t, u16 *to) {
    const u32 words[1] = {reinterpret_cast<const u32 *>(group)[16 * line + t]};
    u32 pairs[NUM_FIELDS][2];
    levels<K_FORMAT, Float>(words, pairs);
    for (s32 k = 0; k < NUM_FIELDS; k++)
        for (s32 h = 0; h < 2; h++)
            put_pair(to + (t + k % 2 * 16) * HEAD_DIM + k / 2 * (HEAD_DIM / 2) + 4 * line + 2 * h,
                     pairs[k][h]);
}

KV_KERNEL(decode_levels, LevelsParams, 128, 1) {
    constexpr s32 count =
        IS_CHANNEL<K_FORMAT> ? HEAD_DIM / 2 / NUM_FIELDS * 16 : HEAD_DIM / CHUNK<K_FORMAT> * 4;
    constexpr s64 size = IS_CHANNEL<K_FORMAT> ? 32 * HEAD_DIM : HEAD_DIM;
    const s32 row = (s32)blockIdx.x;
    constexpr s64 stride = CODE_BYTES<K_FORMAT, (s32)size>;
    for (s32 i = (s32)threadIdx.x; i < count; i += 128) {
        if constexpr (IS_CHANNEL<K_FORMAT>) {
            decode_line<F16>(p.rows + row * stride, i / 16, i % 16, p.f16 + row * size);
            decode_line<BF16>(p.rows + row * stride, i / 16, i % 16, p.bf16 + row * size);
        } else {
            decode_word<F16>(p.rows + row * stride, i / 4, i % 4, p.f16 + row * size);
            decode_word<BF16>(p.rows + row * stride, i / 4, i % 4, p.bf16 + row * size);
            decode_both(p.rows + row * stride, p.other_rows + row * stride, i / 4, i % 4,
                        p.of_both + 2 * row * size);
        }
    }
}
