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

// the weights of SHARING input features; value * scale is exact in float32, so one rounding is left: of the sum
template <class Form>
inline void widen(const uint8_t* block, float* to) {
    vec scales[PANEL_VECTORS], mins[PANEL_VECTORS];
    for (int v = 0; v < PANEL_VECTORS; v++) {
        scales[v] = load(Form::scales(block) + v * VL);
        if constexpr (Form::MINS) mins[v] = load(Form::mins(block) + v * VL);
        else mins[v] = scales[v] * -(float)Form::ZERO;
    }
    const uint8_t* from = block + Form::HEADER;
    for (int64_t i = 0; i < SHARING; i++, from += Form::FEATURE, to += PANEL) {
        ivec values[PANEL_VECTORS];
        if constexpr (Form::BITS == 8) {
            for (int v = 0; v < PANEL_VECTORS; v++) values[v] = load_integers((const int8_t*)from + v * VL);
        } else {
            const ivec both = load_integers(from);
            values[0] = both & 15, values[1] = both >> 4;
        }
        for (int v = 0; v < PANEL_VECTORS; v++) {
            vec weights = __builtin_convertvector(values[v], vec) * scales[v];
            if constexpr (Form::BITS == 4) weights += mins[v];
            store(to + v * VL, weights);
        }
    }
}

template <class Form>
inline void multiply_blocks(const Linear& l, int threads) {
    multiply_panels(l, threads, [](const Linear& l, const Block& block, int64_t number, int64_t next) {
        const int64_t size = l.in_features / SHARING * Form::BYTES;
        const uint8_t* panel = (const uint8_t*)l.panels + number * size;
        const Ahead ahead{(const char*)l.panels + next * size, Form::BYTES / SHARING};
        float wide[SUMMED * PANEL];
        multiply_panel(l, block, number, ahead, [&](int64_t start, int64_t depth) {
            for (int64_t i = 0; i < depth; i += SHARING) {
                widen<Form>(panel + (start + i) / SHARING * Form::BYTES, wide + i * PANEL);
            }
            return (const float*)wide;
        });
    });
}

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
