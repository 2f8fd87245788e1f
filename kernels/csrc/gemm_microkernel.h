// The innermost loop of linear layers: a tile of rows times a piece of a panel of weights, the sums in registers.
#pragma once

#include <type_traits>

#include "simd.h"

namespace {

constexpr int PANEL_VECTORS = 2;
constexpr int PANEL = PANEL_VECTORS * VL;
constexpr int MOST_ROWS = MANY_REGISTERS ? 14 : 6;

// bfloat16 of two input features, which AVX512_BF16 takes as one number: the product of two pairs is a sum of two products
struct pair {
    bf16 features[2];
};
template <class Number>
constexpr int64_t TOGETHER = std::is_same_v<Number, pair> ? 2 : 1;  // input features in a number
template <class Number>
constexpr int64_t numbers_of(int64_t features) {
    return (features + TOGETHER<Number> - 1) / TOGETHER<Number>;
}

// memory that will be needed, asked for a little with every input feature: `step` bytes
struct Ahead {
    const char* at;
    int64_t step;
};

#if defined(__AVX2__)

// Written by hand, because GCC 12 moves the sums from register to register, up to once a product. The sums are in the first
// registers, two a row, and the weights and a number of x, in every lane, in the last four. With AVX-512 every other row
// is multiplied straight from memory: an instruction less, and a load more. Both matter where the core is shared with
// another thread, and little where it is not.
#if defined(__AVX512F__)
#define VECTOR "%%zmm"
#define BYTES "64"
#define WEIGHTS_0 VECTOR "28"
#define WEIGHTS_1 VECTOR "29"
#define COPY_0 VECTOR "30"
#define COPY_1 VECTOR "31"
#define EVEN_ROW(i, row, x, sum0, sum1) \
    IF_ROW(row, \
        ADD_PRODUCT("4 * " #i "(%[" #x "])%{1to16%}, " WEIGHTS_0 ", " VECTOR #sum0) \
        ADD_PRODUCT("4 * " #i "(%[" #x "])%{1to16%}, " WEIGHTS_1 ", " VECTOR #sum1))
#define MORE_OVERWRITTEN \
    , "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", \
        "xmm28", "xmm29", "xmm30", "xmm31"
#else
#define VECTOR "%%ymm"
#define BYTES "32"
#define WEIGHTS_0 VECTOR "12"
#define WEIGHTS_1 VECTOR "13"
#define COPY_0 VECTOR "14"
#define COPY_1 VECTOR "15"
#define EVEN_ROW(i, row, x, sum0, sum1) IF_ROW(row, PRODUCTS(i, "(%[" #x "])", COPY_0, sum0, sum1))
#define MORE_OVERWRITTEN
#endif

#if defined(__AVX512BF16__)
#define ADD_PRODUCT(operands) \
    ".if %c[pairs]\n" \
    "vdpbf16ps " operands "\n" \
    ".else\n" \
    "vfmadd231ps " operands "\n" \
    ".endif\n"
#else
#define ADD_PRODUCT(operands) "vfmadd231ps " operands "\n"
#endif
// Emit `what` only if the tile has this row.
#define IF_ROW(row, what) ".if %c[rows] > " #row "\n" what ".endif\n"
// Products of one row with input feature i, counted from here
#define PRODUCTS(i, at, copy, sum0, sum1) \
    "vbroadcastss 4 * " #i at ", " copy "\n" \
    ADD_PRODUCT(copy ", " WEIGHTS_0 ", " VECTOR #sum0) \
    ADD_PRODUCT(copy ", " WEIGHTS_1 ", " VECTOR #sum1)
#define ODD_ROW(i, row, x, sum0, sum1) IF_ROW(row, PRODUCTS(i, "(%[" #x "], %[stride])", COPY_1, sum0, sum1))
#define WEIGHTS(i, half, to) \
    ".if %c[bytes] == 4\n" \
    "vmovups " BYTES " * (2 * " #i " + " #half ")(%[piece]), " to "\n" \
    ".elseif %c[is_bf16]\n" \
    "vpmovzxwd " BYTES " / 2 * (2 * " #i " + " #half ")(%[piece]), " to "\n" \
    "vpslld $16, " to ", " to "\n" \
    ".else\n" \
    "vcvtph2ps " BYTES " / 2 * (2 * " #i " + " #half ")(%[piece]), " to "\n" \
    ".endif\n"
// All products of input feature i from here
#define FEATURE(i) \
    WEIGHTS(i, 0, WEIGHTS_0) WEIGHTS(i, 1, WEIGHTS_1) \
    EVEN_ROW(i, 0, x0, 0, 1) ODD_ROW(i, 1, x0, 2, 3) \
    EVEN_ROW(i, 2, x2, 4, 5) ODD_ROW(i, 3, x2, 6, 7) \
    EVEN_ROW(i, 4, x4, 8, 9) ODD_ROW(i, 5, x4, 10, 11) \
    EVEN_ROW(i, 6, x6, 12, 13) ODD_ROW(i, 7, x6, 14, 15) \
    EVEN_ROW(i, 8, x8, 16, 17) ODD_ROW(i, 9, x8, 18, 19) \
    EVEN_ROW(i, 10, x10, 20, 21) ODD_ROW(i, 11, x10, 22, 23) \
    EVEN_ROW(i, 12, x12, 24, 25) ODD_ROW(i, 13, x12, 26, 27)
#define POINT(row, x, before) IF_ROW(row, "lea (%[" #before "], %[stride], 2), %[" #x "]\n")
#define ADVANCE(count, row, x) IF_ROW(row, "add $4 * " #count ", %[" #x "]\n")
// Advance by `count` input features
#define PASS(count) \
    "add $" #count " * 2 * " BYTES " * %c[bytes] / 4, %[piece]\n" \
    ADVANCE(count, 0, x0) ADVANCE(count, 2, x2) ADVANCE(count, 4, x4) ADVANCE(count, 6, x6) \
    ADVANCE(count, 8, x8) ADVANCE(count, 10, x10) ADVANCE(count, 12, x12)
#define CLEAR(row, sum0, sum1) \
    IF_ROW(row, \
        "vxorps " VECTOR #sum0 ", " VECTOR #sum0 ", " VECTOR #sum0 "\n" \
        "vxorps " VECTOR #sum1 ", " VECTOR #sum1 ", " VECTOR #sum1 "\n")
// The sums of a row, added to what `from` holds; x0, piece, stride and step are those of `from` and `to` by then
#define PUT(row, sum0, sum1) \
    IF_ROW(row, \
        "vaddps (%[x0]), " VECTOR #sum0 ", " VECTOR #sum0 "\n" \
        "vaddps " BYTES "(%[x0]), " VECTOR #sum1 ", " VECTOR #sum1 "\n" \
        "vmovups " VECTOR #sum0 ", (%[piece])\n" \
        "vmovups " VECTOR #sum1 ", " BYTES "(%[piece])\n" \
        "add %[stride], %[x0]\n" \
        "add %[step], %[piece]\n")
#define EACH_ROW(what) \
    what(0, 0, 1) what(1, 2, 3) what(2, 4, 5) what(3, 6, 7) what(4, 8, 9) what(5, 10, 11) what(6, 12, 13) \
    what(7, 14, 15) what(8, 16, 17) what(9, 18, 19) what(10, 20, 21) what(11, 22, 23) what(12, 24, 25) \
    what(13, 26, 27)

constexpr int64_t UNROLLED = 8;  // input features of one turn

// R rows of x times a piece, summed and then added to what `from` holds; strides are in numbers
template <int R, class Number, class Weight>
inline void tile(
    const Number* x, int64_t stride, const Weight* piece, int64_t depth, const float* from, int64_t from_stride, float* to,
    int64_t to_stride, Ahead ahead) {
    static_assert(PANEL_VECTORS == 2 && UNROLLED == 8 && R <= MOST_ROWS, "as it is written");
    const int64_t left = depth % UNROLLED, from_step = from_stride * 4, to_step = to_stride * 4;
    int64_t turns = depth / UNROLLED, step = UNROLLED * ahead.step;
    const char* until = ahead.at;
    const Number *x2, *x4, *x6, *x8, *x10, *x12;
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
        FEATURE(0) FEATURE(1) FEATURE(2) FEATURE(3) FEATURE(4) FEATURE(5) FEATURE(6) FEATURE(7)
        PASS(8)
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
        "mov %[from], %[x0]\n"
        "mov %[from_step], %[stride]\n"
        "mov %[to], %[piece]\n"
        "mov %[to_step], %[step]\n"
        EACH_ROW(PUT)
        : [x0] "+&r"(x), [piece] "+&r"(piece), [turns] "+&r"(turns), [at] "+&r"(ahead.at), [until] "+&r"(until),
          [stride] "+&r"(stride), [step] "+&r"(step), [x2] "=&r"(x2), [x4] "=&r"(x4), [x6] "=&r"(x6), [x8] "=&r"(x8),
          [x10] "=&r"(x10), [x12] "=&r"(x12)
        : [left] "m"(left), [from] "m"(from), [to] "m"(to), [from_step] "m"(from_step), [to_step] "m"(to_step),
          [rows] "i"(R), [bytes] "i"(sizeof(Weight)), [is_bf16] "i"((int)std::is_same_v<Weight, bf16>),
          [pairs] "i"((int)std::is_same_v<Number, pair>)
        : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
          "xmm11", "xmm12", "xmm13", "xmm14", "xmm15" MORE_OVERWRITTEN);
}

#undef VECTOR
#undef BYTES
#undef WEIGHTS_0
#undef WEIGHTS_1
#undef COPY_0
#undef COPY_1
#undef EVEN_ROW
#undef MORE_OVERWRITTEN
#undef ADD_PRODUCT
#undef IF_ROW
#undef PRODUCTS
#undef ODD_ROW
#undef WEIGHTS
#undef FEATURE
#undef POINT
#undef ADVANCE
#undef PASS
#undef CLEAR
#undef PUT
#undef EACH_ROW

#else

// The same, left to the compiler
template <int R, class Weight>
inline void tile(
    const float* x, int64_t stride, const Weight* piece, int64_t depth, const float* from, int64_t from_stride, float* to,
    int64_t to_stride, Ahead ahead) {
    vec sums[R][PANEL_VECTORS] = {};
    for (int64_t i = 0; i < depth; i++, piece += PANEL, ahead.at += ahead.step) {
        __builtin_prefetch(ahead.at, 0, 2);
        vec weights[PANEL_VECTORS];
        for (int v = 0; v < PANEL_VECTORS; v++) weights[v] = load(piece + v * VL);
        for (int r = 0; r < R; r++) {
            const vec a = splat(x[r * stride + i]);
            for (int v = 0; v < PANEL_VECTORS; v++) sums[r][v] += a * weights[v];
        }
    }
    for (int r = 0; r < R; r++) {
        for (int v = 0; v < PANEL_VECTORS; v++) {
            store(to + r * to_stride + v * VL, load(from + r * from_stride + v * VL) + sums[r][v]);
        }
    }
}

#endif

template <int R, class Number, class Weight>
inline void tile_of(
    int rows, const Number* x, int64_t stride, const Weight* piece, int64_t depth, const float* from, int64_t from_stride,
    float* to, int64_t to_stride, Ahead ahead) {
    if constexpr (R > 1) {
        if (rows < R) return tile_of<R - 1>(rows, x, stride, piece, depth, from, from_stride, to, to_stride, ahead);
    }
    tile<R>(x, stride, piece, depth, from, from_stride, to, to_stride, ahead);
}

}  // namespace
