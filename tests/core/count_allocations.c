/* Counts what libkvcore asks the system for while sequences decode: 4 of up to 1,200 tokens that share
 * a prefix, and a prompt beside them, on 3 threads. This program's malloc and mmap stand in for the C
 * library's, in the library as well. Prints the calls of the first step, and of the steps after it:
 * those of append and attend, and all. */
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* syscall */
#endif

#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kvcore.h"

static atomic_int num_allocations;

extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t count, size_t size);
extern void *__libc_realloc(void *memory, size_t size);
extern void *__libc_memalign(size_t alignment, size_t size);

void *malloc(size_t size) {
    num_allocations++;
    return __libc_malloc(size);
}

void *calloc(size_t count, size_t size) {
    num_allocations++;
    return __libc_calloc(count, size);
}

void *realloc(void *memory, size_t size) {
    num_allocations++;
    return __libc_realloc(memory, size);
}

int posix_memalign(void **memory, size_t alignment, size_t size) {
    num_allocations++;
    *memory = __libc_memalign(alignment, size);
    return *memory ? 0 : ENOMEM;
}

void *mmap(void *address, size_t size, int protection, int flags, int file, off_t offset) {
    num_allocations++;
    return (void *)syscall(SYS_mmap, address, size, protection, flags, file, offset);
}

enum {
    SEQUENCES = 5,
    STORED = 1024,
    STEPS = 150,
    LAYERS = 3,
    HEADS = 2,
    GROUP = 3,
    DIM = 64,
    BLOCK = 16,
    PROMPT = 60,
    BLOCKS = 4 * (STORED + SEQUENCES * (STEPS + PROMPT)) / BLOCK,
    ROW = HEADS * GROUP * DIM
};

static void check(kv_status status, const char *call) {
    if (status != KV_OK) {
        fprintf(stderr, "%s: %s\n", call, kv_status_string(status));
        exit(1);
    }
}
#define CHECK(call) check((call), #call)

static float numbers[STORED * ROW], out[STORED * ROW];

static kv_rows rows_of(float *data, int32_t num_heads) {
    return (kv_rows){.data = data,
                     .dtype = KV_DTYPE_F32,
                     .num_heads = num_heads,
                     .head_dim = DIM,
                     .token_stride = num_heads * DIM,
                     .head_stride = DIM};
}

/* One step; returns what its appends and attends allocated. */
static int run(kv_cache *cache, const kv_step_entry *entries, int32_t count,
               kv_blocks blocks[][2]) {
    kv_step *step;
    kv_plan plan;
    const kv_attend_options options = {.struct_size = sizeof(options), .scale = 0.125f};
    const kv_rows kv = rows_of(numbers, HEADS), q = rows_of(numbers, HEADS * GROUP);
    const kv_rows result = rows_of(out, HEADS * GROUP);
    CHECK(kv_step_begin(cache, entries, count, &step, NULL));
    CHECK(kv_step_get_plan(step, 0, &plan));
    const int before = num_allocations;
    for (int32_t layer = 0; layer < LAYERS; layer++) {
        for (int i = 0; i < 2; i++) {
            CHECK(kv_copy_blocks(&plan, &blocks[layer][i]));
            CHECK(kv_append(&plan, &kv, &blocks[layer][i]));
        }
        CHECK(kv_step_mark_appended(step, layer));
        CHECK(kv_attend(&plan, &q, &blocks[layer][0], &blocks[layer][1], &options, &result, NULL));
    }
    const int allocated = num_allocations - before;
    CHECK(kv_step_commit(step));
    return allocated;
}

int main(void) {
    const kv_group_config group = {.block_size = BLOCK, .num_blocks = BLOCKS};
    kv_layer_config layers[LAYERS];
    kv_blocks blocks[LAYERS][2];
    kv_cache *cache;
    kv_sequence sequences[SEQUENCES];
    for (int32_t layer = 0; layer < LAYERS; layer++) {
        layers[layer] = (kv_layer_config){.kv_source = layer};
        for (int i = 0; i < 2; i++) {
            kv_blocks *b = &blocks[layer][i];
            CHECK(kv_blocks_init(b, NULL, KV_FORMAT_BF16, BLOCKS, HEADS, BLOCK, DIM));
            CHECK(kv_memory_allocate((size_t)kv_blocks_nbytes(b), &b->data));
        }
    }
    const kv_cache_config config = {sizeof(config), 1, &group, LAYERS, layers};
    CHECK(kv_set_num_threads(3, 1));
    CHECK(kv_cache_create(&config, &cache));
    CHECK(kv_sequence_create(cache, &sequences[0]));
    kv_step_entry entries[SEQUENCES] = {{sequences[0], STORED, NULL}};
    const int first = run(cache, entries, 1, blocks);
    for (int i = 1; i < SEQUENCES; i++)
        CHECK(
            kv_sequence_fork(cache, sequences[0], i == SEQUENCES - 1 ? 0 : STORED, &sequences[i]));
    for (int i = 0; i < SEQUENCES; i++)
        entries[i] = (kv_step_entry){sequences[i], i == SEQUENCES - 1 ? PROMPT : 1, NULL};
    const int joined =
        run(cache, entries, SEQUENCES, blocks); /* forks and shares for the first time */
    const int start = num_allocations;
    int later = 0;
    for (int i = 0; i < STEPS; i++) {
        entries[SEQUENCES - 1].num_new = i % 10 == 0 ? PROMPT : 1;
        later += run(cache, entries, SEQUENCES, blocks);
    }
    printf("%d %d %d\n", first + joined, later, num_allocations - start);
    return 0;
}
