/* How many CPUs this process may use. */
#ifndef KVCORE_CORE_CPU_LIMITS_H
#define KVCORE_CORE_CPU_LIMITS_H

#include <stdint.h>

/* The CPUs of the affinity mask, limited by the quota of the process's cgroups; at least 1. */
int32_t kv_usable_cpus(void);

#if defined(__linux__)
/* CPUs that the quotas of the process's cgroups come to, rounded up, as the files below `root` have
 * it ("" but for tests); INT32_MAX without a quota. */
int32_t kv_cgroup_cpus(const char *root);
#endif

#endif
