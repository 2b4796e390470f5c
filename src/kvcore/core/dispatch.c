#include "dispatch.h"

#include "cpu_features.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* Best first, where the CPU is good at all. */
static const kv_kernels *const compiled[] = {
#if defined(__x86_64__)
#ifndef KV_WITHOUT_AVX512_BF16
    &kv_kernels_avx512_bf16,
#endif
#ifndef KV_WITHOUT_AVX512_VNNI
    &kv_kernels_avx512_vnni,
#endif
#ifndef KV_WITHOUT_AVX512
    &kv_kernels_avx512,
#endif
#ifndef KV_WITHOUT_AVX2
    &kv_kernels_avx2,
#endif
#endif
#if defined(__aarch64__)
    &kv_kernels_neon,
#endif
    &kv_kernels_scalar,
};

enum { NUM_COMPILED = sizeof(compiled) / sizeof(compiled[0]) };

static const struct {
    const char *isa, *feature;
} needs[] = {
    {"avx512_bf16", "avx512_bf16"}, /* and all of avx512_vnni */
    {"avx512_vnni", "avx512_vnni"}, /* and all of avx512 */
    {"avx512_vnni", "avx512_vbmi"},
    {"avx512", "avx512f"},
    {"avx512", "avx512bw"},
    {"avx512", "avx512dq"},
    {"avx512", "avx512vl"},
    {"avx512", "avx2"},
    {"avx512", "fma"},
    {"avx512", "f16c"},
    {"avx2", "avx2"},
    {"avx2", "fma"},
    {"avx2", "f16c"},
    {"neon", "neon"},
};

static const char *available[NUM_COMPILED + 1];
static _Atomic(const kv_kernels *) active;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static int cpu_runs(const char *isa) {
    if (strcmp(isa, "avx512_bf16") == 0 && !cpu_runs("avx512_vnni"))
        return 0;
    if (strcmp(isa, "avx512_vnni") == 0 && !cpu_runs("avx512"))
        return 0;
    for (size_t i = 0; i < sizeof(needs) / sizeof(needs[0]); i++)
        if (strcmp(needs[i].isa, isa) == 0 && !kv_cpu_has(needs[i].feature))
            return 0;
    return 1;
}

/* NULL when it is not available. */
static const kv_kernels *find(const char *isa) {
    for (int i = 0; i < NUM_COMPILED; i++)
        if (strcmp(compiled[i]->isa, isa) == 0 && cpu_runs(isa))
            return compiled[i];
    return NULL;
}

static void choose(void) {
    int count = 0;
    for (int i = 0; i < NUM_COMPILED; i++)
        if (cpu_runs(compiled[i]->isa))
            available[count++] = compiled[i]->isa;
    if (strcmp(available[0], "avx512_bf16") == 0 && !kv_cpu_dots_fast()) {
        const char *slower = available[0];
        available[0] = available[1];
        available[1] = slower;
    }
    const char *wanted = getenv("KVCORE_ISA");
    atomic_store(&active, find(wanted && *wanted ? wanted : available[0]));
}

const kv_kernels *kv_active_kernels(void) {
    pthread_once(&once, choose);
    return atomic_load_explicit(&active, memory_order_acquire);
}

const char *kv_get_isa(void) {
    const kv_kernels *kernels = kv_active_kernels();
    return kernels ? kernels->isa : "none";
}

kv_status kv_set_isa(const char *name) {
    if (!name)
        return KV_ERR_NULL;
    pthread_once(&once, choose);
    const kv_kernels *kernels = find(name);
    if (!kernels)
        return KV_ERR_UNSUPPORTED;
    atomic_store(&active, kernels);
    return KV_OK;
}

const char *const *kv_available_isas(void) {
    pthread_once(&once, choose);
    return available;
}
