/* How prefill cuts its work, and where things lie in a block's shared memory.
 *
 * Specialised by HEAD_DIM, HEAD_DIM_V, K_FORMAT, V_FORMAT, OPTIONS (sight.cuh) and
 *   QUERY_PARTS   1: q has K's type, bfloat16 where K is quantized; 2: it is taken as the sum of
 *                 two numbers of that type
 *   MOST_BLOCKS   that a sequence has over all KV heads if its keys are cut
 *   LEAST_KEYS    of each part of them
 *   SHARED_BYTES  what the host reckons (kvcore_gpu/prefill.py), which must be the same
 *
 * A quantized cache is read in two passes over the keys, encoded ones and raw ones, by the same code
 * with `raw` false and true; without quantized formats there is the first only.
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

/* A sequence whose rows are few blocks has its keys cut into parts. */
constexpr s32 MOST_PARTS = 32, SPLIT_KEYS = 512;

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

/* A stage of the ring holds K and then V as they are stored; encoded ones have a tile behind the
 * ring that their codes are expanded into. */
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
/* Floats: a row's factor and bias, or m and l; a key's and a value's scale. */
constexpr s32 SCALAR_BYTES = 4 * (2 * ROWS + 2 * KEYS);
/* What stays the same for a block or a pass, or comes with a tile: registers are short. */
constexpr s32 RUNS = KEYS / RUN;
constexpr s32 PASS_WORDS = 40 + 6 * WARPS;
constexpr s32 LARGEST_PASS =
    PASS_BYTES<false> > PASS_BYTES<QUANTIZED> ? PASS_BYTES<false> : PASS_BYTES<QUANTIZED>;
/* Between passes and after them sums lie where queries and tiles were. */
constexpr s32 SUMS_PITCH = 8 * V_CHUNKS; /* floats */
constexpr s32 SUMS_BYTES = 4 * ROWS * SUMS_PITCH;
static_assert(SHARED_BYTES == 4 * PASS_WORDS + SCALAR_BYTES +
                                  (QUERY_BYTES + LARGEST_PASS > SUMS_BYTES
                                       ? QUERY_BYTES + LARGEST_PASS
                                       : SUMS_BYTES),
              "the host reckons otherwise");

/* The keys that a pass reads for some row: [0, head) and [begin, end). */
struct Wanted {
    s32 head, begin, end;
};

/* Tiles of keys that a pass visits: the first, for the head, and those from `first` to `last`. */
struct Tiles {
    s32 head, first, last;
};

/* Keys that some row of a warp takes lie in [begin, end); all rows take those of [every_begin,
 * every_end). */
struct WarpSight {
    s32 begin, end, every_begin, every_end;
};

/* The rows that a block takes of a KV head: (new token, query head) pairs, those of a token side by
 * side; and of their keys all, or one of several parts. */
struct Place {
    Sequence seq;
    s32 first_row;            /* of the sequence's; below 0: the block has none */
    s32 part, split_keys;     /* which of the parts of so many keys; 0: there is one */
    s32 first_unit;           /* of the tile's parts in p.partial_out */
    s32 first_part, end_part; /* that have keys */
    s32 is_last;
};

struct Pass {
    Place place;
    Wanted wanted;
    Tiles tiles;
    s32 count;                /* of tiles */
    s32 shared_end;           /* keys before it are taken by all rows of the block that want them */
    s32 blocks[2][2][4];      /* of a stage's RUNS: their blocks, and their raw blocks */
    s32 not_finite[2][WARPS]; /* the tile in which a warp last found a value that is not */
    WarpSight sights[WARPS];
};
static_assert(sizeof(Pass) <= 4 * PASS_WORDS && RUNS <= 4, "the host reckons otherwise");

struct Shared {
    Pass *pass;
    float *row_factors, *row_biases;  /* [ROWS] */
    float *key_scales, *value_scales; /* [KEYS] */
    u8 *query;                        /* [QUERY_PARTS][ROWS] rows */
    u8 *ring;
};

KV_DEVICE Shared cut_shared(u8 *bytes) {
    Shared shared;
    shared.pass = reinterpret_cast<Pass *>(bytes);
    shared.row_factors = reinterpret_cast<float *>(bytes + 4 * PASS_WORDS);
    shared.row_biases = shared.row_factors + ROWS;
    shared.key_scales = shared.row_biases + ROWS;
    shared.value_scales = shared.key_scales + KEYS;
    shared.query = bytes + 4 * PASS_WORDS + SCALAR_BYTES;
    shared.ring = shared.query + QUERY_BYTES;
    return shared;
}

/* K's and V's part of a stage, and the tiles that products read. */
KV_DEVICE u8 *k_stage(const Shared &shared, bool raw, s32 stage) {
    return shared.ring + stage * (raw ? STAGE_BYTES<true> : STAGE_BYTES<false>);
}
KV_DEVICE u8 *v_stage(const Shared &shared, bool raw, s32 stage) {
    return k_stage(shared, raw, stage) + (raw ? K_STAGE_BYTES<true> : K_STAGE_BYTES<false>);
}
KV_DEVICE u8 *k_tile(const Shared &shared, bool raw, s32 stage) {
    return K_QUANTIZED && !raw ? shared.ring + 2 * STAGE_BYTES<false> : k_stage(shared, raw, stage);
}
KV_DEVICE u8 *v_tile(const Shared &shared, bool raw, s32 stage) {
    return V_QUANTIZED && !raw
               ? shared.ring + 2 * STAGE_BYTES<false> + (K_QUANTIZED ? K_TILE_BYTES : 0)
               : v_stage(shared, raw, stage);
}
