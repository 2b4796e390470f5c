/* What the books and the smallest calls cost in C alone, timed from within: no Python around them.
 *
 * Each function fills arrays of seconds, one a call, and returns 0, or the status that stopped it. */
#define _POSIX_C_SOURCE 200809L

#include <kvcore/kvcore.h>

#include <stdlib.h>
#include <string.h>
#include <time.h>

#define BLOCK_SIZE 64

#define TRY(call)                \
    do {                         \
        const int status = call; \
        if (status != KV_OK)     \
            return status;       \
    } while (0)

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static kv_status new_cache(int32_t num_blocks, kv_cache **out) {
    const kv_group_config group = {.block_size = BLOCK_SIZE, .num_blocks = num_blocks};
    const kv_layer_config layer = {.group = 0, .kv_source = 0};
    const kv_cache_config config = {.struct_size = sizeof(config),
                                    .num_groups = 1,
                                    .groups = &group,
                                    .num_layers = 1,
                                    .layers = &layer};
    return kv_cache_create(&config, out);
}

static int take_step(kv_cache *cache, const kv_step_entry *entries, int32_t count, double *begin,
                     double *commit) {
    kv_step *step;
    const double start = now();
    TRY(kv_step_begin(cache, entries, count, &step, NULL));
    const double begun = now();
    TRY(kv_step_mark_appended(step, 0));
    const double ready = now();
    TRY(kv_step_commit(step));
    *commit = now() - ready;
    *begin = begun - start;
    return KV_OK;
}

/* One text of `context` tokens; the others share it, but for up to a block, so that each step finds
 * some at a new block. */
static int fill(kv_cache *cache, kv_step_entry *entries, int32_t count, int32_t context,
                const int32_t *tokens) {
    double unused;
    TRY(kv_sequence_create(cache, &entries[0].sequence));
    entries[0].num_new = context;
    entries[0].tokens = tokens;
    TRY(take_step(cache, entries, 1, &unused, &unused));
    for (int32_t i = 1; i < count; i++)
        TRY(kv_sequence_fork(cache, entries[0].sequence, context - i % BLOCK_SIZE,
                             &entries[i].sequence));
    for (int32_t i = 0; i < count; i++) {
        entries[i].num_new = 1;
        entries[i].tokens = tokens ? &tokens[i] : NULL;
    }
    return KV_OK;
}

static int time_steps(kv_cache *cache, kv_step_entry *entries, int32_t count, int32_t context,
                      const int32_t *tokens, int32_t repeats, double *begins, double *commits) {
    TRY(fill(cache, entries, count, context, tokens));
    TRY(take_step(cache, entries, count, begins, commits)); /* copies the blocks that are shared */
    for (int32_t i = 0; i < repeats; i++)
        TRY(take_step(cache, entries, count, &begins[i], &commits[i]));
    return KV_OK;
}

/* Decode steps of `count` sequences of `context` tokens. */
int control_steps(int32_t count, int32_t context, int32_t with_ids, int32_t repeats, double *begins,
                  double *commits) {
    kv_cache *cache;
    const int32_t own = repeats / BLOCK_SIZE + 3;
    TRY(new_cache(context / BLOCK_SIZE + 1 + count * own, &cache));
    const size_t num_ids = (size_t)(context > count ? context : count);
    kv_step_entry *entries = calloc((size_t)count, sizeof(*entries));
    int32_t *tokens = malloc(num_ids * sizeof(*tokens));
    int status = KV_ERR_NO_MEMORY;
    if (entries && tokens) {
        for (size_t i = 0; i < num_ids; i++)
            tokens[i] = (int32_t)i;
        status = time_steps(cache, entries, count, context, with_ids ? tokens : NULL, repeats,
                            begins, commits);
    }
    free(entries);
    free(tokens);
    kv_cache_destroy(cache);
    return status;
}

/* Appends K and V of one token, then attends to it: 1 head of 16. */
int control_calls(int32_t repeats, double *appends, double *attends) {
    static float k[BLOCK_SIZE * 16], v[BLOCK_SIZE * 16];
    float row[16] = {1.0f}, out[16];
    const int32_t starts[2] = {0, 1}, lengths[1] = {1}, slots[1] = {0}, blocks[1] = {0};
    const int32_t *block_rows[1] = {blocks};
    const kv_plan plan = {.block_size = BLOCK_SIZE,
                          .num_sequences = 1,
                          .num_tokens = 1,
                          .max_new = 1,
                          .query_starts = starts,
                          .seq_lens = lengths,
                          .slots = slots,
                          .block_rows = block_rows};
    const kv_rows rows = {.data = row,
                          .dtype = KV_DTYPE_F32,
                          .num_heads = 1,
                          .head_dim = 16,
                          .token_stride = 16,
                          .head_stride = 16};
    kv_rows out_rows = rows;
    out_rows.data = out;
    const kv_attend_options options = {.struct_size = sizeof(options), .scale = 0.25f};
    kv_blocks k_blocks, v_blocks;
    TRY(kv_blocks_init(&k_blocks, k, KV_FORMAT_FP32, 1, 1, BLOCK_SIZE, 16));
    TRY(kv_blocks_init(&v_blocks, v, KV_FORMAT_FP32, 1, 1, BLOCK_SIZE, 16));
    for (int32_t i = 0; i < repeats; i++) {
        const double start = now();
        TRY(kv_append(&plan, &rows, &k_blocks));
        TRY(kv_append(&plan, &rows, &v_blocks));
        const double appended = now();
        TRY(kv_attend(&plan, &rows, &k_blocks, &v_blocks, &options, &out_rows, NULL));
        attends[i] = now() - appended;
        appends[i] = appended - start;
    }
    return KV_OK;
}
