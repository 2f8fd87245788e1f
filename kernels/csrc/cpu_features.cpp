// Detection of the compiled instruction sets that this processor supports.

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// bits of leaf 7: AMX with bfloat16, tiles, 8-bit integers
bool has_tile_registers() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1);
}

// Linux grants AMX tile data per process, on request, once.
bool may_use_tile_registers() {
#if defined(__linux__)
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // of arch_prctl, and the component of XSAVE
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

}  // namespace

#define HAS_VARIANT(name, condition) \
    extern "C" __attribute__((visibility("default"))) int has_variant_##name() { \
        __builtin_cpu_init(); \
        return condition; \
    }
#else
#define HAS_VARIANT(name, condition) \
    extern "C" __attribute__((visibility("default"))) int has_variant_##name() { return 0; }
#endif

HAS_VARIANT(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
HAS_VARIANT(
    avx512, has_variant_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
HAS_VARIANT(avx512_vnni, has_variant_avx512() && __builtin_cpu_supports("avx512vnni"))
HAS_VARIANT(avx512_bf16, has_variant_avx512_vnni() && __builtin_cpu_supports("avx512bf16"))
HAS_VARIANT(amx, has_variant_avx512_bf16() && has_tile_registers() && may_use_tile_registers())
