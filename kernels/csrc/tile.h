// The innermost loop of linear layers: a tile of rows times a piece of a panel of weights, the sums in registers.
#pragma once

#include "simd.h"

namespace {

constexpr int PANEL_VECTORS = 2;
constexpr int PANEL = PANEL_VECTORS * VL;
constexpr int MOST_ROWS = MANY_REGISTERS ? 14 : 6;
constexpr int64_t UNROLLED = 4;  // input features of one turn

// memory that will be needed, asked for a little with every input feature: `step` bytes
struct Ahead {
    const char* at;
    int64_t step;
};

#if defined(__AVX512F__)

// By hand, because GCC 12 moves the sums from register to register, up to once a product: they are in zmm0 .. 27, the
// weights in 28 and 29. Every other row is multiplied straight from memory: an instruction less, and a load more. Both
// matter where the core is shared with another thread, and little where it is not.
#define IF_ROW(row, what) ".if %c[rows] > " #row "\n" what ".endif\n"
#define CLEAR(row, sum0, sum1)                                   \
    IF_ROW(row,                                                  \
        "vpxord %%zmm" #sum0 ", %%zmm" #sum0 ", %%zmm" #sum0 "\n" \
        "vpxord %%zmm" #sum1 ", %%zmm" #sum1 ", %%zmm" #sum1 "\n")
#define POINT(row, x, before) IF_ROW(row, "lea (%[" #before "], %[stride], 2), %[" #x "]\n")
#define FROM_MEMORY(i, row, x, sum0, sum1)                                                     \
    IF_ROW(row,                                                                                \
        "vfmadd231ps 4 * " #i "(%[" #x "])%{1to16%}, %%zmm28, %%zmm" #sum0 "\n"                  \
        "vfmadd231ps 4 * " #i "(%[" #x "])%{1to16%}, %%zmm29, %%zmm" #sum1 "\n")
#define FROM_REGISTER(i, row, x, copy, sum0, sum1)                            \
    IF_ROW(row,                                                               \
        "vbroadcastss 4 * " #i "(%[" #x "], %[stride]), %%zmm" #copy "\n"      \
        "vfmadd231ps %%zmm" #copy ", %%zmm28, %%zmm" #sum0 "\n"                \
        "vfmadd231ps %%zmm" #copy ", %%zmm29, %%zmm" #sum1 "\n")
#define WEIGHTS(i, half, to)                                                          \
    ".if %c[type] == 0\n"                                                             \
    "vmovups 64 * (2 * " #i " + " #half ")(%[piece]), %%zmm" #to "\n"                  \
    ".elseif %c[type] == 1\n"                                                         \
    "vpmovzxwd 32 * (2 * " #i " + " #half ")(%[piece]), %%zmm" #to "\n"                \
    "vpslld $16, %%zmm" #to ", %%zmm" #to "\n"                                         \
    ".else\n"                                                                         \
    "vcvtph2ps 32 * (2 * " #i " + " #half ")(%[piece]), %%zmm" #to "\n"                \
    ".endif\n"
#define FEATURE(i)                                                                    \
    WEIGHTS(i, 0, 28) WEIGHTS(i, 1, 29)                                               \
    FROM_MEMORY(i, 0, x0, 0, 1) FROM_REGISTER(i, 1, x0, 30, 2, 3)                     \
    FROM_MEMORY(i, 2, x2, 4, 5) FROM_REGISTER(i, 3, x2, 31, 6, 7)                     \
    FROM_MEMORY(i, 4, x4, 8, 9) FROM_REGISTER(i, 5, x4, 30, 10, 11)                   \
    FROM_MEMORY(i, 6, x6, 12, 13) FROM_REGISTER(i, 7, x6, 31, 14, 15)                 \
    FROM_MEMORY(i, 8, x8, 16, 17) FROM_REGISTER(i, 9, x8, 30, 18, 19)                 \
    FROM_MEMORY(i, 10, x10, 20, 21) FROM_REGISTER(i, 11, x10, 31, 22, 23)             \
    FROM_MEMORY(i, 12, x12, 24, 25) FROM_REGISTER(i, 13, x12, 30, 26, 27)
#define PASS(count)                                                                   \
    "add $" #count " * 32 * %c[bytes], %[piece]\n"                                     \
    "add $" #count " * 4, %[x0]\n"                                                     \
    IF_ROW(2, "add $" #count " * 4, %[x2]\n") IF_ROW(4, "add $" #count " * 4, %[x4]\n") \
    IF_ROW(6, "add $" #count " * 4, %[x6]\n") IF_ROW(8, "add $" #count " * 4, %[x8]\n") \
    IF_ROW(10, "add $" #count " * 4, %[x10]\n") IF_ROW(12, "add $" #count " * 4, %[x12]\n")
#define PUT(row, sum0, sum1)                             \
    IF_ROW(row,                                          \
        "vaddps (%[x0]), %%zmm" #sum0 ", %%zmm" #sum0 "\n" \
        "vaddps 64(%[x0]), %%zmm" #sum1 ", %%zmm" #sum1 "\n" \
        "vmovups %%zmm" #sum0 ", (%[piece])\n"            \
        "vmovups %%zmm" #sum1 ", 64(%[piece])\n"          \
        "add %[stride], %[x0]\n"                         \
        "add %[step], %[piece]\n")
#define EACH_ROW(what)                                                                                    \
    what(0, 0, 1) what(1, 2, 3) what(2, 4, 5) what(3, 6, 7) what(4, 8, 9) what(5, 10, 11) what(6, 12, 13) \
    what(7, 14, 15) what(8, 16, 17) what(9, 18, 19) what(10, 20, 21) what(11, 22, 23) what(12, 24, 25)    \
    what(13, 26, 27)

constexpr int type_of(const float*) { return 0; }
constexpr int type_of(const bf16*) { return 1; }
constexpr int type_of(const f16*) { return 2; }

// R rows of x times a piece, summed and then added to what `from` holds; strides are in numbers
template <int R, class Weight>
inline void tile(
    const float* x, int64_t stride, const Weight* piece, int64_t depth, const float* from, int64_t from_stride, float* to,
    int64_t to_stride, Ahead ahead) {
    static_assert(VL == 16 && PANEL_VECTORS == 2 && UNROLLED == 4 && R <= 14, "as it is written");
    const int64_t left = depth % UNROLLED, from_step = from_stride * 4, to_step = to_stride * 4;
    int64_t turns = depth / UNROLLED, step = UNROLLED * ahead.step;
    const char* until = ahead.at;
    const float *x2, *x4, *x6, *x8, *x10, *x12;
    stride *= 4;
    asm volatile(
        EACH_ROW(CLEAR)
        POINT(2, x2, x0) POINT(4, x4, x2) POINT(6, x6, x4) POINT(8, x8, x6) POINT(10, x10, x8) POINT(12, x12, x10)
        "test %[turns], %[turns]\n"
        "jz 3f\n"
        "1:\n"
        "add %[step], %[until]\n"
        "2:\n"
        "prefetcht1 (%[at])\n"
        "add $64, %[at]\n"
        "cmp %[until], %[at]\n"
        "jb 2b\n"
        "mov %[until], %[at]\n"
        FEATURE(0) FEATURE(1) FEATURE(2) FEATURE(3)
        PASS(4)
        "dec %[turns]\n"
        "jnz 1b\n"
        "3:\n"
        "mov %[left], %[turns]\n"
        "test %[turns], %[turns]\n"
        "jz 5f\n"
        "4:\n"
        FEATURE(0)
        PASS(1)
        "dec %[turns]\n"
        "jnz 4b\n"
        "5:\n"
        "mov %[from], %[x0]\n"  // and the other way round: the registers are needed again
        "mov %[to], %[piece]\n"
        "mov %[from_step], %[stride]\n"
        "mov %[to_step], %[step]\n"
        EACH_ROW(PUT)
        : [x0] "+&r"(x), [piece] "+&r"(piece), [turns] "+&r"(turns), [at] "+&r"(ahead.at), [until] "+&r"(until),
          [stride] "+&r"(stride), [step] "+&r"(step), [x2] "=&r"(x2), [x4] "=&r"(x4), [x6] "=&r"(x6), [x8] "=&r"(x8),
          [x10] "=&r"(x10), [x12] "=&r"(x12)
        : [left] "m"(left), [from] "m"(from), [to] "m"(to), [from_step] "m"(from_step), [to_step] "m"(to_step),
          [rows] "i"(R), [type] "i"(type_of((const Weight*)nullptr)), [bytes] "i"(sizeof(Weight))
        : "memory", "cc", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10",
          "zmm11", "zmm12", "zmm13", "zmm14", "zmm15", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20", "zmm21", "zmm22",
          "zmm23", "zmm24", "zmm25", "zmm26", "zmm27", "zmm28", "zmm29", "zmm30", "zmm31");
}

#undef IF_ROW
#undef CLEAR
#undef POINT
#undef FROM_MEMORY
#undef FROM_REGISTER
#undef WEIGHTS
#undef FEATURE
#undef PASS
#undef PUT
#undef EACH_ROW

#else

// R rows of x times a piece, summed and then added to what `from` holds; strides are in numbers
template <int R, class Weight>
inline void tile(
    const float* x, int64_t stride, const Weight* piece, int64_t depth, const float* from, int64_t from_stride, float* to,
    int64_t to_stride, Ahead ahead) {
    vec sums[R][PANEL_VECTORS] = {};
    const char *x0 = (const char*)x, *x5 = (const char*)(x + 5 * stride);  // and distances: there are no registers for more
    int64_t one = 4 * stride, three = 12 * stride;
    auto add = [&](int64_t i) __attribute__((always_inline)) {  // input feature i from here
        asm("" : "+r"(x0), "+r"(x5), "+r"(one), "+r"(three));  // or the compiler keeps sums of them, on the stack
        const char *a0 = x0 + 4 * i, *a5 = x5 + 4 * i;
        vec weights[PANEL_VECTORS];
        for (int v = 0; v < PANEL_VECTORS; v++) weights[v] = load(piece + i * PANEL + v * VL);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            const int64_t distance[5] = {0, one, 2 * one, three, 4 * one};
            const vec a = splat(*(const float*)((r < 5 ? a0 : a5) + distance[r % 5]));
            for (int v = 0; v < PANEL_VECTORS; v++) sums[r][v] = in_register(sums[r][v] + a * weights[v]);
        }
    };
    const Weight* end = piece + depth * PANEL;
    for (const Weight* last = end - UNROLLED * PANEL; piece <= last; piece += UNROLLED * PANEL) {
        for (int64_t byte = 0; byte < UNROLLED * ahead.step; byte += 64) __builtin_prefetch(ahead.at + byte, 0, 2);
        ahead.at += UNROLLED * ahead.step;
#pragma GCC unroll 4
        for (int64_t i = 0; i < UNROLLED; i++) add(i);
        x0 += 4 * UNROLLED, x5 += 4 * UNROLLED;
    }
    for (; piece < end; piece += PANEL) {
        add(0);
        x0 += 4, x5 += 4;
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
        for (int v = 0; v < PANEL_VECTORS; v++) {
            store(to + r * to_stride + v * VL, load(from + r * from_stride + v * VL) + sums[r][v]);
        }
    }
}

#endif

template <int R, class Weight>
inline void tile_of(
    int rows, const float* x, int64_t stride, const Weight* piece, int64_t depth, const float* from, int64_t from_stride,
    float* to, int64_t to_stride, Ahead ahead) {
    if constexpr (R > 1) {
        if (rows < R) return tile_of<R - 1>(rows, x, stride, piece, depth, from, from_stride, to, to_stride, ahead);
    }
    tile<R>(x, stride, piece, depth, from, from_stride, to, to_stride, ahead);
}

}  // namespace
