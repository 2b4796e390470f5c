/* How decode.cu cuts its work, and where things lie in a block's shared memory.
 *
 * Specialised by HEAD_DIM, HEAD_DIM_V, K_FORMAT, V_FORMAT, OPTIONS (sight.cuh) and
 *   QUERY_PARTS   1: q has K's type, bfloat16 where K is quantized; 2: it is taken as the sum of
 *                 two numbers of that type
 *   V_IN_K        1: V is the first HEAD_DIM_V elements of K, and read there
 *   STAGES        tiles in a warp's ring
 *   MIN_BLOCKS    blocks that are to share a multiprocessor's registers
 *   SHARED_BYTES  what the host reckons (kvcore_gpu/decode.py), which must be the same
 *
 * Of a quantized cache some blocks take keys that are read encoded, and others those that are read raw;
 * code for both has a flag `raw`. Without quantized formats there are the first only.
 */
#pragma once
#include "formats.cuh"
#include "tiles.cuh"
#include "work.cuh"

constexpr s32 WARPS = 4, THREADS = 32 * WARPS, ROWS = 16;

constexpr bool K_QUANTIZED = !IS_FLOAT<K_FORMAT>, V_QUANTIZED = !IS_FLOAT<V_FORMAT>;
constexpr bool QUANTIZED = K_QUANTIZED || V_QUANTIZED;
static_assert(K_FORMAT != KV_FORMAT_FP32 && V_FORMAT != KV_FORMAT_FP32, "float32 is simt.cu's");
static_assert(!IS_CHANNEL<V_FORMAT>, "channel formats are for keys");
static_assert(!V_IN_K || (K_FORMAT == V_FORMAT && !QUANTIZED), "V lies in K as floats");

constexpr s32 larger(s32 a, s32 b) { return a > b ? a : b; }

/* Keys of a tile: they lie in one block, whatever its size, and are whole groups. Raw ones are the
 * first of a tile whose others no row takes. */
constexpr s32 TILE = IS_CHANNEL<K_FORMAT> ? GROUP_TOKENS : 16, RAW_TILE = 16;
/* Of m16n8k16, and half as many of its k-steps over keys. */
constexpr s32 KEY_TILES = TILE / 8;

/* A block sums a slice of V's elements; those of a long row are shared by several blocks, each of
 * which makes all scores. */
constexpr s32 SLICE_DIM = HEAD_DIM_V <= 256 ? (HEAD_DIM_V + 15) / 16 * 16 : 256;
constexpr s32 SLICES = (HEAD_DIM_V + SLICE_DIM - 1) / SLICE_DIM;

constexpr s32 K_STEPS = (HEAD_DIM + 15) / 16, V_STEPS = SLICE_DIM / 16;
constexpr s32 K_CHUNKS = 2 * K_STEPS, V_CHUNKS = V_IN_K ? K_CHUNKS : 2 * V_STEPS;
/* Fragments of longer queries are loaded for every tile. */
constexpr bool QUERIES_IN_REGISTERS = HEAD_DIM <= 128;

/* Types of the products of floats, raw ones among them. Encoded keys are taken as float16, which holds
 * levels and q' best, encoded values as bfloat16, which scaled weights cannot leave. */
constexpr bool K_IS_BF16 = K_FORMAT != KV_FORMAT_FP16, V_IS_BF16 = V_FORMAT != KV_FORMAT_FP16;
/* Of the fragments that are kept: encoded keys need one part of q', whatever q is. */
constexpr s32 PARTS = K_QUANTIZED ? 1 : QUERY_PARTS;
/* float16 has a short range: rows of q' come times a power of two. */
constexpr bool SCALED_ROWS = K_FORMAT == KV_FORMAT_FP16 && QUERY_PARTS == 2;

constexpr s32 round16(s32 bytes) { return (bytes + 15) / 16 * 16; }

/* Bytes of a row's codes that are copied at once. */
template <s32 FORMAT, s32 DIM>
constexpr s32 CODE_UNIT = CODE_BYTES<FORMAT, DIM> % 16 && !IS_CHANNEL<FORMAT> ? 8 : 16;
/* Codes of a row format, from row to row: powers of two would lie in the same banks. */
constexpr bool is_power_of_two(s32 x) { return (x & (x - 1)) == 0; }
template <s32 FORMAT, s32 DIM>
constexpr s32 CODE_PITCH =
    CODE_BYTES<FORMAT, DIM> +
    (CODE_BYTES<FORMAT, DIM> >= 32 && is_power_of_two(CODE_BYTES<FORMAT, DIM>) ? 16 : 0);
/* Where a tile's metadata begin, behind its codes. */
template <s32 FORMAT, s32 DIM>
constexpr s32 TILE_METADATA = IS_CHANNEL<FORMAT> ? GROUP_TOKENS * CODE_BYTES<FORMAT, DIM>
                                                 : round16(TILE * CODE_PITCH<FORMAT, DIM>);
template <s32 FORMAT, s32 DIM>
constexpr s32 ENCODED_TILE_BYTES =
    TILE_METADATA<FORMAT, DIM> + round16(TILE * METADATA_BYTES<FORMAT, DIM>);

/* Words side by side that a lane of a key takes at once, which four lanes share. */
constexpr s32 power_of_two_in(s32 x, s32 most) {
    s32 power = 1;
    while (power < most && x % (2 * power) == 0)
        power *= 2;
    return power;
}
template <s32 FORMAT, s32 DIM>
constexpr s32 KEY_WORDS = power_of_two_in(DIM / CHUNK<FORMAT>, DIM <= 128 ? 4 : 2);
/* The same of a value, which eight lanes share; where these are more than words in a chunk and the
 * chunks odd in number, two lanes have a half of each word. */
template <s32 FORMAT, s32 DIM> constexpr bool HALF_WORDS = DIM / CHUNK<FORMAT> % 2 != 0;
template <s32 FORMAT, s32 DIM>
constexpr s32 VALUE_WORDS =
    HALF_WORDS<FORMAT, DIM> ? 1 : power_of_two_in(DIM / CHUNK<FORMAT> / 2, DIM <= 128 ? 4 : 2);

constexpr s32 K_TILE_BYTES =
    K_QUANTIZED ? ENCODED_TILE_BYTES<K_FORMAT, HEAD_DIM> : TILE_BYTES<K_CHUNKS, TILE>;
constexpr s32 V_TILE_BYTES = V_IN_K        ? 0
                             : V_QUANTIZED ? ENCODED_TILE_BYTES<V_FORMAT, HEAD_DIM_V>
                                           : TILE_BYTES<V_CHUNKS, TILE>;
constexpr s32 STAGE_BYTES = K_TILE_BYTES + V_TILE_BYTES;
/* Of raw keys a warp has one or two tiles, none ahead. */
constexpr s32 RAW_K_TILE_BYTES = TILE_BYTES<K_CHUNKS, RAW_TILE>;
constexpr s32 RAW_STAGE_BYTES = RAW_K_TILE_BYTES + TILE_BYTES<V_CHUNKS, RAW_TILE>;
constexpr s32 WARP_RING_BYTES = larger(STAGES * STAGE_BYTES, QUANTIZED ? RAW_STAGE_BYTES : 0);
constexpr s32 RING_BYTES = WARPS * WARP_RING_BYTES;
/* What warps have summed, over the ring when they are done. */
constexpr s32 SUM_PITCH = SLICE_DIM + 8;
constexpr s32 SUM_BYTES = 4 * WARPS * ROWS * SUM_PITCH;
constexpr s32 QUERY_PART_BYTES = TILE_BYTES<K_CHUNKS, ROWS>;
/* Floats: a row's factor and q . bias, and of each warp and row m, l and a weight. */
constexpr s32 SCALAR_BYTES = 4 * (2 * ROWS + 3 * WARPS * ROWS);
static_assert(SHARED_BYTES ==
                  SCALAR_BYTES + QUERY_PARTS * QUERY_PART_BYTES + larger(RING_BYTES, SUM_BYTES),
              "the host reckons otherwise");

struct Shared {
    float *row_factors, *row_biases; /* [ROWS] */
    float *m, *l, *weights;          /* [WARPS, ROWS] */
    u8 *query;                       /* [QUERY_PARTS][ROWS] rows */
    u8 *ring;                        /* [WARPS, STAGES] tiles of K and V */
    float *sums;                     /* [WARPS, ROWS, SUM_PITCH], where the ring was */
};

KV_DEVICE Shared cut_shared(u8 *bytes) {
    Shared shared;
    shared.row_factors = reinterpret_cast<float *>(bytes);
    shared.row_biases = shared.row_factors + ROWS;
    shared.m = shared.row_biases + ROWS;
    shared.l = shared.m + WARPS * ROWS;
    shared.weights = shared.l + WARPS * ROWS;
    shared.query = bytes + SCALAR_BYTES;
    shared.ring = shared.query + QUERY_PARTS * QUERY_PART_BYTES;
    shared.sums = reinterpret_cast<float *>(shared.ring);
    return shared;
}
