#include <cstring>

#include "checker.hpp"
#include "scheduler.hpp"

namespace emulator {

static void run(const AsyncCopy &copy) {
    if (copy.pred)
        memcpy(copy.dst, copy.src, copy.bytes);
    else
        memset(copy.dst, 0, copy.bytes);
}

void copy_async(void *dst, const void *src, u32 bytes, bool pred) {
    const uintptr_t addresses = (uintptr_t)dst | (pred ? (uintptr_t)src : 0);
    if (addresses & (bytes - 1))
        fail("cp.async: an address is not aligned to %u bytes", bytes);
    if (!is_shared(dst, bytes))
        fail("cp.async: the destination is not in the block's shared memory");
    checker_copy_begins(dst, bytes);
    if (pred)
        checker_global(src, bytes, false);
    const bool early = machine.order == Order::RANDOM && random_number() % 2;
    machine.current->open_group.push_back(
        {static_cast<char *>(dst), static_cast<const char *>(src), bytes, pred, early});
    if (early)
        run(machine.current->open_group.back());
}

void commit_copies() {
    Fiber *const self = machine.current;
    self->groups.push_back(std::move(self->open_group));
    self->open_group.clear();
}

void wait_copies(u32 most) {
    std::vector<std::vector<AsyncCopy>> &groups = machine.current->groups;
    while (groups.size() > most) {
        for (const AsyncCopy &copy : groups.front()) {
            checker_copy_ends(copy.dst, copy.bytes);
            if (!copy.early)
                run(copy);
        }
        groups.erase(groups.begin());
    }
}

} // namespace emulator
