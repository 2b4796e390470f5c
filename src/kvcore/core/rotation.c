#include "rotation.h"

#include "formats.h"

#include <pthread.h>

static float signs[KV_MAX_HEAD_DIM];
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* Bit 63 of the outputs of splitmix64, whose seed spells "kvcore". */
static void make_signs(void) {
    uint64_t state = 0x6b76636f7265;
    for (int i = 0; i < KV_MAX_HEAD_DIM; i++) {
        uint64_t z = state += 0x9e3779b97f4a7c15;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
        signs[i] = (z ^ (z >> 31)) >> 63 ? -1.0f : 1.0f;
    }
}

const float *kv_rotation_signs(void) {
    pthread_once(&once, make_signs);
    return signs;
}
