/* Two sequences in one paged cache, from plain C: a ragged prefill, then one decoded token each, and
 * every output checked against a plain softmax. Build it against an installed kvcore:
 *
 *   include=$(python -c 'import kvcore; print(kvcore.get_include())')
 *   lib=$(python -c 'import kvcore; print(kvcore.get_library_dir())')
 *   cc -std=c11 embed.c -I"$include" -L"$lib" -Wl,-rpath,"$lib" -lkvcore -lm -o embed
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <kvcore/kvcore.h>

enum { HEADS = 2, QUERY_HEADS = 4, DIM = 16, BLOCK_SIZE = 16, NUM_BLOCKS = 8, MAX_NEW = 25 };
enum { K, V, Q };

static void check(kv_status status, const char *call) {
    if (status != KV_OK) {
        fprintf(stderr, "%s: %s\n", call, kv_status_string(status));
        exit(1);
    }
}
#define CHECK(call) check((call), #call)

/* Stands in for a model: k, v and q are functions of the sequence, position, head and dimension. */
static float element(int kind, int sequence, int position, int head, int dim) {
    return sinf(kind + 3.1f * sequence + 0.7f * position + 1.3f * head + 0.37f * dim * (kind + 1));
}

/* Rows [T, num_heads, DIM] of one kind for the step's new tokens. */
static kv_rows make_rows(const kv_plan *plan, int kind, int num_heads, float *data) {
    for (int s = 0; s < plan->num_sequences; s++)
        for (int t = plan->query_starts[s]; t < plan->query_starts[s + 1]; t++)
            for (int i = 0; i < num_heads * DIM; i++) {
                int position = plan->seq_lens[s] - plan->query_starts[s + 1] + t;
                data[t * num_heads * DIM + i] = element(kind, s, position, i / DIM, i % DIM);
            }
    return (kv_rows){.data = data,
                     .dtype = KV_DTYPE_F32,
                     .num_heads = num_heads,
                     .head_dim = DIM,
                     .token_stride = num_heads * DIM,
                     .head_stride = DIM};
}

/* Attention by its formula: one output element of a query that sees positions 0 .. position. */
static double expected(int sequence, int position, int query_head, int dim) {
    int head = query_head / (QUERY_HEADS / HEADS);
    double sum = 0, weighted = 0;
    for (int j = 0; j <= position; j++) {
        double score = 0;
        for (int d = 0; d < DIM; d++)
            score += (double)element(Q, sequence, position, query_head, d) *
                     element(K, sequence, j, head, d);
        double weight = exp(score / sqrt(DIM));
        sum += weight;
        weighted += weight * element(V, sequence, j, head, dim);
    }
    return weighted / sum;
}

static double max_error(const kv_plan *plan, const float *out) {
    double worst = 0;
    for (int s = 0; s < plan->num_sequences; s++)
        for (int t = plan->query_starts[s]; t < plan->query_starts[s + 1]; t++)
            for (int i = 0; i < QUERY_HEADS * DIM; i++) {
                int position = plan->seq_lens[s] - plan->query_starts[s + 1] + t;
                double want = expected(s, position, i / DIM, i % DIM);
                worst = fmax(worst, fabs(out[t * QUERY_HEADS * DIM + i] - want));
            }
    return worst;
}

int main(void) {
    kv_group_config group = {.block_size = BLOCK_SIZE, .num_blocks = NUM_BLOCKS};
    kv_layer_config layer = {.group = 0, .kv_source = 0};
    kv_cache_config config = {sizeof(config), 1, &group, 1, &layer};
    kv_cache *cache;
    CHECK(kv_cache_create(&config, &cache));

    kv_blocks blocks[2];
    for (int kind = K; kind <= V; kind++) {
        kv_blocks *b = &blocks[kind];
        CHECK(kv_blocks_init(b, NULL, KV_FORMAT_FP32, NUM_BLOCKS, HEADS, BLOCK_SIZE, DIM));
        CHECK(kv_memory_allocate((size_t)kv_blocks_nbytes(b), &b->data));
    }

    kv_sequence sequences[2];
    CHECK(kv_sequence_create(cache, &sequences[0]));
    CHECK(kv_sequence_create(cache, &sequences[1]));

    static const int32_t num_new[2][2] = {{5, 20}, {1, 1}}; /* two prompts, then a token each */
    static float k[MAX_NEW * HEADS * DIM], v[MAX_NEW * HEADS * DIM];
    static float q[MAX_NEW * QUERY_HEADS * DIM], out[MAX_NEW * QUERY_HEADS * DIM];
    double error = 0;
    for (int i = 0; i < 2; i++) {
        kv_step_entry entries[2] = {{sequences[0], num_new[i][0], NULL},
                                    {sequences[1], num_new[i][1], NULL}};
        kv_step *step;
        kv_plan plan;
        CHECK(kv_step_begin(cache, entries, 2, &step, NULL));
        CHECK(kv_step_get_plan(step, 0, &plan));

        kv_rows k_rows = make_rows(&plan, K, HEADS, k), v_rows = make_rows(&plan, V, HEADS, v);
        CHECK(kv_append(&plan, &k_rows, &blocks[K]));
        CHECK(kv_append(&plan, &v_rows, &blocks[V]));
        CHECK(kv_step_mark_appended(step, 0));

        kv_rows q_rows = make_rows(&plan, Q, QUERY_HEADS, q), out_rows = q_rows;
        kv_attend_options options = {.struct_size = sizeof(options), .scale = 1.0f / sqrtf(DIM)};
        out_rows.data = out;
        CHECK(kv_attend(&plan, &q_rows, &blocks[K], &blocks[V], &options, &out_rows, NULL));
        error = fmax(error, max_error(&plan, out));
        CHECK(kv_step_commit(step));
    }

    CHECK(kv_sequence_free(cache, sequences[0]));
    CHECK(kv_sequence_free(cache, sequences[1]));
    CHECK(kv_cache_check(cache, NULL, 0));
    CHECK(kv_cache_destroy(cache));
    for (int kind = K; kind <= V; kind++)
        kv_memory_free(blocks[kind].data, (size_t)kv_blocks_nbytes(&blocks[kind]));
    printf("kvcore %s: largest error %.1e\n", kv_version(), error);
    return error < 1e-6 ? 0 : 1;
}
