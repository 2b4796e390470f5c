/* What the statuses say, and the version. */
#include "kvcore.h"

#ifndef KVCORE_VERSION
#error "the build defines KVCORE_VERSION"
#endif

const char *kv_version(void) { return KVCORE_VERSION; }

static const struct {
    const char *name, *message;
} statuses[KV_STATUS_COUNT] = {
#define KV_STATUS_ROW(ID, message) {#ID, message},
    KV_STATUSES(KV_STATUS_ROW)
#undef KV_STATUS_ROW
};

static int is_status(kv_status status) { return (unsigned)status < KV_STATUS_COUNT; }

const char *kv_status_name(kv_status status) {
    return is_status(status) ? statuses[status].name : "UNKNOWN";
}

const char *kv_status_string(kv_status status) {
    return is_status(status) ? statuses[status].message : "unknown status";
}
