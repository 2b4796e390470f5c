#include "cpu_features.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_FEATURES = 32 };

static const char *found[MAX_FEATURES + 1];
static int num_found;
static int dots_fast;
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* Whether KVCORE_CPU_FEATURES, as in "+avx512_bf16,+amx_tile", names a feature that the CPU may have
 * though its hypervisor hides it. */
static int is_claimed(const char *name) {
    const char *claims = getenv("KVCORE_CPU_FEATURES");
    const size_t length = strlen(name);
    for (; claims && *claims; claims = strchr(claims, ',') ? strchr(claims, ',') + 1 : NULL)
        if (*claims == '+' && strncmp(claims + 1, name, length) == 0 &&
            (claims[1 + length] == ',' || claims[1 + length] == '\0'))
            return 1;
    return 0;
}

static void add_if(int present, const char *name) {
    if ((present || is_claimed(name)) && num_found < MAX_FEATURES)
        found[num_found++] = name;
}

#if defined(__x86_64__)

#include <cpuid.h>

/* XCR0 bits: which register state the operating system saves. */
enum { XCR0_AVX = 0x6, XCR0_AVX512 = 0xe6, XCR0_AMX = 0x60000 };

static uint64_t saved_state(uint32_t leaf1_ecx) {
    uint32_t low, high;
    if (!(leaf1_ecx & bit_OSXSAVE))
        return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

/* Zen 4 and 5 do dot products at the rate of FMAs; Emerald Rapids at a quarter of it. */
static int is_amd(void) {
    uint32_t a, b = 0, c = 0, d = 0;
    return __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx && c == signature_AMD_ecx &&
           d == signature_AMD_edx;
}

static int has(uint32_t word, int position) { return (word >> position) & 1; }

static void detect(void) {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d))
        return;
    const uint64_t xcr0 = saved_state(c);
    const int avx = (xcr0 & XCR0_AVX) == XCR0_AVX;
    const int avx512 = (xcr0 & XCR0_AVX512) == XCR0_AVX512;
    const int amx = (xcr0 & XCR0_AMX) == XCR0_AMX;
    dots_fast = is_amd();
    add_if(has(c, 20), "sse4_2");
    add_if(avx && has(c, 28), "avx");
    add_if(avx && has(c, 12), "fma");
    add_if(avx && has(c, 29), "f16c");

    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return;
    add_if(avx && has(b, 5), "avx2");
    add_if(avx512 && has(b, 16), "avx512f");
    add_if(avx512 && has(b, 30), "avx512bw");
    add_if(avx512 && has(b, 17), "avx512dq");
    add_if(avx512 && has(b, 31), "avx512vl");
    add_if(avx512 && has(c, 1), "avx512_vbmi");
    add_if(avx512 && has(c, 11), "avx512_vnni");
    add_if(avx512 && has(d, 23), "avx512_fp16");
    add_if(amx && has(d, 24), "amx_tile");
    add_if(amx && has(d, 22), "amx_bf16");
    add_if(amx && has(d, 25), "amx_int8");

    if (a < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d))
        a = 0;
    add_if(avx && has(a, 4), "avx_vnni");
    add_if(avx512 && has(a, 5), "avx512_bf16");
}

#elif defined(__aarch64__) && defined(__linux__)

#include <asm/hwcap.h>
#include <sys/auxv.h>

static void detect(void) {
    const unsigned long caps = getauxval(AT_HWCAP);
    add_if(1, "neon"); /* part of the AArch64 baseline */
    add_if((caps & HWCAP_ASIMDHP) != 0, "asimdhp");
    add_if((caps & HWCAP_ASIMDDP) != 0, "asimddp");
    add_if((caps & HWCAP_SVE) != 0, "sve");
#if defined(HWCAP2_BF16)
    const unsigned long more = getauxval(AT_HWCAP2);
    add_if((more & HWCAP2_BF16) != 0, "bf16");
    add_if((more & HWCAP2_I8MM) != 0, "i8mm");
#endif
}

#elif defined(__aarch64__)

static void detect(void) { add_if(1, "neon"); }

#else

static void detect(void) { (void)add_if; }

#endif

const char *const *kv_cpu_features(void) {
    pthread_once(&once, detect);
    return found;
}

int kv_cpu_dots_fast(void) {
    pthread_once(&once, detect);
    return dots_fast;
}

int kv_cpu_has(const char *name) {
    for (const char *const *feature = kv_cpu_features(); *feature; feature++)
        if (strcmp(*feature, name) == 0)
            return 1;
    return 0;
}
