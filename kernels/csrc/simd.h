// Vectors of the widest registers that the compiler may use, in GCC's vector extensions: one source for every machine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define TILE_REGISTERS
#endif

// every name below is private to one translation unit: the same source is compiled once per instruction set
namespace {

#if defined(__AVX512F__)
constexpr int VL = 16;  // floats in a vector
constexpr bool MANY_REGISTERS = true;
#elif defined(__AVX2__)
constexpr int VL = 8;
constexpr bool MANY_REGISTERS = false;
#else
constexpr int VL = 4;
constexpr bool MANY_REGISTERS = false;
#endif

typedef float vec __attribute__((vector_size(VL * 4)));
typedef int32_t ivec __attribute__((vector_size(VL * 4)));
typedef uint32_t uvec __attribute__((vector_size(VL * 4)));
typedef uint16_t hvec __attribute__((vector_size(VL * 2)));

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

template <class To, class From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

inline vec splat(float x) { return x - vec{}; }

inline vec load(const float* p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, vec v) { memcpy(p, &v, sizeof v); }

inline vec load(const bf16* p) {
#if defined(__AVX512F__)
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    hvec h;
    memcpy(&h, p, sizeof h);
    return bits_as<vec>(__builtin_convertvector(h, uvec) << 16);
#endif
}

inline vec load(const f16* p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    hvec h;
    memcpy(&h, p, sizeof h);
    const uvec u = __builtin_convertvector(h, uvec);
    const uvec magnitude = (u & 0x7fff) << 13;
    // a power of two moves the exponent, and makes subnormals normal; infinities and NaN keep theirs all ones
    const vec finite = bits_as<vec>(magnitude) * 0x1p112f;
    const uvec out = (u & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000u : bits_as<uvec>(finite);
    return bits_as<vec>(out | (u & 0x8000) << 16);
#endif
}

// Two vectors of numbers side by side. bfloat16 comes apart faster as the even ones and the odd ones: `arrange` puts
// float32 that meets them into the same order, `restore` takes it out.
template <class Number>
inline void load_two(const Number* p, vec* two) {
    two[0] = load(p), two[1] = load(p + VL);
}

inline void load_two(const bf16* p, vec* two) {
    uvec pairs;
    memcpy(&pairs, p, sizeof pairs);
    two[0] = bits_as<vec>(pairs << 16), two[1] = bits_as<vec>(pairs & 0xffff0000u);
}

// lanes of a, then of b, by their numbers
template <size_t... FROM>
inline vec pick(vec a, vec b, std::index_sequence<FROM...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (int)FROM...);
#else
    return __builtin_shuffle(a, b, ivec{(int)FROM...});
#endif
}

template <size_t... LANE>
inline void arrange(float* x, int64_t size, std::index_sequence<LANE...>) {
    for (; size >= 2 * VL; x += 2 * VL, size -= 2 * VL) {
        const vec a = load(x), b = load(x + VL);
        store(x, pick(a, b, std::index_sequence<2 * LANE...>{}));
        store(x + VL, pick(a, b, std::index_sequence<2 * LANE + 1 ...>{}));
    }
}
inline void arrange(float* x, int64_t size) { arrange(x, size, std::make_index_sequence<VL>{}); }

template <size_t... LANE>
inline void restore(float* x, int64_t size, std::index_sequence<LANE...>) {
    for (; size >= 2 * VL; x += 2 * VL, size -= 2 * VL) {
        const vec even = load(x), odd = load(x + VL);
        store(x, pick(even, odd, std::index_sequence<LANE % 2 * VL + LANE / 2 ...>{}));
        store(x + VL, pick(even, odd, std::index_sequence<LANE % 2 * VL + (VL + LANE) / 2 ...>{}));
    }
}
inline void restore(float* x, int64_t size) { restore(x, size, std::make_index_sequence<VL>{}); }

// not __builtin_convertvector: GCC 12 makes scalar code of it, number by number
inline ivec load_integers(const uint8_t* p) {
#if defined(__AVX512F__)
    return (ivec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
    return (ivec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    ivec v;
    for (int i = 0; i < VL; i++) v[i] = p[i];
    return v;
#endif
}

inline ivec load_integers(const int8_t* p) {
#if defined(__AVX512F__)
    return (ivec)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
    return (ivec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    ivec v;
    for (int i = 0; i < VL; i++) v[i] = p[i];
    return v;
#endif
}

// 0 to 15 as they stand in the last bits of each number
inline vec low_four_bits(ivec x) {
#if defined(__AVX512F__)
    const vec numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return _mm512_permutexvar_ps((__m512i)x, numbers);  // looks at no other bits
#else
    return __builtin_convertvector(x & 15, vec);
#endif
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_as<float>((uint32_t)x.bits << 16); }
inline float to_float(f16 x) {
    const uint32_t magnitude = (uint32_t)(x.bits & 0x7fff) << 13;
    uint32_t out = bits_as<uint32_t>(bits_as<float>(magnitude) * 0x1p112f);
    if ((x.bits & 0x7c00) == 0x7c00) out = magnitude | 0x7f800000u;
    return bits_as<float>(out | (uint32_t)(x.bits & 0x8000) << 16);
}

// rounding to nearest, ties to even, as torch does
inline void convert(float x, float* to) { *to = x; }
inline void convert(float x, bf16* to) {
    const uint32_t u = bits_as<uint32_t>(x);
    const bool is_nan = (u & 0x7fffffff) > 0x7f800000;
    to->bits = is_nan ? 0x7fc0 : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline void convert(float x, f16* to) {
    const uint32_t u = bits_as<uint32_t>(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    uint32_t out;
    if (magnitude > 0x7f800000) {
        out = 0x7e00;
    } else if (magnitude >= 0x477ff000) {  // rounds beyond the largest
        out = 0x7c00;
    } else if (magnitude < 0x38800000) {  // subnormal: the float addition rounds where float16 ends
        out = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000;
    } else {
        out = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
    }
    to->bits = (uint16_t)(out | sign);
}

inline vec vmax(vec a, vec b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

// 2**x for x up to 127; 0 below -126. Within 1e-7 of the result.
inline vec exp2_to_127(vec x) {
    const vec magic = splat(0x1.8p23f);  // adding it rounds to an integer, which is in the low bits
    const vec shifted = x + magic;
    const vec f = x - (shifted - magic);  // -0.5 .. 0.5
    vec p = splat(1.32647185e-3f);        // of degree 5, fitted to the relative error, exact at 0
    p = p * f + 9.67151328e-3f;
    p = p * f + 5.55073377e-2f;
    p = p * f + 2.40222421e-1f;
    p = p * f + 6.93146978e-1f;
    p = p * f + 1.0f;
    const vec power = bits_as<vec>((bits_as<ivec>(shifted) + 127) << 23);
    return x < -126.0f ? vec{} : p * power;
}

inline vec exp2_any(vec x) { return exp2_to_127(x > 128.0f ? splat(128.0f) : x); }

// Cephes' tanhf: a polynomial near 0, where 1 - 2 / (e**2x + 1) cancels
inline vec tanh_of(vec x) {
    const vec size = bits_as<vec>(bits_as<uvec>(x) & 0x7fffffffu);
    const vec far = 1.0f - 2.0f / (exp2_any(size * 2.8853900817779268f) + 1.0f);
    const vec signed_far = bits_as<vec>(bits_as<uvec>(far) | (bits_as<uvec>(x) & 0x80000000u));
    const vec z = x * x;
    vec p = splat(-5.70498872745e-3f);
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    return size < 0.625f ? p * z * x + x : signed_far;
}

// Blend segments of 2 H lanes: the first half from a, the second half from b
template <int H, size_t... LANE>
__attribute__((always_inline)) inline vec outer_halves(vec a, vec b, std::index_sequence<LANE...>) {
    return ivec{(LANE / H % 2 ? -1 : 0)...} ? b : a;
}

// The others: a's second halves in the place of the first, b's first in that of the second
template <int H, size_t... LANE>
__attribute__((always_inline)) inline vec inner_halves(vec a, vec b, std::index_sequence<LANE...>) {
    return pick(a, b, std::index_sequence<LANE / H % 2 * VL + (LANE ^ H)...>{});
}

// Reduce with `join` over lanes that lie a multiple of EACH apart; every lane holds its result
template <int EACH, class Join>
inline vec across(vec v, Join&& join) {
    if constexpr (EACH == VL) return v;
    else return across<2 * EACH>(join(v, inner_halves<EACH>(v, v, std::make_index_sequence<VL>{})), join);
}

// Lane i of the result is the sum of rows[i]'s lanes; overwrites rows. Of each EACH rows only the first LIVE are summed.
template <int LIVE = 1, int EACH = 1, int N = VL>
__attribute__((always_inline)) inline vec row_sums(vec* rows) {
    if constexpr (N == 1) {
        return rows[0];
    } else {
        constexpr int H = N / 2;
        constexpr std::make_index_sequence<VL> lanes{};
#pragma GCC unroll 8
        for (int i = 0; i < H; i++) {
            if (i % EACH >= LIVE) continue;
            rows[i] = outer_halves<H>(rows[i], rows[i + H], lanes) + inner_halves<H>(rows[i], rows[i + H], lanes);
        }
        return row_sums<LIVE, EACH, H>(rows);
    }
}

}  // namespace
