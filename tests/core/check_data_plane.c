/* Checks the CPU data plane against its own double-precision reference, on every ISA that this
 * machine runs. It needs nothing but the core, so that it also runs under emulators and sanitizers:
 * see check_data_plane.sh. Prints one line and exits with 0 when all is well. */

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

enum { MAX_SEQUENCES = 4 };

typedef struct shape {
    int32_t num_sequences;
    int32_t stored[MAX_SEQUENCES], new[MAX_SEQUENCES];
    int32_t num_heads, group_size, head_dim, head_dim_v, block_size;
} shape;

static const shape shapes[] = {
    {4, {0, 40, 255, 300}, {5, 1, 2, 17}, 2, 3, 40, 40, 16},
    {2, {1300, 0}, {1, 70}, 1, 4, 128, 64, 64},
    {1, {5000}, {1}, 1, 8, 64, 64, 128},
    {3, {0, 513, 3}, {90, 1, 1}, 2, 1, 8, 24, 32},
    {1, {600}, {30}, 1, 7, 72, 72, 1024},
};

enum { NUM_SHAPES = sizeof(shapes) / sizeof(shapes[0]) };

typedef struct problem {
    shape s;
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
        CHECK(kv_read(blocks, p->block_rows[s], p->lengths[s] / blocks->block_size + 1, 0,
                      p->lengths[s], &out) == KV_OK,
              "kv_read");
        done += p->lengths[s];
    }
    return rows;
}

static problem make_problem(const shape *s, kv_format format) {
    problem p = {.s = *s, .scale = 1.0f / sqrtf((float)s->head_dim)};
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
    p.v = make_blocks(format, num_blocks, s, s->head_dim_v);
    p.keys = fill_blocks(&p, &p.k, num_tokens, slots);
    p.values = fill_blocks(&p, &p.v, num_tokens, slots);
    free(slots);

    const int32_t new = p.starts[s->num_sequences], hq = s->num_heads * s->group_size;
    p.q = make_rows(random_floats((int64_t)new * hq * s->head_dim), hq, s->head_dim);
    p.out = make_rows(random_floats((int64_t)new * hq * s->head_dim_v), hq, s->head_dim_v);
    p.lse = random_floats((int64_t)new * hq);
    return p;
}

static void free_problem(problem *p) {
    for (int32_t s = 0; s < p->s.num_sequences; s++)
        free(p->block_rows[s]);
    free(p->k.data);
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
    const kv_attend_options options = {.struct_size = sizeof(options), .scale = p->scale};
    CHECK(kv_attend(&p->plan, &p->q, &p->k, &p->v, &options, &p->out, p->lse) == KV_OK,
          "kv_attend");
}

/* One row in double precision against what kv_attend gave. */
static void check_row(const problem *p, int64_t first_key, int32_t seen, int32_t t, int32_t head) {
    const shape *s = &p->s;
    const int32_t hq = s->num_heads * s->group_size, kv_head = head / s->group_size;
    const float *q = (float *)p->q.data + ((int64_t)t * hq + head) * s->head_dim;
    const float *out = (float *)p->out.data + ((int64_t)t * hq + head) * s->head_dim_v;
    double *score = allocate((size_t)seen * sizeof(double));
    double top = -INFINITY, largest = 0, sum = 0, error = 0, size = 0, norm = 0;
    for (int32_t j = 0; j < seen; j++) {
        const float *k = p->keys + ((first_key + j) * s->num_heads + kv_head) * s->head_dim;
        score[j] = 0;
        for (int32_t d = 0; d < s->head_dim; d++)
            score[j] += (double)q[d] * k[d] * p->scale;
        top = fmax(top, score[j]);
        largest = fmax(largest, fabs(score[j]));
    }
    for (int32_t j = 0; j < seen; j++)
        sum += score[j] = exp(score[j] - top);
    for (int32_t d = 0; d < s->head_dim_v; d++) {
        double exact = 0, square = 0;
        for (int32_t j = 0; j < seen; j++) {
            const float v =
                p->values[((first_key + j) * s->num_heads + kv_head) * s->head_dim_v + d];
            exact += score[j] / sum * v;
            square += score[j] / sum * v * v;
        }
        error += (out[d] - exact) * (out[d] - exact);
        size += exact * exact;
        norm += square;
    }
    const double factor = fmax(1, largest / 8), lse = top + log(sum);
    CHECK(sqrt(error) <= 2e-6 * factor * fmax(sqrt(size), 0.1 * sqrt(norm)),
          "token %d head %d: error %g of %g", t, head, sqrt(error), sqrt(size));
    CHECK(fabs(p->lse[(int64_t)t * hq + head] - lse) <= 2e-6 * factor + fabs(lse) * 0x1p-23,
          "token %d head %d: lse %g not %g", t, head, p->lse[(int64_t)t * hq + head], lse);
    free(score);
}

static void check_problem(const problem *p) {
    int64_t first_key = 0;
    for (int32_t s = 0; s < p->s.num_sequences; s++) {
        for (int32_t i = 0; i < p->s.new[s]; i++)
            for (int32_t head = 0; head < p->q.num_heads; head++)
                check_row(p, first_key, p->s.stored[s] + i + 1, p->starts[s] + i, head);
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

static void check_attention(void) {
    for (int i = 0; i < NUM_SHAPES; i++)
        for (int format = 0; format < KV_FORMAT_COUNT; format++) {
            problem p = make_problem(&shapes[i], (kv_format)format);
            run_attend(&p);
            check_problem(&p);
            check_threads(&p);
            free_problem(&p);
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
        CHECK(kv_quantize(bits, KV_DTYPE_F32, (kv_format)format, COUNT / 8, 8, mine) == KV_OK,
              "kv_quantize");
        kv_set_isa("scalar");
        kv_quantize(bits, KV_DTYPE_F32, (kv_format)format, COUNT / 8, 8, scalar);
        kv_set_isa(isa);
        CHECK(memcmp(mine, scalar, COUNT * sizeof(*mine)) == 0, "format %d: other bytes", format);
        /* Decoding and encoding again gives the code back. */
        float *decoded = allocate(COUNT * sizeof(float));
        kv_dequantize(mine, (kv_format)format, COUNT / 8, 8, KV_DTYPE_F32, decoded);
        kv_quantize(decoded, KV_DTYPE_F32, (kv_format)format, COUNT / 8, 8, scalar);
        CHECK(memcmp(mine, scalar, COUNT * sizeof(*mine)) == 0, "format %d: no round trip", format);
        free(decoded);
    }
    free(bits);
    free(mine);
    free(scalar);
}

static void *attend_often(void *argument) {
    for (int i = 0; i < 20; i++)
        run_attend(argument);
    return NULL;
}

/* Callers that share the pool: one has it, the other runs alone. */
static void check_two_callers(void) {
    pthread_t other;
    problem a = make_problem(&shapes[1], KV_FORMAT_BF16);
    problem b = make_problem(&shapes[0], KV_FORMAT_FP32);
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
        check_two_callers();
        printf("%s ", *isa);
    }
    printf("%s\n", failures ? "FAILED" : "ok");
    return failures != 0;
}
