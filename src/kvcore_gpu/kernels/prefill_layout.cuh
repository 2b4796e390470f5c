/* How prefill cuts its work, and where things lie in a block's shared memory.
 *
 * Specialised by HEAD_DIM, HEAD_DIM_V, K_FORMAT, V_FORMAT, OPTIONS (sight.cuh) and
 *   QUERY_PARTS   1: q has K's type, bfloat16 where K is quantized; 2: it is taken as the sum of
 *                 two numbers of that type
 *   SHARED_BYTES  what the host reckons (kvcore_gpu/prefill.py), which must be the same
 *
 * A quantized cache is read in two passes over the keys, encoded ones and raw ones. Whatever has
 * RAW is of the second; without quantized formats there is the first only.
 */
#pragma once
#include "formats.cuh"
#include "sight.cuh"
#include "tiles.cuh"

constexpr s32 RUN = 16; /* keys that lie in one block, whatever its size */

constexpr s32 K_CHUNKS = ROW_CHUNKS<HEAD_DIM>, V_CHUNKS = ROW_CHUNKS<HEAD_DIM_V>;
constexpr bool K_QUANTIZED = !IS_FLOAT<K_FORMAT>, V_QUANTIZED = !IS_FLOAT<V_FORMAT>;
constexpr bool QUANTIZED = K_QUANTIZED || V_QUANTIZED;
static_assert(K_FORMAT != KV_FORMAT_FP32 && V_FORMAT != KV_FORMAT_FP32, "float32 is simt.cu's");
static_assert(HEAD_DIM <= 256 && HEAD_DIM_V <= 256, "longer rows are decode.cu's");

/* Registers decide: a warp has two tiles of 16 rows where there is room, as keys and values that it
 * loads then serve twice as many products, and tiles of fewer keys where there is least. */
constexpr bool PLAIN = !QUANTIZED && !OPTIONS && QUERY_PARTS == 1;
constexpr bool SHORT = HEAD_DIM <= 128 && HEAD_DIM_V <= 128;
constexpr s32 ROW_TILES = SHORT && !OPTIONS && QUERY_PARTS == 1 ? 2 : 1;
constexpr s32 KEYS = SHORT && (PLAIN || ROW_TILES == 1) ? 64 : 32; /* of a tile */
constexpr s32 WARPS = ROW_TILES == 2 || QUERY_PARTS == 2 ? 4 : 8;
constexpr s32 THREADS = 32 * WARPS;
constexpr s32 WARP_ROWS = 16 * ROW_TILES;
constexpr s32 ROWS = WARPS * WARP_ROWS;

template <bool RAW> constexpr bool K_ENCODED = K_QUANTIZED && !RAW;
template <bool RAW> constexpr bool V_ENCODED = V_QUANTIZED && !RAW;
/* Types of the products: encoded keys are taken as float16, which holds levels and q' best, encoded
 * values as bfloat16, which scaled weights cannot leave. */
template <bool RAW> constexpr bool K_IS_BF16 = K_QUANTIZED ? RAW : K_FORMAT == KV_FORMAT_BF16;
constexpr bool V_IS_BF16 = V_FORMAT != KV_FORMAT_FP16;
template <bool IS_BF16> struct FloatType {
    typedef F16 Type;
};
template <> struct FloatType<true> {
    typedef BF16 Type;
};
/* Encoded keys need one part of q', whatever q is. */
template <bool RAW> constexpr s32 PARTS = K_ENCODED<RAW> ? 1 : QUERY_PARTS;
/* float16 has a short range: rows of q' come times a power of two. */
template <bool RAW>
constexpr bool SCALED_ROWS = K_ENCODED<RAW> || (K_FORMAT == KV_FORMAT_FP16 && QUERY_PARTS == 2);

template <s32 FORMAT, s32 DIM>
constexpr s32 CODE_TILE_BYTES = KEYS * (CODE_BYTES<FORMAT, DIM> + METADATA_BYTES<FORMAT, DIM>);
constexpr s32 K_TILE_BYTES = TILE_BYTES<K_CHUNKS, KEYS>, V_TILE_BYTES = TILE_BYTES<V_CHUNKS, KEYS>;

/* A stage of the ring holds K and then V as they are stored; encoded ones have a tile beside it
 * that their codes are expanded into. */
template <bool RAW>
constexpr s32 K_STAGE_BYTES = K_ENCODED<RAW> ? CODE_TILE_BYTES<K_FORMAT, HEAD_DIM> : K_TILE_BYTES;
template <bool RAW>
constexpr s32 V_STAGE_BYTES = V_ENCODED<RAW> ? CODE_TILE_BYTES<V_FORMAT, HEAD_DIM_V> : V_TILE_BYTES;
template <bool RAW> constexpr s32 STAGE_BYTES = K_STAGE_BYTES<RAW> + V_STAGE_BYTES<RAW>;
template <bool RAW>
constexpr s32 PASS_BYTES = 2 * STAGE_BYTES<RAW> + (K_ENCODED<RAW> ? K_TILE_BYTES : 0) +
                           (V_ENCODED<RAW> ? V_TILE_BYTES : 0);
constexpr s32 QUERY_PART_BYTES = TILE_BYTES<K_CHUNKS, ROWS>;
constexpr s32 QUERY_BYTES = QUERY_PARTS * QUERY_PART_BYTES;
/* Floats: a row's power of two and q . bias, a key's and a value's scale. */
constexpr s32 SCALAR_BYTES = 4 * (2 * ROWS + 2 * KEYS);
constexpr s32 LARGEST_PASS =
    PASS_BYTES<false> > PASS_BYTES<QUANTIZED> ? PASS_BYTES<false> : PASS_BYTES<QUANTIZED>;
static_assert(SHARED_BYTES == SCALAR_BYTES + QUERY_BYTES + LARGEST_PASS,
              "the host reckons otherwise");

struct Shared {
    float *row_factors, *row_biases;  /* [ROWS] */
    float *key_scales, *value_scales; /* [KEYS] */
    u8 *query;                        /* [QUERY_PARTS][ROWS] rows */
    u8 *pass;
};

KV_DEVICE Shared cut_shared(u8 *bytes) {
    Shared shared;
    shared.row_factors = reinterpret_cast<float *>(bytes);
    shared.row_biases = shared.row_factors + ROWS;
    shared.key_scales = shared.row_biases + ROWS;
    shared.value_scales = shared.key_scales + KEYS;
    shared.query = bytes + SCALAR_BYTES;
    shared.pass = shared.query + QUERY_BYTES;
    return shared;
}

/* K's and V's part of a stage, and the tiles that products read. */
template <bool RAW> KV_DEVICE u8 *k_stage(const Shared &shared, s32 stage) {
    return shared.pass + stage * STAGE_BYTES<RAW>;
}
template <bool RAW> KV_DEVICE u8 *v_stage(const Shared &shared, s32 stage) {
    return k_stage<RAW>(shared, stage) + K_STAGE_BYTES<RAW>;
}
template <bool RAW> KV_DEVICE u8 *k_tile(const Shared &shared, s32 stage) {
    return K_ENCODED<RAW> ? shared.pass + 2 * STAGE_BYTES<RAW> : k_stage<RAW>(shared, stage);
}
template <bool RAW> KV_DEVICE u8 *v_tile(const Shared &shared, s32 stage) {
    return V_ENCODED<RAW> ? shared.pass + 2 * STAGE_BYTES<RAW> + (K_ENCODED<RAW> ? K_TILE_BYTES : 0)
                          : v_stage<RAW>(shared, stage);
}
