/* What a new token sees of its sequence and how it reads it: the options of attend and raw rows.
 *
 * docs/numerics.md, "What a row sees", says which keys those are; core/attend_sight.c is the same for
 * the CPU. OPTIONS=0 compiles plain causal attention: no mask, window, softcap or slopes.
 */
#pragma once
#include "device.cuh"
#include "params.cuh"

#ifndef OPTIONS
#define OPTIONS 1
#endif

constexpr s32 RAW_BLOCK_LOG2 = 5;
constexpr s32 NEVER = 0x7fffffff;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
constexpr float MINUS_INFINITY = __builtin_bit_cast(float, 0xff800000u);

/* One sequence of a call. */
struct Sequence {
    s32 index;
    s32 first_token; /* of the call's tokens */
    s32 num_new;
    s32 length; /* stored and new tokens */
    s32 stored; /* below 0 where queries outnumber the keys */
    s32 raw_first, raw_last;
    bool has_raw; /* some of K or V is read raw */
};

KV_DEVICE Sequence sequence_of(const AttendParams &p, s32 index) {
    Sequence seq;
    seq.index = index;
    seq.first_token = p.plan.query_starts[index];
    seq.num_new = p.plan.query_starts[index + 1] - seq.first_token;
    seq.length = p.plan.seq_lens[index];
    seq.stored = seq.length - seq.num_new;
    seq.has_raw = p.k.raw || p.v.raw;
    seq.raw_first = p.k.raw ? p.k.raw_first : p.v.raw_first;
    seq.raw_last = p.k.raw ? p.k.raw_last : p.v.raw_last;
    return seq;
}

/* What one new token sees. */
struct Sight {
    s32 begin, end; /* holds all of it; empty as [0, 0) */
    s32 raw_begin;  /* keys from here on are read raw, as are those before raw_first */
    s32 position;   /* of the query */
    const u8 *mask; /* a bit for each key, the lowest of a byte first; null: no mask */
};

KV_DEVICE s32 raw_begin_of(const Sequence &seq, s32 token) {
    if (!seq.has_raw)
        return NEVER;
    const s32 begin = ((seq.stored + token + 1) & -(1 << RAW_BLOCK_LOG2)) - seq.raw_last;
    return begin > 0 ? begin : 0;
}

KV_DEVICE Sight sight_of(const AttendParams &p, const Sequence &seq, s32 token) {
    Sight sight;
    sight.raw_begin = raw_begin_of(seq, token);
    sight.mask = nullptr;
    sight.position = seq.stored + token;
    sight.begin = 0;
    sight.end = sight.position + 1;
#if OPTIONS
    if (p.mask && p.mask_offsets[seq.index] >= 0)
        sight.mask = p.mask + p.mask_offsets[seq.index] + (s64)token * ((seq.length + 7) / 8);
    if (sight.mask || !p.causal)
        sight.end = seq.length;
    if (p.positions)
        sight.position = p.positions[seq.first_token + token];
    if (p.window > 0) {
        const s64 first = (s64)sight.position - p.window + 1;
        sight.begin = first > 0 ? (s32)first : 0;
        if (p.positions && seq.stored >= 0) /* new tokens' keys may stand anywhere */
            sight.begin = sight.begin < seq.stored ? sight.begin : seq.stored;
        else if (sight.position < sight.end)
            sight.end = sight.position + 1;
    }
#endif
    if (sight.begin >= sight.end)
        sight.begin = sight.end = 0;
    return sight;
}

/* Where key j stands. */
KV_DEVICE s32 key_position(const AttendParams &p, const Sequence &seq, s32 j) {
#if OPTIONS
    if (p.positions && seq.stored >= 0 && j >= seq.stored && j < seq.length)
        return p.positions[seq.first_token + j - seq.stored];
#endif
    return j;
}

/* Whether a window reaches from the query to a key that stands at `at`. */
KV_DEVICE bool is_near(const AttendParams &p, const Sight &sight, s32 at) {
    return at <= sight.position && sight.position - at < p.window;
}

KV_DEVICE bool sees(const AttendParams &p, const Sequence &seq, const Sight &sight, s32 j) {
    if (j < sight.begin || j >= sight.end)
        return false;
#if OPTIONS
    if (sight.mask && !(sight.mask[j >> 3] >> (j & 7) & 1))
        return false;
    if (p.window > 0)
        return is_near(p, sight, key_position(p, seq, j));
#endif
    return true;
}

KV_DEVICE bool reads_raw(const Sequence &seq, const Sight &sight, s32 j) {
    return seq.has_raw && (j < seq.raw_first || j >= sight.raw_begin);
}

/* s = q . k as the softmax takes it, to base 2: scaled, capped and moved. */
KV_DEVICE float finish_score(const AttendParams &p, const Sequence &seq, const Sight &sight,
                             float slope, s32 j, float s) {
#if OPTIONS
    s *= p.scale;
    if (p.softcap > 0.0f)
        s = p.softcap * tanhf(s / p.softcap);
    if (p.alibi_slopes)
        s -= slope * (float)(sight.position - key_position(p, seq, j));
    return s * LOG2E;
#else
    return s * (p.scale * LOG2E);
#endif
}

/* What new tokens [first, last] of a sequence see together, and from where on they read raw rows. */
struct JointSight {
    s32 begin, end;         /* empty as [0, 0) */
    s32 raw_begin, raw_end; /* the lowest raw_begin of them, and the highest */
};

KV_DEVICE JointSight joint_sight(const AttendParams &p, const Sequence &seq, s32 first, s32 last) {
    JointSight joint;
    joint.raw_begin = raw_begin_of(seq, first);
    joint.raw_end = raw_begin_of(seq, last);
#if OPTIONS
    joint.begin = NEVER;
    joint.end = 0;
    for (s32 token = first; token <= last; token++) {
        const Sight sight = sight_of(p, seq, token);
        if (sight.begin < sight.end) {
            joint.begin = joint.begin < sight.begin ? joint.begin : sight.begin;
            joint.end = joint.end > sight.end ? joint.end : sight.end;
        }
    }
    if (joint.begin >= joint.end)
        joint.begin = joint.end = 0;
#else
    const Sight sight = sight_of(p, seq, last);
    joint.begin = sight.begin;
    joint.end = sight.end;
#endif
    return joint;
}

/* Where a row of q or out lies, in elements. */
KV_DEVICE s64 row_offset(const Rows &rows, const Sequence &seq, s32 token, s32 head) {
    const s64 at = rows.padded_length ? seq.index * rows.sequence_stride + token * rows.token_stride
                                      : (seq.first_token + (s64)token) * rows.token_stride;
    return at + head * rows.head_stride;
}

/* The rows of key or value j and of those after it in its block; null where there is no block. */
KV_DEVICE const u8 *block_rows(const Blocks &blocks, const Plan &plan, const Sequence &seq,
                               s32 head, s32 j) {
    const s32 block =
        plan.tables[(s64)seq.index * plan.table_width + (j >> blocks.block_size_log2)];
    if (block < 0)
        return nullptr;
    return blocks.data + block * blocks.block_stride + head * blocks.head_stride;
}

KV_DEVICE const u8 *raw_block_rows(const Blocks &blocks, const Plan &plan, const Sequence &seq,
                                   s32 head, s32 j) {
    const s32 block = plan.raw_tables[(s64)seq.index * plan.raw_width + (j >> RAW_BLOCK_LOG2)];
    if (block < 0)
        return nullptr;
    return blocks.raw + block * blocks.raw_block_stride + head * blocks.raw_head_stride;
}
