// Linear layers in 8 bits: weights per output feature, activations per row and GROUP input features as they come, both
// symmetric in -127 .. 127. A group's sums are integers and exact, so every instruction set gives the same ones.
//
// A panel holds PANEL output features: for four input features at a time, the PANEL quads of four weights.
#pragma once

#include "linear.h"

namespace {

constexpr int64_t GROUP = 64;        // input features that share a scale
constexpr int64_t QUADS = GROUP / 4;

#if defined(__AVX512VNNI__) && !defined(TILE_REGISTERS)
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
    const int32_t* offsets;  // by panel, group and output feature: what BIAS adds to a sum, to be taken off
    const float* scales_O;   // of the weights, in the panels' order
    Output output;
    int64_t rows, in_features;

    int64_t groups() const { return (in_features + GROUP - 1) / GROUP; }
    int64_t panel_count() const { return (output.out_features + PANEL - 1) / PANEL; }
};

// Round to an integer, ties to even; not fused with the operation that made x, so that it rounds what torch rounds
inline ivec nearest(vec x) {
#if defined(__AVX512F__)
    return (ivec)_mm512_cvtps_epi32(x);
#elif defined(__AVX2__)
    return (ivec)_mm256_cvtps_epi32(x);
#else
    return bits_as<ivec>(x + 0x1.8p23f) - 0x4b400000;
#endif
}

// up to a group of a row to bytes; returns what one step of them stands for. NaN and infinity make it not finite
inline float quantize_group(const float* x, int64_t size, uint8_t* to) {
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
    over_vectors(size, [&](int64_t i, int count) {
        const bytes b = __builtin_convertvector(nearest(load_some(x + i, count) * factor) + BIAS, bytes);
        memcpy(to + i, &b, count);
    });
    memset(to + size, BIAS, GROUP - size);
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
typedef float qfloat __attribute__((vector_size(32)));
#else
typedef ivec qvec;
typedef vec qfloat;
#endif
constexpr int QL = sizeof(qvec) / 4;
constexpr int QUANTIZED_VECTORS = PANEL / QL;

// R rows times a panel: sums of each group times its scale, added up
template <int R>
inline void quantized_tile(
    const uint8_t* x, int64_t stride, const float* scales_NG, const int8_t* panel, const int32_t* offsets, int64_t groups,
    float* sums, Ahead ahead) {
    constexpr int V = QUANTIZED_VECTORS > 2 ? 2 : QUANTIZED_VECTORS;  // what the registers hold
    for (int64_t g = 0; g < groups; g++) {
        for (int start = 0; start < QUANTIZED_VECTORS; start += V) {
            qvec sum[R][V];
#pragma GCC unroll 14
            for (int r = 0; r < R; r++) {
                for (int v = 0; v < V; v++) memcpy(&sum[r][v], offsets + g * PANEL + (start + v) * QL, sizeof(qvec));
            }
            // fourteen rows from three pointers: there are no registers for more
            const uint8_t *x0 = x + g * GROUP, *x5 = x0 + 5 * stride, *x10 = x0 + 10 * stride;
            const int64_t distance[5] = {0, stride, 2 * stride, 3 * stride, 4 * stride};
            for (int64_t q = g * QUADS; q < (g + 1) * QUADS; q++) {
                for (int64_t line = 0; line < PANEL * V / QUANTIZED_VECTORS * 4; line += 64) {
                    __builtin_prefetch(ahead.at + line, 0, 2);
                }
                ahead.at += ahead.step;
                qvec w[V];
                for (int v = 0; v < V; v++) memcpy(&w[v], panel + (q * PANEL + (start + v) * QL) * 4, sizeof(qvec));
#pragma GCC unroll 14
                for (int r = 0; r < R; r++) {
                    int32_t four;
                    memcpy(&four, (r < 5 ? x0 : r < 10 ? x5 : x10) + distance[r % 5], 4);
                    const qvec a = four - qvec{};
                    for (int v = 0; v < V; v++) sum[r][v] = four_products(sum[r][v], a, w[v]);
                }
                x0 += 4, x5 += 4, x10 += 4;
                asm("" : "+r"(x0), "+r"(x5), "+r"(x10));
            }
#pragma GCC unroll 14
            for (int r = 0; r < R; r++) {
                for (int v = 0; v < V; v++) {
                    qfloat total;
                    float* at = sums + r * PANEL + (start + v) * QL;
                    memcpy(&total, at, sizeof total);
                    total += __builtin_convertvector(sum[r][v], qfloat) * scales_NG[r * groups + g];
                    memcpy(at, &total, sizeof total);
                }
            }
        }
    }
}

template <int R>
inline void quantized_tile_of(
    int rows, const uint8_t* x, int64_t stride, const float* scales_NG, const int8_t* panel, const int32_t* offsets,
    int64_t groups, float* sums, Ahead ahead) {
    if constexpr (R > 1) {
        if (rows < R) return quantized_tile_of<R - 1>(rows, x, stride, scales_NG, panel, offsets, groups, sums, ahead);
    }
    quantized_tile<R>(x, stride, scales_NG, panel, offsets, groups, sums, ahead);
}

inline void quantized_panel(
    const QuantizedLinear& l, const uint8_t* x, int64_t stride, const float* scales_NG, int64_t number, int64_t next,
    const Block& block) {
    const int64_t left = number * PANEL, width = l.output.width(number), groups = l.groups();
    const int8_t* panel = l.panels + number * groups * GROUP * PANEL;
    const int32_t* offsets = l.offsets + number * groups * PANEL;
    float begin[PANEL];
    l.output.begin(number, begin);
    for (int64_t i = 0; i < block.tiles; i++) {
        const int64_t row = block.row(i);
        const int count = (int)(block.row(i + 1) - row);
        float sums[MOST_QUANTIZED_ROWS * PANEL] = {};
        constexpr int64_t passes = QUANTIZED_VECTORS > 2 ? QUANTIZED_VECTORS / 2 : 1;  // of a tile over the panel
        const int64_t step = PANEL * 4 / passes / block.tiles;
        const Ahead ahead{(const char*)l.panels + next * groups * GROUP * PANEL + i * groups * QUADS * passes * step, step};
        quantized_tile_of<MOST_QUANTIZED_ROWS>(
            count, x + row * stride, stride, scales_NG + row * groups, panel, offsets, groups, sums, ahead);
        for (int r = 0; r < count; r++) {
            float* totals = sums + r * PANEL;
            for (int64_t o = 0; o < width; o++) totals[o] = totals[o] * l.scales_O[left + o] + begin[o];
        }
        l.output.put(row, count, number, sums);
    }
}

inline void multiply_quantized(const QuantizedLinear& l, int threads) {
    thread_local Arena arena;
    const int64_t groups = l.groups();
    const int64_t stride = groups * GROUP + (groups * GROUP % (SETS * 2) == 0 ? 64 : 0);
    arena.reserve(Arena::bytes_for<uint8_t>(l.rows * stride) + Arena::bytes_for<float>(l.rows * groups));
    uint8_t* x = arena.take<uint8_t>(l.rows * stride);
    float* scales_NG = arena.take<float>(l.rows * groups);
    for_ranges(threads, l.rows, (1 << 14) / l.in_features, [&](int64_t first, int64_t last) {
        for (int64_t n = first; n < last; n++) {
            for (int64_t g = 0; g < groups; g++) {
                const int64_t start = g * GROUP, size = std::min(GROUP, l.in_features - start);
                scales_NG[n * groups + g] = quantize_group(l.x_NI + n * l.stride_N + start, size, x + n * stride + start);
            }
        }
    });
    const Blocks blocks(l.rows, stride, MOST_QUANTIZED_ROWS);
    for_panels(threads, blocks, l.panel_count(), [&](const Block& block, int64_t number, int64_t next) {
        quantized_panel(l, x, stride, scales_NG, number, next, block);
    });
}

inline void pack_quantized(
    const int8_t* w_OI, int64_t in_features, int64_t out_features, int8_t* panels, int32_t* offsets, int threads) {
    const int64_t count = (out_features + PANEL - 1) / PANEL, groups = (in_features + GROUP - 1) / GROUP;
    for_tasks(threads, count * groups, [&](int, int64_t task) {
        const int64_t p = task / groups, g = task % groups;
        for (int64_t o = 0; o < PANEL; o++) {
            const int8_t* row = p * PANEL + o < out_features ? w_OI + (p * PANEL + o) * in_features : nullptr;
            int32_t sum = 0;
            for (int64_t i = g * GROUP; i < (g + 1) * GROUP; i++) {
                const int8_t w = row && i < in_features ? row[i] : 0;
                panels[((p * groups * QUADS + i / 4) * PANEL + o) * 4 + i % 4] = w;
                sum += w;
            }
            offsets[task * PANEL + o] = -BIAS * sum;
        }
    });
}

}  // namespace
