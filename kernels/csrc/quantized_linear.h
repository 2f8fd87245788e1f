// Linear layers in 8 bits: weights per output feature, activations per row as they come, both symmetric in -127 .. 127.
// The sums are integers and exact, so every instruction set gives the same ones.
//
// A panel holds PANEL output features: for four input features at a time, the PANEL groups of four weights.
#pragma once

#include "elementwise.h"
#include "linear.h"

namespace {

#if defined(__AVX512VNNI__)
constexpr int MOST_QUANTIZED_ROWS = 14;
constexpr int BIAS = 128;  // the instruction multiplies unsigned with signed: activations are stored above zero
#else
constexpr int MOST_QUANTIZED_ROWS = 4;
constexpr int BIAS = 0;
#endif

struct QuantizedLinear {
    const float* x_NI;
    int64_t stride_N;
    const int8_t* panels;
    const int32_t* sums_O;     // of each feature's weights
    const float* scales_O;     // of the weights
    const float* bias_O;       // or null
    float* out_NO;
    int64_t rows, in_features, out_features;

    int64_t groups() const { return (in_features + 3) / 4; }
};

// to an integer, ties to even; not fused with what made x, which would round other numbers than torch does
inline ivec nearest(vec x) {
#if defined(__AVX512F__)
    return (ivec)_mm512_cvtps_epi32(x);
#elif defined(__AVX2__)
    return (ivec)_mm256_cvtps_epi32(x);
#else
    return bits_as<ivec>(x + 0x1.8p23f) - 0x4b400000;
#endif
}

// one row to bytes; returns what one step of them stands for. Not-a-number and infinity make it not finite
inline float quantize_row(const float* x, int64_t size, uint8_t* to, int64_t padded) {
    ivec largest = {};  // of the bits, which are in the order of the absolute values, infinity and NaN on top
    over_vectors(size, [&](int64_t i, int count) {
        const ivec v = bits_as<ivec>(load_some(x + i, count)) & 0x7fffffff;
        largest = v > largest ? v : largest;
    });
    int32_t top = 0;
    for (int i = 0; i < VL; i++) top = largest[i] > top ? largest[i] : top;
    const float most = bits_as<float>(top);
    // 1e-30 and less is nothing; its reciprocal would not be finite
    const float factor = most > 1e-30f && most < __builtin_inff() ? 127.0f / most : 0.0f;
    typedef int8_t bytes __attribute__((vector_size(VL)));
    int64_t i = 0;
    for (; i + VL <= size; i += VL) {
        const ivec q = nearest(load(x + i) * factor) + BIAS;
        const bytes b = __builtin_convertvector(q, bytes);
        memcpy(to + i, &b, sizeof b);
    }
    if (i < size) {
        const ivec q = nearest(load_some(x + i, (int)(size - i)) * factor) + BIAS;
        const bytes b = __builtin_convertvector(q, bytes);
        memcpy(to + i, &b, size - i);
    }
    memset(to + size, BIAS, padded - size);
    return most * (1.0f / 127.0f);
}

#if defined(__AVX512VNNI__)
inline ivec four_products(ivec sum, ivec a, ivec w) { return (ivec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)w); }
#elif defined(__AVX2__)
typedef int32_t int8lanes __attribute__((vector_size(32)));
inline int8lanes four_products(int8lanes sum, int8lanes a, int8lanes w) {
    // |a| * (w with a's sign): two products of at most 127 * 127 fit the 16-bit sum
    const __m256i signed_w = _mm256_sign_epi8((__m256i)w, (__m256i)a);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)a), signed_w);
    return sum + (int8lanes)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#else
inline ivec four_products(ivec sum, ivec a, ivec w) {
    for (int i = 0; i < 4; i++) sum += (a << (24 - 8 * i) >> 24) * (w << (24 - 8 * i) >> 24);
    return sum;
}
#endif

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
typedef int8lanes qvec;
#else
typedef ivec qvec;
#endif
constexpr int QL = sizeof(qvec) / 4;
constexpr int QUANTIZED_VECTORS = PANEL / QL;

template <int R>
inline void quantized_tile(const uint8_t* x, int64_t stride, const int8_t* panel, int64_t groups, int32_t* sums) {
    constexpr int V = QUANTIZED_VECTORS > 2 ? 2 : QUANTIZED_VECTORS;  // sums that the registers hold
    for (int start = 0; start < QUANTIZED_VECTORS; start += V) {
        qvec sum[R][V] = {};
        for (int64_t g = 0; g < groups; g++) {
            qvec w[V];
            for (int v = 0; v < V; v++) memcpy(&w[v], panel + g * PANEL * 4 + (start + v) * sizeof(qvec), sizeof(qvec));
#pragma GCC unroll 14
            for (int r = 0; r < R; r++) {
                int32_t four;
                memcpy(&four, x + r * stride + g * 4, 4);
                const qvec a = four - qvec{};
                for (int v = 0; v < V; v++) sum[r][v] = four_products(sum[r][v], a, w[v]);
            }
        }
        for (int r = 0; r < R; r++) {
            for (int v = 0; v < V; v++) memcpy(sums + r * PANEL + (start + v) * QL, &sum[r][v], sizeof(qvec));
        }
    }
}

template <int R>
inline void quantized_tile_of(
    int rows, const uint8_t* x, int64_t stride, const int8_t* panel, int64_t groups, int32_t* sums) {
    if constexpr (R > 1) {
        if (rows < R) return quantized_tile_of<R - 1>(rows, x, stride, panel, groups, sums);
    }
    quantized_tile<R>(x, stride, panel, groups, sums);
}

inline void quantized_panel(
    const QuantizedLinear& l, const uint8_t* x, int64_t stride, const float* scales_N, int64_t number, int64_t first,
    int64_t last) {
    const int64_t left = number * PANEL, width = std::min<int64_t>(PANEL, l.out_features - left);
    float scales[PANEL] = {}, bias[PANEL] = {};
    ivec offsets[PANEL_VECTORS];
    memcpy(scales, l.scales_O + left, width * 4);
    if (l.bias_O) memcpy(bias, l.bias_O + left, width * 4);
    memcpy(offsets, l.sums_O + left, sizeof offsets);
    int32_t sums[MOST_QUANTIZED_ROWS * PANEL];
    const int64_t tiles = (last - first + MOST_QUANTIZED_ROWS - 1) / MOST_QUANTIZED_ROWS;
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t row = first + (last - first) * i / tiles;
        const int count = (int)(first + (last - first) * (i + 1) / tiles - row);
        const int8_t* panel = l.panels + number * l.groups() * PANEL * 4;
        quantized_tile_of<MOST_QUANTIZED_ROWS>(count, x + row * stride, stride, panel, l.groups(), sums);
        for (int r = 0; r < count; r++) {
            float line[PANEL];
            for (int v = 0; v < PANEL_VECTORS; v++) {
                ivec sum;
                memcpy(&sum, sums + r * PANEL + v * VL, sizeof sum);
                const vec exact = __builtin_convertvector(sum - BIAS * offsets[v], vec);
                store(line + v * VL, exact * (load(scales + v * VL) * scales_N[row + r]) + load(bias + v * VL));
            }
            memcpy(l.out_NO + (row + r) * l.out_features + left, line, width * 4);
        }
    }
}

inline void multiply_quantized(const QuantizedLinear& l, int threads) {
    thread_local Arena arena;
    const int64_t padded = l.groups() * 4;
    const int64_t stride = padded + (padded % (SETS * 2) == 0 ? 64 : 0);
    arena.reserve(Arena::bytes_for<uint8_t>(l.rows * stride) + Arena::bytes_for<float>(l.rows));
    uint8_t* x = arena.take<uint8_t>(l.rows * stride);
    float* scales_N = arena.take<float>(l.rows);
    for_ranges(threads, l.rows, (1 << 14) / l.in_features, [&](int64_t first, int64_t last) {
        for (int64_t n = first; n < last; n++) {
            scales_N[n] = quantize_row(l.x_NI + n * l.stride_N, l.in_features, x + n * stride, padded);
        }
    });
    const int64_t panels = (l.out_features + PANEL - 1) / PANEL;
    const int64_t block = std::max<int64_t>(BLOCK_BYTES / stride, 2 * MOST_QUANTIZED_ROWS);
    const int64_t blocks = (l.rows + block - 1) / block;
    for_tasks(threads, blocks * panels, [&](int, int64_t task) {
        const int64_t b = task / panels;
        quantized_panel(l, x, stride, scales_N, task % panels, l.rows * b / blocks, l.rows * (b + 1) / blocks);
    });
}

inline void pack_quantized(
    const int8_t* w_OI, int64_t in_features, int64_t out_features, int8_t* panels, int32_t* sums, int threads) {
    const int64_t count = (out_features + PANEL - 1) / PANEL, groups = (in_features + 3) / 4;
    for_tasks(threads, count, [&](int, int64_t p) {
        for (int64_t o = 0; o < PANEL; o++) {
            const int8_t* row = p * PANEL + o < out_features ? w_OI + (p * PANEL + o) * in_features : nullptr;
            int32_t sum = 0;
            for (int64_t i = 0; i < groups * 4; i++) {
                const int8_t w = row && i < in_features ? row[i] : 0;
                panels[((p * groups + i / 4) * PANEL + o) * 4 + i % 4] = w;
                sum += w;
            }
            sums[p * PANEL + o] = sum;
        }
    });
}

}  // namespace
