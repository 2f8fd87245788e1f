// Linear layers over weights in blocks, as GGUF files have them: 32 input features of an output feature share a scale
// and a minimum, of 16 bits each, and a weight of 4 or 8 bits is value * scale + minimum. A panel keeps them as narrow;
// a piece of it is widened once for all rows, to the float32 numbers that it stands for, and then linear.h goes on:
// results are those of the same weights in float32, bit for bit.
#pragma once

#include "linear.h"

namespace {

constexpr int64_t SHARING = 32;  // input features of a block
static_assert(SUMMED % SHARING == 0, "pieces are whole blocks");

// PANEL output features of a block: their scales, their minima if there are any, then for each input feature their values
template <int BITS_OF_VALUE, bool HAS_MINS>
struct BlockForm {
    static constexpr int BITS = BITS_OF_VALUE;
    static constexpr bool MINS = HAS_MINS;
    static constexpr int ZERO = BITS == 4 && !MINS ? 8 : 0;  // what stands for 0: 4 bits are kept without a sign
    static constexpr int64_t HEADER = PANEL * sizeof(f16) * (MINS ? 2 : 1);
    static constexpr int64_t FEATURE = PANEL * BITS / 8;  // 4 bits: the first vector in the low halves of bytes
    static constexpr int64_t BYTES = HEADER + SHARING * FEATURE;

    static const f16* scales(const uint8_t* block) { return (const f16*)block; }
    static const f16* mins(const uint8_t* block) { return scales(block) + PANEL; }
};

// Scales of a block; value * scale is exact in float32, so a weight is rounded once: in the sum
template <class Form>
struct Widener {
    vec scales[PANEL_VECTORS], mins[PANEL_VECTORS];

    explicit Widener(const uint8_t* block) {
        for (int v = 0; v < PANEL_VECTORS; v++) {
            scales[v] = load(Form::scales(block) + v * VL);
            if constexpr (Form::MINS) mins[v] = load(Form::mins(block) + v * VL);
            else mins[v] = scales[v] * -(float)Form::ZERO;
        }
    }
    // the weights of one input feature, whose values are at `from`
    void operator()(const uint8_t* from, vec* weights) const {
        if constexpr (Form::BITS == 8) {
            for (int v = 0; v < PANEL_VECTORS; v++) {
                weights[v] = __builtin_convertvector(load_integers((const int8_t*)from + v * VL), vec) * scales[v];
            }
        } else {
            const ivec both = load_integers(from);
            weights[0] = low_four_bits(both) * scales[0] + mins[0];
            weights[1] = low_four_bits(both >> 4) * scales[1] + mins[1];
        }
    }
};

template <class Form>
inline void widen_block(const uint8_t* block, float* to) {
    const Widener<Form> widener(block);
    const uint8_t* from = block + Form::HEADER;
    for (int64_t i = 0; i < SHARING; i++, from += Form::FEATURE, to += PANEL) {
        vec weights[PANEL_VECTORS];
        widener(from, weights);
        for (int v = 0; v < PANEL_VECTORS; v++) store(to + v * VL, weights[v]);
    }
}

constexpr int FEW_ROWS = MANY_REGISTERS ? 4 : 3;  // with more, products take longer than widening, and hide nothing of it

// R rows times a panel, whose weights stay in registers: the sums of `tile`, in its order
template <class Form, int R, class Out>
inline void multiply_few(const LinearOf<float, Out>& l, const uint8_t* panel, int64_t number, const char* next) {
    float totals[R][PANEL];
    for (int r = 0; r < R; r++) l.output.begin(number, totals[r]);
    for (int64_t start = 0; start < l.in_features; start += SUMMED) {
        vec sums[R][PANEL_VECTORS] = {};
        for (int64_t i = start; i < std::min(start + SUMMED, l.in_features); i += SHARING) {
            const Widener<Form> widener(panel);
            const uint8_t* from = panel + Form::HEADER;
            for (int64_t line = 0; line < Form::HEADER; line += 64) __builtin_prefetch(next + line, 0, 2);
            next += Form::HEADER;
            for (int64_t k = i; k < i + SHARING; k++, from += Form::FEATURE, next += Form::FEATURE) {
                __builtin_prefetch(next, 0, 2);
                vec weights[PANEL_VECTORS];
                widener(from, weights);
                for (int r = 0; r < R; r++) {
                    const vec a = splat(l.x_NI[r * l.stride_N + k]);
                    for (int v = 0; v < PANEL_VECTORS; v++) sums[r][v] += a * weights[v];
                }
            }
            panel += Form::BYTES;
        }
        for (int r = 0; r < R; r++) {
            for (int v = 0; v < PANEL_VECTORS; v++) store(totals[r] + v * VL, load(totals[r] + v * VL) + sums[r][v]);
        }
    }
    l.output.put(0, R, number, totals[0]);
}

template <class Form, int R = FEW_ROWS, class Out>
inline void multiply_few_of(const LinearOf<float, Out>& l, const uint8_t* panel, int64_t number, const char* next) {
    if constexpr (R > 1) {
        if (l.rows < R) return multiply_few_of<Form, R - 1>(l, panel, number, next);
    }
    multiply_few<Form, R>(l, panel, number, next);
}

template <class Form>
struct InBlocks {
    static void widen(const void* panels, int64_t in_features, int64_t number, int64_t start, int64_t depth, float* to) {
        const uint8_t* from = (const uint8_t*)panels + (number * in_features + start) / SHARING * Form::BYTES;
        for (int64_t i = 0; i < depth; i += SHARING, from += Form::BYTES) widen_block<Form>(from, to + i * PANEL);
    }
    template <class Out>
    static void multiply(const LinearOf<float, Out>& l, const Block& block, int64_t number, int64_t next) {
        const int64_t size = l.in_features / SHARING * Form::BYTES;
        const uint8_t* panel = (const uint8_t*)l.panels + number * size;
        const char* then = (const char*)l.panels + next * size;
        if (l.rows <= FEW_ROWS) return multiply_few_of<Form>(l, panel, number, then);
        const bool at_once = block.tiles > 4;  // a tile's share would be a byte or two for each input feature
        float wide[SUMMED * PANEL];
        const Ahead ahead{then, at_once ? 0 : Form::BYTES / SHARING};
        multiply_panel(l, block, number, ahead, [&](int64_t start, int64_t depth) {
            const int64_t at = start / SHARING * Form::BYTES, bytes = depth / SHARING * Form::BYTES;
            for (int64_t line = 0; line < bytes && at_once; line += 64) __builtin_prefetch(then + at + line, 0, 2);
            widen(l.panels, l.in_features, number, start, depth, wide);
            return (const float*)wide;
        });
    }
};

struct BlockMatrix {
    const int8_t* values_OI;
    const f16* scales_OG;
    const f16* mins_OG;  // or null
    int64_t in_features, out_features;

    int64_t groups() const { return in_features / SHARING; }
};

template <class Form>
inline void pack_blocks(const BlockMatrix& m, uint8_t* panels, int threads) {
    const int64_t count = (m.out_features + PANEL - 1) / PANEL, groups = m.groups();
    for_tasks(threads, count, [&](int, int64_t p) {
        const int64_t width = std::min<int64_t>(PANEL, m.out_features - p * PANEL);
        for (int64_t g = 0; g < groups; g++) {
            uint8_t* block = panels + (p * groups + g) * Form::BYTES;
            memset(block, 0, Form::BYTES);
            for (int64_t o = 0; o < width; o++) {
                const int64_t row = p * PANEL + o;
                ((f16*)block)[o] = m.scales_OG[row * groups + g];
                if constexpr (Form::MINS) ((f16*)block)[PANEL + o] = m.mins_OG[row * groups + g];
                const int8_t* values = m.values_OI + row * m.in_features + g * SHARING;
                uint8_t* to = block + Form::HEADER + (Form::BITS == 8 ? o : o % VL);
                for (int64_t i = 0; i < SHARING; i++, to += Form::FEATURE) {
                    *to |= (uint8_t)((values[i] + Form::ZERO) << (Form::BITS == 4 ? o / VL * 4 : 0));
                }
            }
        }
    });
}

// rows of the matrix by number, as float32
template <class Form>
inline void block_rows(
    const uint8_t* panels, int64_t in_features, const int64_t* rows_N, int64_t count, float* out_NI, int threads) {
    const int64_t groups = in_features / SHARING;
    for_ranges(threads, count, (1 << 14) / in_features, [&](int64_t first, int64_t last) {
        for (int64_t n = first; n < last; n++) {
            const int64_t o = rows_N[n] % PANEL;
            for (int64_t g = 0; g < groups; g++) {
                const uint8_t* block = panels + (rows_N[n] / PANEL * groups + g) * Form::BYTES;
                const float scale = to_float(Form::scales(block)[o]);
                const float min = Form::MINS ? to_float(Form::mins(block)[o]) : 0.0f;
                const uint8_t* from = block + Form::HEADER + (Form::BITS == 8 ? o : o % VL);
                float* out = out_NI + n * in_features + g * SHARING;
                for (int64_t i = 0; i < SHARING; i++, from += Form::FEATURE) {
                    const int value = Form::BITS == 8 ? (int8_t)*from : (*from >> (o / VL * 4) & 15) - Form::ZERO;
                    out[i] = (float)value * scale + min;
                }
            }
        }
    });
}

}  // namespace
