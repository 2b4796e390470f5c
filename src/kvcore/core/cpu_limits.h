/* How many CPUs this process may use. */
#ifndef KVCORE_CORE_CPU_LIMITS_H
#define KVCORE_CORE_CPU_LIMITS_H

#include <stdint.h>

/* The CPUs of the affinity mask, limited by the quota of the process's cgroups; at least 1. */
int32_t kv_usable_cpus(void);

#endif
