#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* sched_getaffinity */
#endif

#include "cpu_limits.h"

#include <unistd.h>

static int32_t online_cpus(void) {
    const long count = sysconf(_SC_NPROCESSORS_ONLN);
    return count > 0 && count < INT32_MAX ? (int32_t)count : 1;
}

#if defined(__linux__)

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PATH_SIZE = 4200 };

static int32_t affinity_cpus(void) {
    /* A mask that is too small for the kernel's makes the call fail: try larger ones. */
    for (int32_t count = 1024; count <= 1024 * 1024; count *= 4) {
        cpu_set_t *set = CPU_ALLOC((size_t)count);
        if (!set)
            break;
        const size_t size = CPU_ALLOC_SIZE((size_t)count);
        const int found = sched_getaffinity(0, size, set) == 0 ? CPU_COUNT_S(size, set) : 0;
        CPU_FREE(set);
        if (found > 0)
            return found;
    }
    return online_cpus();
}

/* CPUs that a quota in microseconds a period comes to, rounded up; INT32_MAX without a quota. */
static int32_t quota_cpus(long long quota, long long period) {
    if (quota <= 0 || period <= 0)
        return INT32_MAX;
    const long long cpus = (quota + period - 1) / period;
    return cpus < INT32_MAX ? (int32_t)cpus : INT32_MAX;
}

static long long read_number(const char *directory, const char *path, const char *name) {
    char file[PATH_SIZE];
    long long value = -1;
    if (snprintf(file, sizeof(file), "%s%s/%s", directory, path, name) >= (int)sizeof(file))
        return -1;
    FILE *stream = fopen(file, "re");
    if (!stream)
        return -1;
    if (fscanf(stream, "%lld", &value) != 1)
        value = -1;
    fclose(stream);
    return value;
}

/* cgroup 2: cpu.max holds "quota period" or "max period". */
static int32_t unified_cpus(const char *directory, const char *path) {
    char file[PATH_SIZE];
    long long quota = 0, period = 0;
    if (snprintf(file, sizeof(file), "%s%s/cpu.max", directory, path) >= (int)sizeof(file))
        return INT32_MAX;
    FILE *stream = fopen(file, "re");
    if (!stream)
        return INT32_MAX;
    const int fields = fscanf(stream, "%lld %lld", &quota, &period);
    fclose(stream);
    return fields == 2 ? quota_cpus(quota, period) : INT32_MAX;
}

static int32_t legacy_cpus(const char *directory, const char *path) {
    return quota_cpus(read_number(directory, path, "cpu.cfs_quota_us"),
                      read_number(directory, path, "cpu.cfs_period_us"));
}

/* The tightest quota of a cgroup and of those above it. In a container the path may be the host's
 * and not exist; the walk then ends at the mount point, which is the container's own cgroup. */
static int32_t tightest(int32_t (*cpus)(const char *, const char *), const char *directory,
                        char *path) {
    int32_t limit = INT32_MAX;
    for (;;) {
        const int32_t here = cpus(directory, path);
        if (here < limit)
            limit = here;
        char *slash = strrchr(path, '/');
        if (!slash)
            return limit;
        *slash = '\0';
    }
}

/* Whether the comma-separated `list` of controllers has "cpu". */
static int has_cpu_controller(char *list) {
    char *state = NULL;
    for (char *name = strtok_r(list, ",", &state); name; name = strtok_r(NULL, ",", &state))
        if (strcmp(name, "cpu") == 0)
            return 1;
    return 0;
}

/* The lines of /proc/self/cgroup are "0::path" (cgroup 2) or "number:controllers:path". */
int32_t kv_cgroup_cpus(const char *root) {
    char line[PATH_SIZE], file[PATH_SIZE], unified[PATH_SIZE], legacy[PATH_SIZE];
    int32_t limit = INT32_MAX;
    if (snprintf(legacy, sizeof(legacy), "%s/sys/fs/cgroup/cpu", root) >= (int)sizeof(legacy))
        return limit;
    snprintf(unified, sizeof(unified), "%s/sys/fs/cgroup", root);
    snprintf(file, sizeof(file), "%s/proc/self/cgroup", root);
    FILE *stream = fopen(file, "re");
    if (!stream)
        return limit;
    while (fgets(line, sizeof(line), stream)) {
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':');
        char *path = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!path)
            continue;
        controllers++;
        *path++ = '\0';
        int32_t here = INT32_MAX;
        if (*controllers == '\0')
            here = tightest(unified_cpus, unified, path);
        else if (has_cpu_controller(controllers))
            here = tightest(legacy_cpus, legacy, path);
        if (here < limit)
            limit = here;
    }
    fclose(stream);
    return limit;
}

int32_t kv_usable_cpus(void) {
    const int32_t cpus = affinity_cpus(), quota = kv_cgroup_cpus("");
    return quota < cpus ? quota : cpus;
}

#else

int32_t kv_usable_cpus(void) { return online_cpus(); }

#endif
