/* Which keys of a tile a row takes, as bits of a number: bit i is for key first + i. A tile begins at a
 * multiple of 8, where a byte of a mask does. Of single keys sees() and reads_raw() say the same. */
#pragma once
#include "sight.cuh"

/* The lower `count` bits; none below 0. */
template <class Bits> KV_DEVICE Bits low_bits(s32 count) {
    return count >= (s32)(8 * sizeof(Bits)) ? ~(Bits)0 : ((Bits)1 << max(count, 0)) - 1;
}

/* Whether a row sees every key from sight.begin to sight.end. */
KV_DEVICE bool is_range(const AttendParams &p, const Sight &sight) {
#if OPTIONS
    return !sight.mask && !(p.window > 0 && p.positions);
#else
    return true;
#endif
}

#if OPTIONS

/* A mask's bits of keys from `first` on, of which it has `length`. */
template <class Bits> KV_DEVICE Bits bits_of_mask(const u8 *mask, s32 length, s32 first) {
    Bits bits = 0;
#pragma unroll
    for (s32 i = 0; i < (s32)sizeof(Bits); i++)
        if (first + 8 * i < length)
            bits |= (Bits)mask[(first >> 3) + i] << 8 * i;
    return bits;
}

/* What a window lets through where queries have positions: stored keys stand at their number, new ones
 * anywhere. */
template <class Bits>
KV_DEVICE Bits bits_of_window(const AttendParams &p, const Sequence &seq, const Sight &sight,
                              s32 first) {
    const s64 begin = (s64)sight.position - p.window + 1;
    Bits bits = low_bits<Bits>(min(sight.position, seq.length) + 1 - first) &
                ~low_bits<Bits>((s32)max(begin, (s64)0) - first);
    const s32 size = 8 * sizeof(Bits), end = min(first + size, seq.length);
#pragma unroll 1
    for (s32 j = max(first, seq.stored); seq.stored >= 0 && j < end; j++) {
        const Bits bit = (Bits)1 << (j - first);
        bits = is_near(p, sight, key_position(p, seq, j)) ? bits | bit : bits & ~bit;
    }
    return bits;
}

#endif

template <class Bits>
KV_DEVICE Bits keys_seen(const AttendParams &p, const Sequence &seq, const Sight &sight,
                         s32 first) {
    Bits keys = low_bits<Bits>(sight.end - first) & ~low_bits<Bits>(sight.begin - first);
#if OPTIONS
    if (sight.mask)
        keys &= bits_of_mask<Bits>(sight.mask, seq.length, first);
    if (p.window > 0 && p.positions)
        keys &= bits_of_window<Bits>(p, seq, sight, first);
#endif
    return keys;
}

/* Those that are read raw, or those that are not. */
template <class Bits>
KV_DEVICE Bits keys_read(const Sequence &seq, const Sight &sight, s32 first, bool raw) {
    if (!seq.has_raw)
        return raw ? 0 : ~(Bits)0;
    const Bits keys =
        low_bits<Bits>(seq.raw_first - first) | ~low_bits<Bits>(sight.raw_begin - first);
    return raw ? keys : ~keys;
}
