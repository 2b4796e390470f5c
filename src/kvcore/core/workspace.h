/* Scratch memory for data-plane calls. A workspace belongs to one call at a time and goes back to a
 * free list, so that a call allocates only when it needs more than the calls before it. */
#ifndef KVCORE_CORE_WORKSPACE_H
#define KVCORE_CORE_WORKSPACE_H

#include "kvcore.h"

enum { KV_WORKSPACE_BUFFERS = 3 };

typedef struct kv_workspace {
    struct kv_workspace *next;
    void *buffers[KV_WORKSPACE_BUFFERS];
    size_t sizes[KV_WORKSPACE_BUFFERS];
} kv_workspace;

/* NULL when the system gives no memory. */
kv_workspace *kv_workspace_acquire(void);
void kv_workspace_release(kv_workspace *workspace);

/* At least `nbytes` bytes, aligned to 64; what the buffer held is lost. NULL without memory. */
void *kv_workspace_reserve(kv_workspace *workspace, int buffer, size_t nbytes);

#endif
