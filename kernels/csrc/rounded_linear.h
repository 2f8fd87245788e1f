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
constexpr int64_t TOGETHER = sizeof(RoundedWeight) / sizeof(bf16);  // input features in a number

inline int64_t rounded_size(int64_t features) { return (features + TOGETHER - 1) / TOGETHER; }

// a row; what is missing of the last pair is zero
inline void round_row(const float* x, int64_t size, Rounded* to) {
    to[rounded_size(size) - 1] = {};
    over_vectors(size, [&](int64_t i, int count) {
        const uvec rounded = to_bf16(load_some(x + i, count));
        if constexpr (TOGETHER == 2) {
            const hvec narrow = __builtin_convertvector(rounded, hvec);
            memcpy((bf16*)to + i, &narrow, count * sizeof(bf16));
        } else {
            store_some((float*)to + i, bits_as<vec>(rounded << 16), count);
        }
    });
}

inline void multiply_rounded(const Linear& l, int threads) {
    thread_local Arena arena;
    const int64_t size = rounded_size(l.in_features), stride = size + (size % (SETS / 2) == 0 ? 16 : 0);
    arena.reserve(Arena::bytes_for<Rounded>(l.rows * stride));
    Rounded* x = arena.take<Rounded>(l.rows * stride);
    for_ranges(threads, l.rows, (1 << 14) / l.in_features, [&](int64_t first, int64_t last) {
        for (int64_t n = first; n < last; n++) round_row(l.x_NI + n * l.stride_N, l.in_features, x + n * stride);
    });
    const LinearOf<Rounded> rounded{x, stride, l.panels, l.output, l.rows, size};
    const Blocks blocks(l.rows, size * sizeof(Rounded), MOST_ROWS);
    for_panels(threads, blocks, rounded.panel_count(), [&](const Block& block, int64_t number, int64_t next) {
        multiply_panel<RoundedWeight>(rounded, block, number, next);
    });
}

inline void pack_rounded(const float* w_OI, int64_t in_features, int64_t out_features, RoundedWeight* panels, int threads) {
    const int64_t size = rounded_size(in_features);
    for_tasks(threads, (out_features + PANEL - 1) / PANEL, [&](int, int64_t p) {
        for (int64_t i = 0; i < size; i++) {
            for (int64_t o = 0; o < PANEL; o++) {
                bf16* to = (bf16*)(panels + (p * size + i) * PANEL + o);
                for (int64_t k = 0; k < TOGETHER; k++) {
                    const int64_t row = p * PANEL + o, feature = i * TOGETHER + k;
                    const bool there = row < out_features && feature < in_features;
                    convert(there ? w_OI[row * in_features + feature] : 0.0f, to + k);
                }
            }
        }
    });
}

}  // namespace
