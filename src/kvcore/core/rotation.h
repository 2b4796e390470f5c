/* The signs of the rotation: docs/formats.md. */
#ifndef KVCORE_CORE_ROTATION_H
#define KVCORE_CORE_ROTATION_H

/* [KV_MAX_HEAD_DIM], each 1 or -1; a row of D elements takes the first D. */
const float *kv_rotation_signs(void);

#endif
