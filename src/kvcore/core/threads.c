#if !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L /* pthread_sigmask */
#endif

#include "threads.h"

#include "cpu_limits.h"

#include "kvcore.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>

/* How often a waiting thread looks before it sleeps: one or two hundred microseconds. The calls of
 * a decode step follow each other faster, and waking a sleeper takes longer than most of them. */
enum { SPINS = 4000 };

/* A worker of a part number; it lives until the process ends. */
typedef struct worker {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    atomic_uint ticket; /* goes up by one for each part it is given */
    atomic_int sleeping;
} worker;

static struct {
    atomic_flag busy;
    int32_t num_workers;
    worker *workers[KV_MAX_THREADS]; /* [p] runs part p; none for part 0 */
    kv_part_function function;
    void *context;
    int max_spins;
    atomic_int pending; /* parts of workers that are not done */
    pthread_mutex_t lock;
    pthread_cond_t done;
    atomic_int waiting; /* whether the caller sleeps on `done` */
} pool = {
    .busy = ATOMIC_FLAG_INIT, .lock = PTHREAD_MUTEX_INITIALIZER, .done = PTHREAD_COND_INITIALIZER};

static atomic_int num_threads; /* 0: the default */
static int32_t default_threads;
static int32_t usable_cpus;
static pthread_once_t limits_once = PTHREAD_ONCE_INIT;
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;

/* ---- how many -------------------------------------------------------------------------------- */

static void find_limits(void) {
    usable_cpus = kv_usable_cpus();
    default_threads = usable_cpus < KV_MAX_THREADS ? usable_cpus : KV_MAX_THREADS;
    const char *text = getenv("KVCORE_NUM_THREADS");
    if (text) {
        char *end;
        const long wanted = strtol(text, &end, 10);
        if (*text && *end == '\0' && wanted > 0 && wanted < default_threads)
            default_threads = (int32_t)wanted;
    }
}

kv_status kv_set_num_threads(int32_t count, int32_t oversubscribe) {
    if (count < 0 || count > KV_MAX_THREADS)
        return KV_ERR_RANGE;
    pthread_once(&limits_once, find_limits);
    const int32_t limit = oversubscribe ? KV_MAX_THREADS : usable_cpus;
    atomic_store(&num_threads, count < limit ? count : limit);
    return KV_OK;
}

int32_t kv_get_num_threads(void) {
    const int32_t count = atomic_load(&num_threads);
    pthread_once(&limits_once, find_limits);
    return count ? count : default_threads;
}

int32_t kv_num_parts(int64_t work, int64_t smallest) {
    const int64_t parts = work / smallest;
    const int32_t threads = kv_get_num_threads();
    return parts < 1 ? 1 : parts < threads ? (int32_t)parts : threads;
}

int64_t kv_part_begin(int64_t count, int32_t part, int32_t num_parts) {
    /* in two steps, so that nothing overflows */
    return count / num_parts * part + count % num_parts * part / num_parts;
}

/* ---- waiting --------------------------------------------------------------------------------- */

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Returns when the worker's ticket is no longer `seen`. The sleeper sets `sleeping` and then looks
 * at the ticket; the waker sets the ticket and then looks at `sleeping`: one of them sees the
 * other. */
static void wait_for_ticket(worker *self, unsigned seen, int max_spins) {
    for (int i = 0; i < max_spins; i++) {
        if (atomic_load(&self->ticket) != seen)
            return;
        relax();
    }
    pthread_mutex_lock(&self->lock);
    atomic_store(&self->sleeping, 1);
    while (atomic_load(&self->ticket) == seen)
        pthread_cond_wait(&self->wake, &self->lock);
    atomic_store(&self->sleeping, 0);
    pthread_mutex_unlock(&self->lock);
}

static void give_ticket(worker *to) {
    atomic_fetch_add(&to->ticket, 1);
    if (atomic_load(&to->sleeping)) {
        pthread_mutex_lock(&to->lock);
        pthread_cond_signal(&to->wake);
        pthread_mutex_unlock(&to->lock);
    }
}

static void wait_until_done(void) {
    for (int i = 0; i < pool.max_spins; i++) {
        if (atomic_load(&pool.pending) == 0)
            return;
        relax();
    }
    pthread_mutex_lock(&pool.lock);
    atomic_store(&pool.waiting, 1);
    while (atomic_load(&pool.pending) != 0)
        pthread_cond_wait(&pool.done, &pool.lock);
    atomic_store(&pool.waiting, 0);
    pthread_mutex_unlock(&pool.lock);
}

static void finish_part(void) {
    if (atomic_fetch_sub(&pool.pending, 1) == 1 && atomic_load(&pool.waiting)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_signal(&pool.done);
        pthread_mutex_unlock(&pool.lock);
    }
}

/* ---- workers --------------------------------------------------------------------------------- */

typedef struct start {
    worker *self;
    int32_t part;
} start;

static void *run_worker(void *argument) {
    const start given = *(start *)argument;
    free(argument);
    int max_spins = 0;
    for (unsigned seen = 0;; seen++) {
        wait_for_ticket(given.self, seen, max_spins);
        max_spins = pool.max_spins; /* before finish_part: then the pool may serve another call */
        pool.function(pool.context, given.part);
        finish_part();
    }
    return NULL;
}

/* Workers block all signals, so that these interrupt the threads that wait for them. */
static int start_thread(start *argument) {
    pthread_t thread;
    pthread_attr_t attributes;
    sigset_t all, previous;
    if (pthread_attr_init(&attributes) != 0)
        return 0;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &previous);
    const int failed = pthread_create(&thread, &attributes, run_worker, argument);
    pthread_sigmask(SIG_SETMASK, &previous, NULL);
    pthread_attr_destroy(&attributes);
    return !failed;
}

/* Starts the worker of the next part number; 0 when the system gives no thread. */
static int add_worker(void) {
    worker *self = calloc(1, sizeof(*self));
    start *argument = malloc(sizeof(*argument));
    const int32_t part = pool.num_workers + 1;
    if (self && argument) {
        pthread_mutex_init(&self->lock, NULL);
        pthread_cond_init(&self->wake, NULL);
        *argument = (start){self, part};
        if (start_thread(argument)) {
            pool.workers[part] = self;
            pool.num_workers = part;
            return 1;
        }
    }
    free(self);
    free(argument);
    return 0;
}

/* Only the forking thread lives on in a child: it starts with an empty pool. The old workers' few
 * bytes stay allocated, since a lock that another thread held cannot be destroyed. */
static void reset_after_fork(void) {
    pool.num_workers = 0;
    atomic_store(&pool.pending, 0);
    atomic_store(&pool.waiting, 0);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.done, NULL);
    atomic_flag_clear(&pool.busy);
}

static void watch_forks(void) { pthread_atfork(NULL, NULL, reset_after_fork); }

/* ---- running --------------------------------------------------------------------------------- */

static void run_in_caller(int32_t begin, int32_t end, kv_part_function function, void *context) {
    for (int32_t part = begin; part < end; part++)
        function(context, part);
}

void kv_run_parts(int32_t num_parts, kv_part_function function, void *context) {
    if (num_parts <= 1 || atomic_flag_test_and_set(&pool.busy)) {
        run_in_caller(0, num_parts, function, context);
        return;
    }
    pthread_once(&limits_once, find_limits);
    pthread_once(&fork_once, watch_forks);
    while (pool.num_workers < num_parts - 1 && pool.num_workers < KV_MAX_THREADS - 1)
        if (!add_worker())
            break;
    const int32_t shared = pool.num_workers < num_parts - 1 ? pool.num_workers + 1 : num_parts;
    pool.function = function;
    pool.context = context;
    /* With more threads than CPUs, spinning takes time from the thread that is waited for. */
    pool.max_spins = shared <= usable_cpus ? SPINS : 0;
    atomic_store(&pool.pending, shared - 1);
    for (int32_t part = 1; part < shared; part++)
        give_ticket(pool.workers[part]);
    function(context, 0);
    run_in_caller(shared, num_parts, function, context);
    wait_until_done();
    atomic_flag_clear(&pool.busy);
}
