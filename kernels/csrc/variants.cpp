// Which of the compiled instruction sets this processor has.

#if defined(__x86_64__)
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
