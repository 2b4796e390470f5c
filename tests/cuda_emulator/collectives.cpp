/* What the 32 lanes of a warp do together: the last to come does it for all. */
#include <cstring>

#include "checker.hpp"
#include "scheduler.hpp"

#include "numbers.hpp"

namespace emulator {

static const char *name_of(Operation operation) {
    static const char *const names[] = {"sync_warp", "shuffle",  "ballot",
                                        "reduce",    "ldmatrix", "mma"};
    return names[(int)operation];
}

/* Calls act(lanes) once, when all lanes of the warp have come to the same operation. */
template <class Act>
static void together(Operation operation, const void *in, void *out, s64 argument, Site site,
                     Act act) {
    Fiber *const self = machine.current;
    Fiber *const lanes = &machine.fibers[self->warp * 32];
    u32 &arrived = machine.arrived[self->warp];
    self->operation = operation, self->site = site;
    self->in = in, self->out = out, self->argument = argument;
    if (machine.live[self->warp] != 0xffffffffu)
        fail("%s:%d: %s of a warp of which lanes have ended or never were", site.file, site.line,
             name_of(operation));
    if (arrived) {
        const Fiber &other = lanes[__builtin_ctz(arrived)];
        if (other.operation != operation || other.site.line != site.line)
            fail("divergent warp: %s at %s:%d, but %s at line %d", name_of(operation), site.file,
                 site.line, name_of(other.operation), other.site.line);
    }
    arrived |= 1u << self->lane;
    if (arrived != 0xffffffffu) {
        wait();
        return;
    }
    act(lanes);
    arrived = 0;
    wake(self->warp, ~(1u << self->lane));
}

void sync_warp(Site site) {
    together(Operation::SYNC_WARP, nullptr, nullptr, 0, site,
             [](Fiber *lanes) { checker_sync_warp(lanes->warp); });
}

static u32 source_lane(Shuffle kind, u32 lane, s32 argument) {
    s32 from = (s32)lane;
    switch (kind) {
    case Shuffle::FROM:
        return (u32)argument & 31;
    case Shuffle::XOR:
        from ^= argument;
        break;
    case Shuffle::DOWN:
        from += argument;
        break;
    case Shuffle::UP:
        from -= argument;
        break;
    }
    return from < 0 || from > 31 ? lane : (u32)from;
}

u64 shuffle(u64 value, Shuffle kind, s32 argument, Site site) {
    u64 result;
    together(Operation::SHUFFLE, &value, &result, argument, site, [kind](Fiber *lanes) {
        for (u32 lane = 0; lane < 32; lane++) {
            const u32 from = source_lane(kind, lane, (s32)lanes[lane].argument);
            memcpy(lanes[lane].out, lanes[from].in, sizeof(u64));
        }
    });
    return result;
}

u32 ballot(bool pred, Site site) {
    u32 result;
    together(Operation::BALLOT, nullptr, &result, pred, site, [](Fiber *lanes) {
        u32 votes = 0;
        for (u32 lane = 0; lane < 32; lane++)
            votes |= (u32)lanes[lane].argument << lane;
        for (u32 lane = 0; lane < 32; lane++)
            *static_cast<u32 *>(lanes[lane].out) = votes;
    });
    return result;
}

static s32 reduced(s32 a, s32 b, Reduction kind) {
    switch (kind) {
    case Reduction::ADD:
        return (s32)((u32)a + (u32)b);
    case Reduction::MAX:
        return a > b ? a : b;
    case Reduction::MIN:
        return a < b ? a : b;
    case Reduction::OR:
        return a | b;
    }
    return 0;
}

s32 reduce(s32 value, Reduction kind, Site site) {
    s32 result;
    together(Operation::REDUCE, nullptr, &result, value, site, [kind](Fiber *lanes) {
        s32 all = (s32)lanes[0].argument;
        for (u32 lane = 1; lane < 32; lane++)
            all = reduced(all, (s32)lanes[lane].argument, kind);
        for (u32 lane = 0; lane < 32; lane++)
            *static_cast<s32 *>(lanes[lane].out) = all;
    });
    return result;
}

/* ---- matrices: who holds what is in the PTX manual, "Matrix fragments for mma.m16n8k16" */

void load_matrices(u32 *r, const void *row, bool transposed, Site site) {
    if ((uintptr_t)row & 15)
        fail("%s:%d: ldmatrix: a row is not aligned to 16 bytes", site.file, site.line);
    if (!is_shared(row, 16))
        fail("%s:%d: ldmatrix: a row is not in the block's shared memory", site.file, site.line);
    checker_shared(row, 16, false);
    together(Operation::LDMATRIX, row, r, transposed, site, [transposed](Fiber *lanes) {
        for (u32 lane = 0; lane < 32; lane++) {
            u32 *const words = static_cast<u32 *>(lanes[lane].out);
            for (u32 matrix = 0; matrix < 4; matrix++) {
                const Fiber *const rows = lanes + matrix * 8;
                const u32 first = lane / 4, second = lane % 4;
                const auto half = [&](u32 i, u32 j) -> u32 {
                    return static_cast<const u16 *>(rows[i].in)[j];
                };
                words[matrix] = transposed
                                    ? half(second * 2, first) | half(second * 2 + 1, first) << 16
                                    : half(first, second * 2) | half(first, second * 2 + 1) << 16;
            }
        }
    });
}

struct MmaOperands {
    u32 a[4], b[2];
};

/* Both halves of the words of all lanes, in loops that a compiler turns into vectors. */
template <bool BF16>
static void widen(const u32 (&words)[32], float (&low)[32], float (&high)[32]) {
    for (u32 lane = 0; lane < 32; lane++) {
        const u32 word = words[lane];
        low[lane] = BF16 ? as_float(word << 16) : f16_to_f32((u16)word);
        high[lane] = BF16 ? as_float(word & 0xffff0000u) : f16_to_f32((u16)(word >> 16));
    }
}

template <bool BF16> static void gather(const Fiber *lanes, float (&a)[16][16], float (&b)[16][8]) {
    u32 words[6][32];
    float low[32], high[32];
    for (u32 lane = 0; lane < 32; lane++) {
        const MmaOperands &operands = *static_cast<const MmaOperands *>(lanes[lane].in);
        for (u32 i = 0; i < 6; i++)
            words[i][lane] = i < 4 ? operands.a[i] : operands.b[i - 4];
    }
    for (u32 i = 0; i < 6; i++) {
        widen<BF16>(words[i], low, high);
        for (u32 lane = 0; lane < 32; lane++) {
            const u32 group = lane / 4, pair = lane % 4 * 2;
            if (i < 4) {
                float *const at = &a[group + (i & 1) * 8][pair + (i >> 1) * 8];
                at[0] = low[lane], at[1] = high[lane];
            } else {
                b[pair + (i - 4) * 8][group] = low[lane];
                b[pair + (i - 4) * 8 + 1][group] = high[lane];
            }
        }
    }
}

template <bool BF16> static void multiply(Fiber *lanes) {
    float a[16][16], b[16][8], c[16][8];
    gather<BF16>(lanes, a, b);
    const auto for_each = [&](auto visit) {
        for (u32 lane = 0; lane < 32; lane++) {
            float *const own = static_cast<float *>(lanes[lane].out);
            const u32 group = lane / 4, pair = lane % 4 * 2;
            for (u32 i = 0; i < 4; i++)
                visit(own[i], c[group + (i >> 1) * 8][pair + (i & 1)]);
        }
    };
    for_each([](float &own, float &sum) { sum = own; });
    for (u32 row = 0; row < 16; row++)
        for (u32 k = 0; k < 16; k++)
            for (u32 column = 0; column < 8; column++)
                c[row][column] += a[row][k] * b[k][column];
    for_each([](float &own, float &sum) { own = sum; });
}

void multiply_matrices(float *c, const u32 *a, u32 b0, u32 b1, bool bf16, Site site) {
    const MmaOperands operands = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    together(Operation::MMA, &operands, c, bf16, site,
             [bf16](Fiber *lanes) { bf16 ? multiply<true>(lanes) : multiply<false>(lanes); });
}

} // namespace emulator
