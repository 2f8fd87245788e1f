// Which of the compiled instruction sets this processor has.

extern "C" __attribute__((visibility("default"))) int has_variant_avx2() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 0;
#endif
}

extern "C" __attribute__((visibility("default"))) int has_variant_avx512() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return has_variant_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
    return 0;
#endif
}

extern "C" __attribute__((visibility("default"))) int has_variant_avx512_vnni() {
#if defined(__x86_64__)
    return has_variant_avx512() && __builtin_cpu_supports("avx512vnni");
#else
    return 0;
#endif
}

extern "C" __attribute__((visibility("default"))) int has_variant_avx512_bf16() {
#if defined(__x86_64__)
    return has_variant_avx512_vnni() && __builtin_cpu_supports("avx512bf16");
#else
    return 0;
#endif
}
