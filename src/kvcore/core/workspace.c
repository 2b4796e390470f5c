#include "workspace.h"

#include <pthread.h>
#include <stdlib.h>

enum { MAX_KEPT = 4 }; /* more calls than this at once allocate and free their own */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static kv_workspace *kept;
static int num_kept;
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;

static void take_lock(void) { pthread_mutex_lock(&lock); }

static void give_lock(void) { pthread_mutex_unlock(&lock); }

/* A child of fork must not find the list locked by a thread that it does not have. */
static void watch_forks(void) { pthread_atfork(take_lock, give_lock, give_lock); }

kv_workspace *kv_workspace_acquire(void) {
    pthread_once(&fork_once, watch_forks);
    take_lock();
    kv_workspace *workspace = kept;
    if (workspace) {
        kept = workspace->next;
        num_kept--;
    }
    give_lock();
    return workspace ? workspace : calloc(1, sizeof(*workspace));
}

void kv_workspace_release(kv_workspace *workspace) {
    take_lock();
    const int keep = num_kept < MAX_KEPT;
    if (keep) {
        workspace->next = kept;
        kept = workspace;
        num_kept++;
    }
    give_lock();
    if (keep)
        return;
    for (int i = 0; i < KV_WORKSPACE_BUFFERS; i++)
        kv_memory_free(workspace->buffers[i], workspace->sizes[i]);
    free(workspace);
}

void *kv_workspace_reserve(kv_workspace *workspace, int buffer, size_t nbytes) {
    if (nbytes <= workspace->sizes[buffer])
        return workspace->buffers[buffer];
    kv_memory_free(workspace->buffers[buffer], workspace->sizes[buffer]);
    workspace->buffers[buffer] = NULL;
    workspace->sizes[buffer] = 0;
    const size_t grown = nbytes + nbytes / 4; /* so that a growing context allocates rarely */
    if (kv_memory_allocate(grown, &workspace->buffers[buffer]) != KV_OK)
        return NULL;
    workspace->sizes[buffer] = grown;
    return workspace->buffers[buffer];
}
