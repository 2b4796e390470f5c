/* The storage formats in registers: sizes, levels, and codes as pairs of 16-bit floats.
 *
 * docs/formats.md says where each code lies. All planes of row formats obey one rule, which makes
 * codes cheap to decode: cut a row into chunks of CHUNK elements, and let word w (0 to 3) of a
 * chunk be the word w of each of its units; then the words w hold elements 16 k + 4 w + j, for j
 * from 0 to 3 in byte j and k from 0 to CHUNK / 16 - 1 in fields of a byte. So a lane that takes
 * word w = lane % 4 has four neighbours of every 16 elements: what it puts into one step of
 * m16n8k16, if the other operand is given the elements in the same order (4 w and 4 w + 1 where
 * the fragment's first pair is, 4 w + 2 and 4 w + 3 where its second is).
 *
 * Levels are whole numbers, or fp8_e4m3's, that both types hold exactly.
 */
#pragma once
#include "device.cuh"
#include "kvcore/formats.h"

/* ---- what formats.h lists ------------------------------------------------------------------- */

enum Format : s32 {
#define KV_FORMAT_NUMBER(ID, name, KIND, bits, element_metadata, row_metadata, multiple) \
    KV_FORMAT_##ID,
    KV_FORMATS(KV_FORMAT_NUMBER)
#undef KV_FORMAT_NUMBER
};

enum FormatKind : s32 { KIND_FLOAT, KIND_ROW, KIND_CHANNEL };

template <s32 FORMAT> struct FormatOf;
#define KV_FORMAT_OF(ID, name, FORMAT_KIND, bits, element_metadata, row_metadata, multiple) \
    template <> struct FormatOf<KV_FORMAT_##ID> {                                           \
        static constexpr FormatKind KIND = KIND_##FORMAT_KIND;                              \
        static constexpr s32 BITS = bits;                                                   \
        static constexpr s32 ELEMENT_METADATA_BITS = element_metadata;                      \
        static constexpr s32 ROW_METADATA_BYTES = row_metadata;                             \
    };
KV_FORMATS(KV_FORMAT_OF)
#undef KV_FORMAT_OF

constexpr s32 GROUP_TOKENS = 32; /* that channel formats encode as one */

template <s32 FORMAT> constexpr bool IS_FLOAT = FormatOf<FORMAT>::KIND == KIND_FLOAT;
template <s32 FORMAT> constexpr bool IS_ROW = FormatOf<FORMAT>::KIND == KIND_ROW;
template <s32 FORMAT> constexpr bool IS_CHANNEL = FormatOf<FORMAT>::KIND == KIND_CHANNEL;
template <s32 FORMAT>
constexpr bool IS_ROTATED = FORMAT >= KV_FORMAT_ROT8 && FORMAT <= KV_FORMAT_ROT2;
/* Metadata is a minimum and a step, and levels are codes. */
template <s32 FORMAT> constexpr bool HAS_MINIMUM = FORMAT == KV_FORMAT_INT4 || IS_CHANNEL<FORMAT>;

/* Of one token and head. */
template <s32 FORMAT, s32 D> constexpr s32 CODE_BYTES = FormatOf<FORMAT>::BITS * D / 8;
template <s32 FORMAT, s32 D>
constexpr s32 METADATA_BYTES =
    FormatOf<FORMAT>::ELEMENT_METADATA_BITS * D / 8 + FormatOf<FORMAT>::ROW_METADATA_BYTES;

/* Fields of a byte, over all planes: elements in one byte of a word, or tokens and channels. */
template <s32 FORMAT>
constexpr s32 FIELDS = FormatOf<FORMAT>::BITS == 8   ? 1
                       : FormatOf<FORMAT>::BITS == 4 ? 2
                                                     : 4;
template <s32 FORMAT> constexpr s32 CHUNK = 16 * FIELDS<FORMAT>;
/* Words w of a chunk. */
template <s32 FORMAT>
constexpr s32 NUM_WORDS = FORMAT == KV_FORMAT_ROT6   ? 3
                          : FORMAT == KV_FORMAT_ROT3 ? 2
                                                     : 1;

/* ---- levels as numbers ----------------------------------------------------------------------- */

/* The positive levels of rot4, rot3 and rot2 in order; codes from 2^(BITS - 1) on stand for them. */
template <s32 BITS> KV_DEVICE constexpr s32 table_level(s32 i) {
    constexpr s32 levels[3][8] = {{38, 127}, {14, 45, 79, 127}, {6, 18, 31, 44, 58, 75, 96, 127}};
    return levels[BITS - 2][i];
}

/* The level of a code of rot3 or rot2. */
template <s32 BITS> KV_DEVICE constexpr s32 signed_level(s32 code) {
    constexpr s32 half = 1 << (BITS - 1);
    return code < half ? -table_level<BITS>(half - 1 - code) : table_level<BITS>(code - half);
}

/* The two types of mma operands. Integers below BASE, or-ed into BASE's bits, add themselves. */
struct F16 {
    static constexpr s32 MANTISSA = 10, BIAS = 15, BASE = 1024;
    static constexpr u32 BASE_BYTE = 0x64646464; /* the upper byte of BASE's bits */
};
struct BF16 {
    static constexpr s32 MANTISSA = 7, BIAS = 127, BASE = 128;
    static constexpr u32 BASE_BYTE = 0x43434343;
};
KV_DEVICE u32 sub2(F16, u32 a, u32 b) { return hsub2(a, b); }
KV_DEVICE u32 sub2(BF16, u32 a, u32 b) { return hsub2_bf16(a, b); }
KV_DEVICE u32 mul2(F16, u32 a, u32 b) { return hmul2(a, b); }
KV_DEVICE u32 mul2(BF16, u32 a, u32 b) { return hmul2_bf16(a, b); }

/* The bits of an integer that the type holds. */
template <class Float> KV_DEVICE constexpr u32 float_bits(s32 n) {
    const u32 sign = n < 0 ? 0x8000 : 0, size = (u32)(n < 0 ? -n : n);
    if (size == 0)
        return 0;
    s32 exponent = 0;
    while (size >> exponent > 1)
        exponent++;
    const u32 mantissa = (size << Float::MANTISSA >> exponent) & ((1u << Float::MANTISSA) - 1);
    return sign | (u32)(exponent + Float::BIAS) << Float::MANTISSA | mantissa;
}
/* The same twice. */
template <class Float> KV_DEVICE constexpr u32 float_pair(s32 n) {
    return float_bits<Float>(n) * 0x10001u;
}

/* ---- codes in memory ------------------------------------------------------------------------- */

/* Bits 0 to 3 of each byte, moved to bits 0, 2, 4 and 6. */
KV_DEVICE u32 spread_fields(u32 bits) {
    bits = (bits | bits << 2) & 0x33333333u;
    return (bits | bits << 1) & 0x55555555u;
}

/* Words side by side, aligned to as many bytes, or to 16 if they are more. */
template <s32 N> KV_DEVICE void load_words(const u32 *from, u32 (&words)[N]) {
    static_assert(N == 1 || N == 2 || N % 4 == 0, "whole accesses");
    if constexpr (N == 1) {
        words[0] = *from;
    } else if constexpr (N == 2) {
        const uint2 both = *reinterpret_cast<const uint2 *>(from);
        words[0] = both.x;
        words[1] = both.y;
    } else {
#pragma unroll
        for (s32 i = 0; i < N; i += 4) {
            const uint4 four = *reinterpret_cast<const uint4 *>(from + i);
            words[i] = four.x;
            words[i + 1] = four.y;
            words[i + 2] = four.z;
            words[i + 3] = four.w;
        }
    }
}

/* Words `first` to first + N - 1 of a row, four to a chunk: those of all planes. N is a power of two
 * that divides `first` and the row's words. rot3's second has an element's upper bit where the first
 * has its field. */
template <s32 FORMAT, s32 D, s32 N>
KV_DEVICE void load_row_words(const u8 *row, s32 first, u32 (&words)[N][NUM_WORDS<FORMAT>]) {
    static_assert(NUM_WORDS<FORMAT> == 1 || N <= 4, "of one chunk");
    const u32 *plane = reinterpret_cast<const u32 *>(row);
    const s32 chunk = first >> 2, w = first & 3;
    u32 a[N];
    load_words<N>(FORMAT == KV_FORMAT_ROT6 ? plane + 8 * chunk + w : plane + first, a);
#pragma unroll
    for (s32 i = 0; i < N; i++)
        words[i][0] = a[i];
    if constexpr (FORMAT == KV_FORMAT_ROT6) {
        u32 b[N], c[N];
        load_words<N>(plane + 8 * chunk + 4 + w, b);
        load_words<N>(plane + D / 8 + first, c);
#pragma unroll
        for (s32 i = 0; i < N; i++) {
            words[i][1] = b[i];
            words[i][2] = c[i];
        }
    } else if constexpr (FORMAT == KV_FORMAT_ROT3) {
        const u32 *upper = plane + D / 16 + chunk / 2 * 4;
        if (D % 128 && chunk == D / 64 - 1) { /* a unit of eight bytes */
            words[0][1] = upper[w & 1] >> (w >> 1) & 0x55555555u;
        } else {
            u32 b[N];
            load_words<N>(upper + w, b);
#pragma unroll
            for (s32 i = 0; i < N; i++)
                words[i][1] = spread_fields(b[i] >> (chunk & 1) * 4 & 0x0f0f0f0fu);
        }
    }
}

/* The words w of a chunk. */
template <s32 FORMAT, s32 D>
KV_DEVICE void load_codes(const u8 *row, s32 chunk, s32 w, u32 (&words)[NUM_WORDS<FORMAT>]) {
    u32 one[1][NUM_WORDS<FORMAT>];
    load_row_words<FORMAT, D, 1>(row, 4 * chunk + w, one);
#pragma unroll
    for (s32 i = 0; i < NUM_WORDS<FORMAT>; i++)
        words[i] = one[0][i];
}

/* For values, whose pairs are of two tokens: bytes 0 and 1, then 2 and 3 of both, taken in turn. */
KV_DEVICE void interleave(u32 a, u32 b, u32 &lower, u32 &upper) {
    lower = byte_perm(a, b, 0x5140);
    upper = byte_perm(a, b, 0x7362);
}

/* ---- levels as pairs ------------------------------------------------------------------------- */

/* Bytes below BASE, as BASE + byte, less `zero`. */
template <class Float> KV_DEVICE void pairs_of_bytes(u32 bytes, u32 zero, u32 (&pairs)[2]) {
    pairs[0] = sub2(Float(), byte_perm(bytes, Float::BASE_BYTE, 0x4140), zero);
    pairs[1] = sub2(Float(), byte_perm(bytes, Float::BASE_BYTE, 0x4342), zero);
}

template <class Float> KV_DEVICE void int8_levels(u32 word, u32 (&pairs)[2]) {
    if constexpr (Float::BASE >= 256) {
        pairs_of_bytes<Float>(word, float_pair<Float>(Float::BASE + 128), pairs);
    } else {
        /* Less 128, or less 256 where the upper bit was dropped and not there. */
        const u32 low = word & 0x7f7f7f7fu, missing = ~word & 0x80808080u;
        pairs[0] = sub2(Float(), byte_perm(low, Float::BASE_BYTE, 0x4140),
                        byte_perm(missing, Float::BASE_BYTE, 0x4140));
        pairs[1] = sub2(Float(), byte_perm(low, Float::BASE_BYTE, 0x4342),
                        byte_perm(missing, Float::BASE_BYTE, 0x4342));
    }
}

/* The number's bits, moved to where the type has exponent and mantissa, are 2^(7 - BIAS) times what
 * they were, also below 2^-6. As bfloat16 even what no format stores, NaN, becomes a number: values
 * that no row sees may be such. */
template <class Float> KV_DEVICE void e4m3_levels(u32 word, u32 (&pairs)[2]) {
#ifdef KV_CONVERTS_E4M3
    if constexpr (Float::MANTISSA == 10) {
        pairs[0] = e4m3_to_f16(word, 0);
        pairs[1] = e4m3_to_f16(word, 1);
        return;
    }
#endif
    constexpr s32 shift = 11 - Float::MANTISSA;
    constexpr u32 mask = (0x7f00u >> shift) * 0x10001u;
    constexpr u32 power = ((u32)(2 * Float::BIAS - 7) << Float::MANTISSA) * 0x10001u;
    const u32 upper[2] = {byte_perm(word, 0, 0x1404), byte_perm(word, 0, 0x3424)};
#pragma unroll
    for (s32 i = 0; i < 2; i++)
        pairs[i] = mul2(Float(), (upper[i] >> shift & mask) | (upper[i] & 0x80008000u), power);
}

/* Codes of 4 and 2 bits as they are: int4, chan4 and chan2. Fields of chan4 are tokens t and
 * t + 16 of a group; of chan2 these of channel c, then these of channel c + head_dim / 2. */
template <class Float, s32 NUM_FIELDS>
KV_DEVICE void field_levels(u32 word, u32 (&pairs)[NUM_FIELDS][2]) {
    constexpr u32 mask = NUM_FIELDS == 2 ? 0x0f0f0f0fu : 0x03030303u;
#pragma unroll
    for (s32 k = 0; k < NUM_FIELDS; k++)
        pairs_of_bytes<Float>(word >> k * (8 / NUM_FIELDS) & mask, float_pair<Float>(Float::BASE),
                              pairs[k]);
}

/* 2 c - 63 */
template <class Float> KV_DEVICE void rot6_levels(const u32 (&words)[3], u32 (&pairs)[4][2]) {
    constexpr u32 zero = float_pair<Float>(Float::BASE + 63);
#pragma unroll
    for (s32 k = 0; k < 4; k++) {
        const u32 low = k % 2 ? words[k / 2] >> 3 : words[k / 2] << 1;
        const u32 high = k == 3 ? words[2] >> 1 : words[2] << (5 - 2 * k);
        pairs_of_bytes<Float>((low & 0x1e1e1e1eu) | (high & 0x60606060u), zero, pairs[k]);
    }
}

/* ---- levels out of tables: rot4, rot3, rot2 -------------------------------------------------- */

/* Entry i of a table of eight: magnitudes (rot4), the levels of codes (rot3), or from 4 on (rot2). */
template <class Float, s32 BITS> KV_DEVICE constexpr u32 table_entry(s32 i) {
    return BITS == 4   ? float_bits<Float>(table_level<BITS>(i))
           : BITS == 3 ? float_bits<Float>(signed_level<BITS>(i))
           : i < 4     ? 0
                       : float_bits<Float>(signed_level<BITS>(i - 4));
}
/* Byte `byte` of entries first to first + 3. */
template <class Float, s32 BITS> KV_DEVICE constexpr u32 table_bytes(s32 first, s32 byte) {
    u32 bytes = 0;
    for (s32 i = 0; i < 4; i++)
        bytes |= (table_entry<Float, BITS>(first + i) >> 8 * byte & 0xff) << 8 * i;
    return bytes;
}

/* Entries 0 to 3 of a table, by bytes: half of what byte_perm looks up in. And the bits of words
 * that are no digits of it. */
struct HalfTable {
    u32 low, high, others;
};
template <class Float, s32 BITS> KV_DEVICE constexpr HalfTable half_table() {
    return {table_bytes<Float, BITS>(0, 0), table_bytes<Float, BITS>(0, 1), 0x88888888u};
}

/* The entries that the lower four digits of `digits` name, with the signs of the bytes of `signs`:
 * of two bytes' fields, the lower field of both and then the upper one of both. */
template <class Float, s32 BITS>
KV_DEVICE void look_up(const HalfTable &half, u32 digits, u32 signs, u32 &lower_fields,
                       u32 &upper_fields) {
    constexpr u32 low4 = table_bytes<Float, BITS>(4, 0), high4 = table_bytes<Float, BITS>(4, 1);
    const u32 low = byte_perm(half.low, low4, digits);
    const u32 high = byte_perm(half.high, high4, digits) ^ (signs & 0x80808080u);
    lower_fields = byte_perm(low, high, 0x6240);
    upper_fields = byte_perm(low, high, 0x7351);
}

/* Codes below 8 stand for negative levels, backwards. */
template <class Float>
KV_DEVICE void rot4_levels(u32 word, u32 (&pairs)[2][2], const HalfTable &half) {
    const u32 below = ~word & half.others, lower_below = below << 4;
    const u32 digits = (word ^ (below - (below >> 3))) & ~half.others;
    look_up<Float, 4>(half, digits, byte_perm(lower_below, below, 0x5140), pairs[0][0],
                      pairs[1][0]);
    look_up<Float, 4>(half, digits >> 16, byte_perm(lower_below, below, 0x7362), pairs[0][1],
                      pairs[1][1]);
}

/* Two bits of each code in `fields`, and for rot3 the third in `upper`, as load_row_words gives it. */
template <class Float>
KV_DEVICE void rot3_levels(u32 fields, u32 upper, u32 (&pairs)[4][2], const HalfTable &half) {
#pragma unroll
    for (s32 k = 0; k < 2; k++) {
        const u32 digits = (fields >> 2 * k & 0x33333333u) | (upper << (2 - 2 * k) & 0x44444444u);
        look_up<Float, 3>(half, digits, 0, pairs[k][0], pairs[k + 2][0]);
        look_up<Float, 3>(half, digits >> 16, 0, pairs[k][1], pairs[k + 2][1]);
    }
}

/* Four entries, as the second half of a table. */
template <class Float> KV_DEVICE void rot2_levels(u32 fields, u32 (&pairs)[4][2]) {
#pragma unroll
    for (s32 k = 0; k < 2; k++) {
        const u32 digits = (fields >> 2 * k & 0x33333333u) | 0x44444444u;
        look_up<Float, 2>(HalfTable{}, digits, 0, pairs[k][0], pairs[k + 2][0]);
        look_up<Float, 2>(HalfTable{}, digits >> 16, 0, pairs[k][1], pairs[k + 2][1]);
    }
}

/* ---- any format ------------------------------------------------------------------------------ */

/* What `levels` takes of a format's table, and the same in registers, for loops. */
template <s32 FORMAT, class Float> KV_DEVICE constexpr HalfTable table_of() {
    return FORMAT == KV_FORMAT_ROT4   ? half_table<Float, 4>()
           : FORMAT == KV_FORMAT_ROT3 ? half_table<Float, 3>()
                                      : HalfTable{};
}
template <s32 FORMAT, class Float> KV_DEVICE HalfTable kept_table() {
    constexpr HalfTable table = table_of<FORMAT, Float>();
    if constexpr (FORMAT == KV_FORMAT_ROT4 || FORMAT == KV_FORMAT_ROT3)
        return {kept_constant(table.low), kept_constant(table.high), kept_constant(table.others)};
    return table;
}

/* pairs[k]: the levels of field k, bytes 0 and 1, then 2 and 3. Where HAS_MINIMUM, the codes. */
template <s32 FORMAT, class Float>
KV_DEVICE void levels(const u32 (&words)[NUM_WORDS<FORMAT>], u32 (&pairs)[FIELDS<FORMAT>][2],
                      const HalfTable &table = table_of<FORMAT, Float>()) {
    static_assert(!IS_FLOAT<FORMAT>, "floats have no levels");
    if constexpr (FORMAT == KV_FORMAT_FP8_E4M3)
        e4m3_levels<Float>(words[0], pairs[0]);
    else if constexpr (FormatOf<FORMAT>::BITS == 8)
        int8_levels<Float>(words[0], pairs[0]);
    else if constexpr (HAS_MINIMUM<FORMAT>)
        field_levels<Float, FIELDS<FORMAT>>(words[0], pairs);
    else if constexpr (FORMAT == KV_FORMAT_ROT6)
        rot6_levels<Float>(words, pairs);
    else if constexpr (FORMAT == KV_FORMAT_ROT4)
        rot4_levels<Float>(words[0], pairs, table);
    else if constexpr (FORMAT == KV_FORMAT_ROT3)
        rot3_levels<Float>(words[0], words[1], pairs, table);
    else
        rot2_levels<Float>(words[0], pairs);
}
