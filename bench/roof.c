/* What the machine can do: read memory, and multiply and add.
 *
 * Compiled by roof.py for the CPU that it runs on. The functions share their work with threads that
 * they start, each on a CPU of its own, and return the seconds from when all were ready until all
 * were done: what starting threads takes is not counted. *waited becomes the seconds, summed over the threads, that
 * they were ready to run and had no CPU. A negative result means that the system gave no thread. */
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* pthread_setaffinity_np */
#endif

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <time.h>

#if defined(__linux__)
#include <sched.h>
#endif

#if defined(__AVX512F__)
enum { VECTOR_BYTES = 64 };
#elif defined(__AVX__)
enum { VECTOR_BYTES = 32 };
#else
enum { VECTOR_BYTES = 16 };
#endif

typedef float vector __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));

enum { LANES = VECTOR_BYTES / 4, CHAINS = 12, STREAMS = 8, MAX_THREADS = 256 };

typedef struct part part;
typedef float (*part_function)(const part *self);

/* What the threads of one call share. */
typedef struct team {
    part_function function;
    int num_threads;
    const int *cpus; /* [num_threads], or NULL: wherever the system puts them; the caller, which
                        does the first part, stays where it is */
    const float *const *buffers;
    const size_t *lengths; /* floats of each buffer */
    int num_buffers;
    int64_t iterations;
    atomic_int ready, go, abandoned;
} team;

struct part {
    team *of;
    int number;
    float result; /* kept, so that the work cannot be left out */
    double end, waited;
};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void stay_on(const int *cpu) {
#if defined(__linux__)
    if (cpu) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(*cpu, &set);
        pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
    }
#else
    (void)cpu;
#endif
}

/* Seconds that this thread has stood runnable without a CPU; 0 where the system does not tell. */
static double waited_so_far(void) {
    unsigned long long ran = 0, waited = 0;
    FILE *file = fopen("/proc/thread-self/schedstat", "r");
    if (file) {
        if (fscanf(file, "%llu %llu", &ran, &waited) != 2)
            waited = 0;
        fclose(file);
    }
    return 1e-9 * (double)waited;
}

static void *run_part(void *argument) {
    part *self = argument;
    team *of = self->of;
    stay_on(of->cpus ? &of->cpus[self->number] : NULL);
    const double before = waited_so_far();
    atomic_fetch_add(&of->ready, 1);
    while (!atomic_load(&of->go)) /* every thread has a CPU of its own, so spinning is short */
        ;
    if (atomic_load(&of->abandoned))
        return NULL;
    self->result = of->function(self);
    self->end = now();
    self->waited = waited_so_far() - before;
    return NULL;
}

static double run(team *of, double *waited) {
    pthread_t threads[MAX_THREADS];
    part parts[MAX_THREADS];
    if (of->num_threads < 1 || of->num_threads > MAX_THREADS)
        return -1.0;
    int started = 1;
    for (; started < of->num_threads; started++) {
        parts[started] = (part){.of = of, .number = started};
        if (pthread_create(&threads[started], NULL, run_part, &parts[started]) != 0)
            break;
    }
    atomic_store(&of->abandoned, started < of->num_threads);
    const double before = waited_so_far();
    const struct timespec moment = {0, 20000};
    while (atomic_load(&of->ready) < started - 1)
        nanosleep(&moment, NULL);
    const double begin = now();
    atomic_store(&of->go, 1);
    parts[0] = (part){.of = of, .number = 0};
    if (!atomic_load(&of->abandoned))
        parts[0].result = of->function(&parts[0]);
    double end = now();
    *waited = waited_so_far() - before;
    for (int i = 1; i < started; i++) {
        pthread_join(threads[i], NULL);
        end = parts[i].end > end ? parts[i].end : end;
        *waited += parts[i].waited;
    }
    return started == of->num_threads ? end - begin : -1.0;
}

static float sum_lanes(const vector *sums, int count) {
    float total = 0.0f;
    for (int i = 0; i < count; i++)
        for (int lane = 0; lane < LANES; lane++)
            total += sums[i][lane];
    return total;
}

/* A thread's share of every buffer, as STREAMS independent sums over whole vectors. */
static float read_part(const part *self) {
    const team *of = self->of;
    const size_t step = (size_t)LANES * STREAMS;
    vector sums[STREAMS] = {{0}};
    for (int b = 0; b < of->num_buffers; b++) {
        const size_t share = of->lengths[b] / (size_t)of->num_threads / step * step;
        const float *p = of->buffers[b] + (size_t)self->number * share;
        for (const float *end = p + share; p < end; p += step)
            for (int s = 0; s < STREAMS; s++)
                sums[s] += *(const vector *)(p + s * LANES);
    }
    return sum_lanes(sums, STREAMS);
}

static float fma_part(const part *self) {
    vector chains[CHAINS];
    const vector scale = {0}, half = scale + 0.5f, one = scale + 1.0f;
    for (int c = 0; c < CHAINS; c++)
        chains[c] = scale + (float)c;
    for (int64_t i = 0; i < self->of->iterations; i++)
        for (int c = 0; c < CHAINS; c++)
            chains[c] = chains[c] * half + one;
    return sum_lanes(chains, CHAINS);
}

#if defined(__AVX512BF16__)
#include <immintrin.h>

static float dot_part(const part *self) {
    __m512 chains[CHAINS];
    const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f003f00); /* pairs of 0.5 */
    for (int c = 0; c < CHAINS; c++)
        chains[c] = _mm512_set1_ps((float)c);
    for (int64_t i = 0; i < self->of->iterations; i++)
        for (int c = 0; c < CHAINS; c++)
            chains[c] = _mm512_dpbf16_ps(chains[c], a, a);
    return sum_lanes((const vector *)chains, CHAINS);
}

/* Seconds in which each of num_threads threads does iterations * 2 * roof_flops() flops, by dot
 * products of bf16 pairs. */
double roof_dot(int64_t iterations, int num_threads, const int *cpus, double *waited) {
    team of = {
        .function = dot_part, .num_threads = num_threads, .cpus = cpus, .iterations = iterations};
    return run(&of, waited);
}
#endif

/* Seconds in which num_threads threads read the buffers once. */
double roof_read(const float *const *buffers, const size_t *lengths, int num_buffers,
                 int num_threads, const int *cpus, double *waited) {
    team of = {.function = read_part,
               .num_threads = num_threads,
               .cpus = cpus,
               .buffers = buffers,
               .lengths = lengths,
               .num_buffers = num_buffers};
    return run(&of, waited);
}

/* Seconds in which each of num_threads threads does iterations * roof_flops() flops. */
double roof_fma(int64_t iterations, int num_threads, const int *cpus, double *waited) {
    team of = {
        .function = fma_part, .num_threads = num_threads, .cpus = cpus, .iterations = iterations};
    return run(&of, waited);
}

int roof_flops(void) { return 2 * LANES * CHAINS; }
