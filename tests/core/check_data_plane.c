/* Checks the CPU data plane against its own double-precision reference, on every ISA that this
 * machine runs. It needs nothing but the core, so that it also runs under emulators and sanitizers:
 * see check_data_plane.sh. Prints one line and exits with 0 when all is well. */

#include "dispatch.h"
#include "kvcore.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures;

#define CHECK(condition, ...)                               \
    do {                                                    \
        if (!(condition)) {                                 \
            failures++;                                     \
            fprintf(stderr, "%s:%d: ", __FILE__, __LINE__); \
            fprintf(stderr, __VA_ARGS__);                   \
            fputc('\n', stderr);                            \
        }                                                   \
    } while (0)

static void *allocate(size_t nbytes) {
    void *memory = malloc(nbytes ? nbytes : 1);
    if (!memory)
        exit(2);
    return memory;
}

/* Numbers from -2 to 2, the same in every run. */
static float random_float(void) {
    static uint64_t state = 88172645463325252u;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (float)(state >> 40) / (float)(1 << 22) - 2.0f;
}

static float *random_floats(int64_t count) {
    float *x = allocate((size_t)count * sizeof(float));
    for (int64_t i = 0; i < count; i++)
        x[i] = random_float();
    return x;
}

/* ---- attention ------------------------------------------------------------------------------- */

enum { MAX_SEQUENCES = 4, NUM_FLOAT_FORMATS = KV_FORMAT_BF16 + 1 };

typedef struct shape {
    int32_t num_sequences;
    int32_t stored[MAX_SEQUENCES], new[MAX_SEQUENCES];
    int32_t num_heads, group_size, head_dim, head_dim_v, block_size;
    int32_t v_in_k; /* V is the first head_dim_v elements of K */
} shape;

static const shape shapes[] = {
    {4, {0, 40, 255, 300}, {5, 1, 2, 17}, 2, 3, 40, 40, 16, 0},
    {2, {1300, 0}, {1, 70}, 1, 4, 128, 64, 64, 0},
    {1, {5000}, {1}, 1, 8, 64, 64, 128, 0},
    {3, {0, 513, 3}, {90, 1, 1}, 2, 1, 8, 24, 32, 0},
    {1, {600}, {30}, 1, 7, 72, 72, 1024, 0},
    {2, {270, 0}, {1, 6}, 1, 130, 72, 48, 32, 1},
};

enum { NUM_SHAPES = sizeof(shapes) / sizeof(shapes[0]) };

/* Options of attend, none and several at once; those of heads differ from head to head. */
typedef struct variant {
    int32_t window, non_causal, masked, moved; /* moved: with positions */
    float softcap, slope, sink;
} variant;

static const variant plain = {0};
static const variant variants[] = {
    {.window = 37, .softcap = 0.7f, .slope = 0.02f, .sink = 0.5f},
    {.window = 300, .non_causal = 1, .sink = -1.0f},
    {.masked = 1, .softcap = 2.0f, .slope = 0.01f},
    {.moved = 1, .window = 23, .slope = 0.02f},
};

enum { NUM_VARIANTS = sizeof(variants) / sizeof(variants[0]), MAX_HEADS = 130, MAX_TOKENS = 100 };

typedef struct problem {
    shape s;
    variant use;
    float slopes[MAX_HEADS], sinks[MAX_HEADS];
    int32_t positions[MAX_TOKENS];
    uint8_t *mask;
    int64_t mask_size, mask_offsets[MAX_SEQUENCES];
    kv_plan plan;
    kv_blocks k, v;
    kv_rows q, out;
    int32_t starts[MAX_SEQUENCES + 1], lengths[MAX_SEQUENCES];
    int32_t *block_rows[MAX_SEQUENCES];
    float *keys, *values; /* decoded: [all tokens, H, D], sequence after sequence */
    float *lse;
    float scale;
} problem;

/* Blocks full of NaN. */
static kv_blocks make_blocks(kv_format format, int32_t n, const shape *s, int32_t head_dim) {
    kv_blocks blocks;
    CHECK(kv_blocks_init(&blocks, NULL, format, n, s->num_heads, s->block_size, head_dim) == KV_OK,
          "kv_blocks_init");
    blocks.data = allocate((size_t)kv_blocks_nbytes(&blocks));
    memset(blocks.data, 0xff, (size_t)kv_blocks_nbytes(&blocks));
    return blocks;
}

static kv_rows make_rows(float *data, int32_t num_heads, int32_t head_dim) {
    return (kv_rows){.data = data,
                     .dtype = KV_DTYPE_F32,
                     .num_heads = num_heads,
                     .head_dim = head_dim,
                     .token_stride = (int64_t)num_heads * head_dim,
                     .head_stride = head_dim};
}

/* Appends random rows for all tokens of all sequences and reads them back decoded. */
static float *fill_blocks(const problem *p, const kv_blocks *blocks, int32_t num_tokens,
                          const int32_t *slots) {
    float *rows = random_floats((int64_t)num_tokens * blocks->num_heads * blocks->head_dim);
    const kv_plan plan = {.num_sequences = 1, .num_tokens = num_tokens, .slots = slots};
    const kv_rows described = make_rows(rows, blocks->num_heads, blocks->head_dim);
    CHECK(kv_append(&plan, &described, blocks) == KV_OK, "kv_append");
    int64_t done = 0;
    for (int32_t s = 0; s < p->s.num_sequences; s++) {
        const kv_rows out = make_rows(rows + done * blocks->num_heads * blocks->head_dim,
                                      blocks->num_heads, blocks->head_dim);
        const kv_read_source sequence = {.block_row = p->block_rows[s],
                                         .num_columns = p->lengths[s] / blocks->block_size + 1};
        CHECK(kv_read(blocks, &sequence, 0, p->lengths[s], &out) == KV_OK, "kv_read");
        done += p->lengths[s];
    }
    return rows;
}

/* The first head_dim_v elements of num_rows rows of K. */
static float *first_elements(const float *keys, int64_t num_rows, const shape *s) {
    float *values = allocate((size_t)num_rows * (size_t)s->head_dim_v * sizeof(float));
    for (int64_t r = 0; r < num_rows; r++)
        memcpy(values + r * s->head_dim_v, keys + r * s->head_dim,
               (size_t)s->head_dim_v * sizeof(float));
    return values;
}

static int mask_bit(int32_t i, int32_t j) { return (i * 7 + j * 5) % 3 != 0; }

/* Where token j of sequence s stands. */
static int32_t place_of(const problem *p, int32_t s, int32_t j) {
    const int32_t stored = p->s.stored[s];
    return p->use.moved && j >= stored ? p->positions[p->starts[s] + j - stored] : j;
}

/* Whether new token `i` of sequence s sees key j. */
static int sees(const problem *p, int32_t s, int32_t i, int32_t j) {
    const int32_t stored_at = p->s.stored[s] + i, position = place_of(p, s, stored_at);
    const int32_t key = place_of(p, s, j), window = p->use.window;
    if (window && (key <= position - window || key > position))
        return 0;
    if (p->use.masked)
        return mask_bit(i, j);
    return p->use.non_causal || j <= stored_at;
}

static void make_options(problem *p) {
    for (int32_t h = 0; h < p->q.num_heads; h++) {
        p->slopes[h] = p->use.slope * (float)(h + 1);
        p->sinks[h] = p->use.sink * (float)(h + 1);
    }
    for (int32_t s = 0; s < p->s.num_sequences; s++) {
        for (int32_t i = 0; i < p->s.new[s]; i++) /* siblings in a tree */
            p->positions[p->starts[s] + i] = p->s.stored[s] + i / 3;
        p->mask_offsets[s] = p->mask_size;
        p->mask_size += (int64_t)p->s.new[s] * ((p->lengths[s] + 7) / 8);
    }
    p->mask = allocate((size_t)p->mask_size);
    memset(p->mask, 0, (size_t)p->mask_size);
    for (int32_t s = 0; s < p->s.num_sequences; s++)
        for (int32_t i = 0; i < p->s.new[s]; i++) {
            uint8_t *row = p->mask + p->mask_offsets[s] + (int64_t)i * ((p->lengths[s] + 7) / 8);
            for (int32_t j = 0; j < p->lengths[s]; j++)
                row[j / 8] |= (uint8_t)(mask_bit(i, j) << j % 8);
        }
}

static problem make_problem(const shape *s, kv_format format, variant use) {
    problem p = {.s = *s, .use = use, .scale = 1.0f / sqrtf((float)s->head_dim)};
    int32_t num_blocks = 1, num_tokens = 0, next = 0;
    for (int32_t i = 0; i < s->num_sequences; i++) {
        p.lengths[i] = s->stored[i] + s->new[i];
        p.starts[i + 1] = p.starts[i] + s->new[i];
        num_blocks += p.lengths[i] / s->block_size + 1;
        num_tokens += p.lengths[i];
    }
    int32_t *slots = allocate((size_t)num_tokens * sizeof(int32_t)), t = 0;
    for (int32_t i = 0; i < s->num_sequences; i++) {
        const int32_t columns = p.lengths[i] / s->block_size + 1;
        p.block_rows[i] = allocate((size_t)columns * sizeof(int32_t));
        for (int32_t c = 0; c < columns; c++) /* backwards, so that order is not assumed */
            p.block_rows[i][c] = num_blocks - 1 - next++;
        for (int32_t j = 0; j < p.lengths[i]; j++)
            slots[t++] = p.block_rows[i][j / s->block_size] * s->block_size + j % s->block_size;
    }
    p.k = make_blocks(format, num_blocks, s, s->head_dim);
    p.keys = fill_blocks(&p, &p.k, num_tokens, slots);
    if (s->v_in_k) {
        p.v = p.k;
        p.v.head_dim = s->head_dim_v;
        p.values = first_elements(p.keys, (int64_t)num_tokens * s->num_heads, s);
    } else {
        p.v = make_blocks(format, num_blocks, s, s->head_dim_v);
        p.values = fill_blocks(&p, &p.v, num_tokens, slots);
    }
    free(slots);

    const int32_t new = p.starts[s->num_sequences], hq = s->num_heads * s->group_size;
    p.q = make_rows(random_floats((int64_t)new * hq * s->head_dim), hq, s->head_dim);
    p.out = make_rows(random_floats((int64_t)new * hq * s->head_dim_v), hq, s->head_dim_v);
    p.lse = random_floats((int64_t)new * hq);
    CHECK(hq <= MAX_HEADS && new <= MAX_TOKENS, "%d heads, %d tokens", hq, new);
    make_options(&p);
    return p;
}

static void free_problem(problem *p) {
    for (int32_t s = 0; s < p->s.num_sequences; s++)
        free(p->block_rows[s]);
    free(p->mask);
    free(p->k.data);
    if (!p->s.v_in_k)
        free(p->v.data);
    free(p->keys);
    free(p->values);
    free(p->q.data);
    free(p->out.data);
    free(p->lse);
}

static void run_attend(problem *p) {
    p->plan = (kv_plan){.block_size = p->s.block_size,
                        .num_sequences = p->s.num_sequences,
                        .num_tokens = p->starts[p->s.num_sequences],
                        .query_starts = p->starts,
                        .seq_lens = p->lengths,
                        .block_rows = (const int32_t *const *)p->block_rows};
    const variant *use = &p->use;
    const kv_attend_options options = {.struct_size = sizeof(options),
                                       .scale = p->scale,
                                       .non_causal = use->non_causal,
                                       .window = use->window,
                                       .softcap = use->softcap,
                                       .alibi_slopes = use->slope != 0 ? p->slopes : NULL,
                                       .positions = use->moved ? p->positions : NULL,
                                       .mask = use->masked ? p->mask : NULL,
                                       .mask_size = p->mask_size,
                                       .mask_offsets = p->mask_offsets,
                                       .sinks = use->sink != 0 ? p->sinks : NULL};
    CHECK(kv_attend(&p->plan, &p->q, &p->k, &p->v, &options, &p->out, p->lse) == KV_OK,
          "kv_attend");
}

/* The score that a key has in double precision; the largest magnitude on its way goes to *largest. */
static double score_of(const problem *p, const float *q, const float *k, int32_t head,
                       int32_t distance, double *largest) {
    double score = 0;
    for (int32_t d = 0; d < p->s.head_dim; d++)
        score += (double)q[d] * k[d] * p->scale;
    *largest = fmax(*largest, fabs(score));
    if (p->use.softcap > 0)
        score = p->use.softcap * tanh(score / p->use.softcap);
    score -= (double)p->slopes[head] * distance;
    *largest = fmax(*largest, fabs(score));
    return score;
}

/* What is allowed beyond the usual: docs/numerics.md, "bf16 dot products". */
static double dots_error(const problem *p, int32_t s) {
    const int dots = strcmp(kv_get_isa(), "avx512_bf16") == 0 && p->k.format == KV_FORMAT_BF16;
    return dots && p->s.new[s] >= 32 ? 2e-3 : 0;
}

/* New token i of sequence s, whose keys start at first_key, against what kv_attend gave. */
static void check_row(const problem *p, int32_t s, int64_t first_key, int32_t i, int32_t head) {
    const int32_t length = p->lengths[s], dim = p->s.head_dim, dim_v = p->s.head_dim_v;
    const int64_t row = (int64_t)(p->starts[s] + i) * p->q.num_heads + head;
    const int64_t stride = p->s.num_heads, first = first_key * stride + head / p->s.group_size;
    const float *q = (float *)p->q.data + row * dim, *out = (float *)p->out.data + row * dim_v;
    double *score = allocate((size_t)length * sizeof(double));
    const double sink = p->use.sink != 0 ? p->sinks[head] : -INFINITY;
    double top = sink, largest = p->use.sink != 0 ? fabs(sink) : 0, error = 0, size = 0, norm = 0;
    for (int32_t j = 0; j < length; j++) {
        score[j] = -INFINITY;
        if (sees(p, s, i, j))
            score[j] = score_of(p, q, p->keys + (first + j * stride) * dim, head,
                                place_of(p, s, p->s.stored[s] + i) - place_of(p, s, j), &largest);
        top = fmax(top, score[j]);
    }
    double sum = isfinite(top) ? exp(sink - top) : 0;
    for (int32_t j = 0; j < length; j++)
        sum += score[j] = score[j] > -INFINITY ? exp(score[j] - top) : 0;
    for (int32_t d = 0; d < dim_v; d++) {
        double exact = 0, square = 0;
        for (int32_t j = 0; j < length && sum > 0; j++) {
            const float v = p->values[(first + j * stride) * dim_v + d];
            exact += score[j] / sum * v;
            square += score[j] / sum * v * v;
        }
        error += (out[d] - exact) * (out[d] - exact);
        size += exact * exact;
        norm += square;
    }
    const double factor = fmax(1, largest / 8), lse = sum > 0 ? top + log(sum) : -INFINITY;
    const double more = dots_error(p, s);
    CHECK(sqrt(error) <= 2e-6 * factor * fmax(sqrt(size), 0.1 * sqrt(norm)) + more * sqrt(norm),
          "sequence %d token %d head %d: error %g of %g", s, i, head, sqrt(error), sqrt(size));
    CHECK(p->lse[row] == lse ||
              fabs(p->lse[row] - lse) <= 2e-6 * factor + more + fabs(lse) * 0x1p-23,
          "sequence %d token %d head %d: lse %g not %g", s, i, head, p->lse[row], lse);
    free(score);
}

static void check_problem(const problem *p) {
    int64_t first_key = 0;
    for (int32_t s = 0; s < p->s.num_sequences; s++) {
        for (int32_t i = 0; i < p->s.new[s]; i++)
            for (int32_t head = 0; head < p->q.num_heads; head++)
                check_row(p, s, first_key, i, head);
        first_key += p->lengths[s];
    }
}

/* The same bits with any number of threads. */
static void check_threads(problem *p) {
    const size_t nbytes = (size_t)p->starts[p->s.num_sequences] * (size_t)p->q.num_heads *
                          (size_t)p->s.head_dim_v * sizeof(float);
    void *single = allocate(nbytes);
    memcpy(single, p->out.data, nbytes);
    for (int32_t threads = 2; threads <= 5; threads++) {
        kv_set_num_threads(threads, 1);
        memset(p->out.data, 0, nbytes);
        run_attend(p);
        CHECK(memcmp(single, p->out.data, nbytes) == 0, "%d threads: other bits", threads);
    }
    kv_set_num_threads(1, 1);
    free(single);
}

static void check_attend(const shape *s, kv_format format, variant use) {
    problem p = make_problem(s, format, use);
    run_attend(&p);
    check_problem(&p);
    check_threads(&p);
    free_problem(&p);
}

static void check_attention(void) {
    for (int i = 0; i < NUM_SHAPES; i++) {
        for (int format = 0; format < NUM_FLOAT_FORMATS; format++)
            check_attend(&shapes[i], (kv_format)format, plain);
        for (int v = 0; v < NUM_VARIANTS; v++)
            check_attend(&shapes[i], (kv_format)((i + v) % NUM_FLOAT_FORMATS), variants[v]);
    }
}

/* ---- the rest -------------------------------------------------------------------------------- */

static void check_linear(void) {
    enum { ROWS = 19, OUTPUTS = 405, INPUTS = 503 };
    float *x = random_floats(ROWS * INPUTS), *w = random_floats(OUTPUTS * INPUTS);
    float *bias = random_floats(OUTPUTS), *y = random_floats(ROWS * OUTPUTS);
    float *alone = random_floats(OUTPUTS);
    kv_set_num_threads(3, 1);
    CHECK(kv_linear(x, INPUTS, w, INPUTS, bias, y, OUTPUTS, ROWS, OUTPUTS, INPUTS) == KV_OK,
          "kv_linear");
    for (int r = 0; r < ROWS; r++) {
        kv_linear(x + r * INPUTS, INPUTS, w, INPUTS, bias, alone, OUTPUTS, 1, OUTPUTS, INPUTS);
        CHECK(memcmp(alone, y + r * OUTPUTS, sizeof(float) * OUTPUTS) == 0, "row %d alone", r);
        for (int n = 0; n < OUTPUTS; n++) {
            double exact = bias[n], size = 0;
            for (int k = 0; k < INPUTS; k++) {
                exact += (double)x[r * INPUTS + k] * w[n * INPUTS + k];
                size += fabs((double)x[r * INPUTS + k] * w[n * INPUTS + k]);
            }
            CHECK(fabs(y[r * OUTPUTS + n] - exact) <= (INPUTS / 4 + 6) * 0x1p-24 * size,
                  "linear %d %d: %g not %g", r, n, y[r * OUTPUTS + n], exact);
        }
    }
    kv_set_num_threads(1, 1);
    free(x);
    free(w);
    free(bias);
    free(y);
    free(alone);
}

static void check_merge(void) {
    enum { PARTIALS = 5, ROWS = 7, DIM = 24 };
    float *outs = random_floats(PARTIALS * ROWS * DIM), *lses = random_floats(PARTIALS * ROWS);
    float out[ROWS * DIM], lse[ROWS];
    lses[2 * ROWS + 3] = -INFINITY;
    CHECK(kv_merge_states(outs, lses, PARTIALS, ROWS, DIM, out, lse) == KV_OK, "kv_merge_states");
    for (int r = 0; r < ROWS; r++) {
        double sum = 0;
        for (int p = 0; p < PARTIALS; p++)
            sum += exp(lses[p * ROWS + r]);
        CHECK(fabs(lse[r] - log(sum)) < 1e-6, "merged lse %g not %g", lse[r], log(sum));
        for (int d = 0; d < DIM; d++) {
            double exact = 0;
            for (int p = 0; p < PARTIALS; p++)
                exact += exp(lses[p * ROWS + r]) / sum * outs[(p * ROWS + r) * DIM + d];
            CHECK(fabs(out[r * DIM + d] - exact) < 1e-6, "merged %g not %g", out[r * DIM + d],
                  exact);
        }
    }
    free(outs);
    free(lses);
}

/* Every bit pattern's upper half, with low bits that round down, to even and up. */
static void check_encoding(const char *isa) {
    enum { COUNT = 1 << 19 };
    uint32_t *bits = allocate(COUNT * sizeof(*bits));
    uint16_t *mine = allocate(COUNT * sizeof(*mine)), *scalar = allocate(COUNT * sizeof(*scalar));
    const uint32_t low[] = {0, 1, 0x0fff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001};
    for (uint32_t i = 0; i < COUNT; i++)
        bits[i] = (i >> 3) << 16 | low[i & 7];
    for (int format = KV_FORMAT_FP16; format <= KV_FORMAT_BF16; format++) {
        CHECK(kv_quantize(bits, KV_DTYPE_F32, (kv_format)format, COUNT / 8, 8, NULL, mine) == KV_OK,
              "kv_quantize");
        kv_set_isa("scalar");
        kv_quantize(bits, KV_DTYPE_F32, (kv_format)format, COUNT / 8, 8, NULL, scalar);
        kv_set_isa(isa);
        CHECK(memcmp(mine, scalar, COUNT * sizeof(*mine)) == 0, "format %d: other bytes", format);
        /* Decoding and encoding again gives the code back. */
        float *decoded = allocate(COUNT * sizeof(float));
        kv_dequantize(mine, (kv_format)format, COUNT / 8, 8, NULL, KV_DTYPE_F32, decoded);
        kv_quantize(decoded, KV_DTYPE_F32, (kv_format)format, COUNT / 8, 8, NULL, scalar);
        CHECK(memcmp(mine, scalar, COUNT * sizeof(*mine)) == 0, "format %d: no round trip", format);
        free(decoded);
    }
    free(bits);
    free(mine);
    free(scalar);
}

/* FNV-1a */
static uint64_t hash_bytes(uint64_t hash, const char *bytes, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        hash = (hash ^ (unsigned char)bytes[i]) * 0x100000001b3;
    return hash;
}

enum { QUANTIZED_ROWS = 32, QUANTIZED_DIM = 192 };

/* The kernels themselves, which keep codes and metadata apart, and tokens from the middle. */
static void check_kernels(kv_format format, const float *rows, const kv_channels *channels,
                          const float *expected) {
    enum { FIRST = 13, COUNT = 9, STRIDE = QUANTIZED_DIM + 16 };
    const kv_kernels *kernels = kv_active_kernels();
    char *codes = allocate(QUANTIZED_ROWS * QUANTIZED_DIM), *metadata = allocate(1 << 14);
    float *some = allocate(COUNT * STRIDE * sizeof(float));
    kernels->encode(format, rows, QUANTIZED_ROWS, QUANTIZED_DIM, channels, codes, metadata);
    kernels->decode(format, codes, metadata, FIRST, COUNT, QUANTIZED_DIM, channels, some, STRIDE);
    for (int t = 0; t < COUNT; t++)
        CHECK(memcmp(some + t * STRIDE, expected + (FIRST + t) * QUANTIZED_DIM,
                     QUANTIZED_DIM * sizeof(float)) == 0,
              "format %d: token %d", format, FIRST + t);
    free(codes);
    free(metadata);
    free(some);
}

/* Bytes and decoded bits of quantized rows are one for all ISAs and machines. */
static void check_quantized(void) {
    enum { ROWS = QUANTIZED_ROWS, DIM = QUANTIZED_DIM };
    float *rows = allocate(ROWS * DIM * sizeof(float)),
          *back = allocate(ROWS * DIM * sizeof(float));
    float scales[DIM], bias[DIM];
    char *codes = allocate(ROWS * DIM * 4);
    uint64_t hash = 0xcbf29ce484222325;
    for (int i = 0; i < ROWS * DIM; i++)
        rows[i] = ldexpf((float)((37 * i + i / DIM * 11) % 1009 - 504), i / DIM * 8 - 130);
    for (int d = 0; d < DIM; d++) {
        scales[d] = 1 / (float)(d + 10);
        bias[d] = (float)(d % 7) / 3;
    }
    for (int format = NUM_FLOAT_FORMATS; format < KV_FORMAT_COUNT; format++) {
        const kv_format_info *info = kv_format_get_info((kv_format)format);
        const int64_t bits = info->element_bits + info->element_metadata_bits;
        const int64_t nbytes = ROWS * (DIM * bits / 8 + info->row_metadata_bytes);
        const kv_channels channels = {bias, format == KV_FORMAT_INT8_STATIC ? scales : NULL};
        CHECK(kv_quantize(rows, KV_DTYPE_F32, (kv_format)format, ROWS, DIM, &channels, codes) ==
                  KV_OK,
              "%s", info->name);
        CHECK(kv_dequantize(codes, (kv_format)format, ROWS, DIM, &channels, KV_DTYPE_F32, back) ==
                  KV_OK,
              "%s", info->name);
        check_kernels((kv_format)format, rows, &channels, back);
        hash = hash_bytes(hash, codes, nbytes);
        hash = hash_bytes(hash, (const char *)back, ROWS * DIM * (int64_t)sizeof(float));
    }
    CHECK(hash == 0x92db3254a67def2e, "quantized rows: hash 0x%016llx", (unsigned long long)hash);
    free(rows);
    free(back);
    free(codes);
}

static void *attend_often(void *argument) {
    for (int i = 0; i < 20; i++)
        run_attend(argument);
    return NULL;
}

/* Callers that share the pool: one has it, the other runs alone. */
static void check_two_callers(void) {
    pthread_t other;
    problem a = make_problem(&shapes[1], KV_FORMAT_BF16, plain);
    problem b = make_problem(&shapes[0], KV_FORMAT_FP32, variants[0]);
    kv_set_num_threads(3, 1);
    if (pthread_create(&other, NULL, attend_often, &a) != 0)
        exit(2);
    attend_often(&b);
    pthread_join(other, NULL);
    check_problem(&a);
    check_problem(&b);
    kv_set_num_threads(1, 1);
    free_problem(&a);
    free_problem(&b);
}

int main(void) {
    for (const char *const *isa = kv_available_isas(); *isa; isa++) {
        CHECK(kv_set_isa(*isa) == KV_OK && strcmp(kv_get_isa(), *isa) == 0, "%s", *isa);
        kv_set_num_threads(1, 1);
        check_attention();
        check_linear();
        check_merge();
        check_encoding(*isa);
        check_quantized();
        check_two_callers();
        printf("%s ", *isa);
    }
    printf("%s\n", failures ? "FAILED" : "ok");
    return failures != 0;
}
