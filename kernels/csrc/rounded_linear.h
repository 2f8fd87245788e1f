// Linear layers in bfloat16: weights and activations are rounded to it, and their products added up in float32.
//
// With AVX512_BF16 a panel is as in linear.h, but of pairs of input features: one instruction multiplies two pairs and
// adds both products up. Without it the rounded activations are multiplied as float32, which gains no speed.
#pragma once

#include "linear.h"

namespace {

#if defined(__AVX512BF16__)
typedef pair Rounded;        // of x
typedef pair RoundedWeight;
#else
typedef float Rounded;
typedef bf16 RoundedWeight;
#endif

// a row; what is missing of the last pair is zero
inline void round_row(const float* x, int64_t size, pair* to) {
    to[numbers_of<pair>(size) - 1] = {};
    for (int64_t i = 0; i < size; i++) convert(x[i], (bf16*)to + i);
}
inline void round_row(const float* x, int64_t size, float* to) {
    for (int64_t i = 0; i < size; i++) {
        bf16 rounded;
        convert(x[i], &rounded);
        to[i] = to_float(rounded);
    }
}

template <class Out>
inline void multiply_rounded(const LinearOf<float, Out>& l, int threads) {
    thread_local Arena arena;
    const int64_t size = numbers_of<Rounded>(l.in_features), stride = size + (size % (SETS / 2) == 0 ? 16 : 0);
    arena.reserve(Arena::bytes_for<Rounded>(l.rows * stride));
    Rounded* x = arena.take<Rounded>(l.rows * stride);
    for_ranges(threads, l.rows, (1 << 14) / l.in_features, [&](int64_t first, int64_t last) {
        for (int64_t n = first; n < last; n++) round_row(l.x_NI + n * l.stride_N, l.in_features, x + n * stride);
    });
    multiply<Plain<RoundedWeight>>(LinearOf<Rounded, Out>{x, stride, l.panels, l.output, l.rows, size}, threads);
}

}  // namespace
