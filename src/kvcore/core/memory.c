#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* MAP_ANONYMOUS, madvise */
#endif

#include "kvcore.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { ALIGNMENT = 64 };

static const size_t large_page = (size_t)2 << 20;

/* From one large page on, memory is mapped, so that it starts on a large page and the system zeroes
 * a page when it is first touched. */
static int is_mapped(size_t nbytes) { return nbytes >= large_page; }

static size_t mapped_size(size_t nbytes) { return (nbytes + large_page - 1) & ~(large_page - 1); }

static void *map(size_t nbytes) {
    const size_t size = mapped_size(nbytes), reserved = size + large_page;
    char *start = mmap(NULL, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED)
        return NULL;
    const size_t before = (large_page - (uintptr_t)start % large_page) % large_page;
    char *aligned = start + before;
    if (before > 0)
        munmap(start, before);
    munmap(aligned + size, reserved - before - size);
#if defined(MADV_HUGEPAGE)
    madvise(aligned, size, MADV_HUGEPAGE); /* a wish: failing changes nothing but speed */
#endif
    return aligned;
}

static void *allocate_small(size_t nbytes) {
    void *memory = NULL;
    if (posix_memalign(&memory, ALIGNMENT, nbytes) != 0)
        return NULL;
    return memset(memory, 0, nbytes);
}

kv_status kv_memory_allocate(size_t nbytes, void **out) {
    if (!out)
        return KV_ERR_NULL;
    if (nbytes == 0)
        return KV_ERR_VALUE;
    if (nbytes > SIZE_MAX / 2 - 2 * large_page)
        return KV_ERR_OVERFLOW;
    void *memory = is_mapped(nbytes) ? map(nbytes) : allocate_small(nbytes);
    if (!memory)
        return KV_ERR_NO_MEMORY;
    *out = memory;
    return KV_OK;
}

void kv_memory_free(void *memory, size_t nbytes) {
    if (!memory)
        return;
    if (is_mapped(nbytes))
        munmap(memory, mapped_size(nbytes));
    else
        free(memory);
}
