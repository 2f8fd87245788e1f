// Linear layers: y = x Wᵀ + b in float32, over weights that are packed once into panels. Analysing High-Performance
// Matrix Multiplication (Goto and van de Geijn, 2008) explains the blocking.
//
// A panel holds PANEL output features: for each input feature, their PANEL weights side by side, in float32 or, where
// that loses nothing, in 16 bits. A tile of up to MOST_ROWS rows times a panel keeps its sums in registers. Each sum runs
// over the input features in their order, whatever the number of rows or threads: a row's result depends on nothing else.
// It is a sum of sums over SUMMED features: rounding errors then grow with the length of the pieces, not of the whole.
//
// N rows · I input features · O output features
#pragma once

#include <algorithm>
#include <type_traits>

#include "parallel.h"
#include "simd.h"

namespace {

constexpr int PANEL_VECTORS = 2;
constexpr int PANEL = PANEL_VECTORS * VL;
constexpr int MOST_ROWS = MANY_REGISTERS ? 14 : 6;
constexpr int64_t MOST_DEPTH = 1536;        // input features of one pass: a panel's share stays in the second cache
constexpr int64_t SUMMED = 128;             // input features of a sum that begins at zero
constexpr int64_t BLOCK_BYTES = 512 << 10;  // so do the rows that all panels are multiplied with in turn
constexpr int64_t SETS = 64 * 16;           // floats after which a line falls into the same set of the first cache

struct Linear {
    const float* x_NI;
    int64_t stride_N;
    const void* panels;
    const float* bias_O;  // or null
    float* out_NO;
    int64_t rows, in_features, out_features;
};

// memory that will be needed, asked for a little with every input feature
struct Ahead {
    const char* at;
    int64_t step;
};

// R rows of x times a panel, summed and then added to what `from` holds
template <int R, class Weight>
inline void tile(
    const float* x, int64_t stride, const Weight* panel, int64_t depth, const float* from, int64_t from_stride, float* to,
    int64_t to_stride, Ahead ahead) {
    vec sums[R][PANEL_VECTORS];
#pragma GCC unroll 14
    for (int r = 0; r < R; r++) {
        for (int v = 0; v < PANEL_VECTORS; v++) sums[r][v] = splat(0.0f);
    }
    // fourteen rows from three pointers and two distances: there are no registers for more
    const char *x0 = (const char*)x, *x5 = (const char*)(x + 5 * stride), *x10 = (const char*)(x + 10 * stride);
    const int64_t one = 4 * stride, three = 12 * stride;
    const int64_t distance[5] = {0, one, 2 * one, three, 4 * one};
    for (const Weight* end = panel + depth * PANEL; panel < end; panel += PANEL) {
        for (size_t line = 0; line < PANEL * sizeof(Weight); line += 64) __builtin_prefetch(ahead.at + line, 0, 2);
        ahead.at += ahead.step;
        vec weights[PANEL_VECTORS];
        for (int v = 0; v < PANEL_VECTORS; v++) weights[v] = load(panel + v * VL);
#pragma GCC unroll 14
        for (int r = 0; r < R; r++) {
            const vec a = splat(*(const float*)((r < 5 ? x0 : r < 10 ? x5 : x10) + distance[r % 5]));
            for (int v = 0; v < PANEL_VECTORS; v++) sums[r][v] += a * weights[v];
        }
        x0 += 4, x5 += 4, x10 += 4;
        asm("" : "+r"(x0), "+r"(x5), "+r"(x10));  // or the compiler keeps a pointer per row, on the stack
    }
#pragma GCC unroll 14
    for (int r = 0; r < R; r++) {
        for (int v = 0; v < PANEL_VECTORS; v++) {
            store(to + r * to_stride + v * VL, load(from + r * from_stride + v * VL) + sums[r][v]);
        }
    }
}

template <int R, class Weight>
inline void tile_of(
    int rows, const float* x, int64_t stride, const Weight* panel, int64_t depth, const float* from, int64_t from_stride,
    float* to, int64_t to_stride, Ahead ahead) {
    if constexpr (R > 1) {
        if (rows < R) return tile_of<R - 1>(rows, x, stride, panel, depth, from, from_stride, to, to_stride, ahead);
    }
    tile<R>(x, stride, panel, depth, from, from_stride, to, to_stride, ahead);
}

// One panel, over `depth` input features from `start`, for the rows first .. last - 1.
struct Turn {
    int64_t number, start, depth, first, last;
    Ahead ahead;  // the panel that this thread will probably need next

    int64_t tiles() const { return (last - first + MOST_ROWS - 1) / MOST_ROWS; }
};

template <class Weight>
inline void take_turn(const Linear& l, const Weight* panel, const Turn& t) {
    const int64_t left = t.number * PANEL, width = std::min<int64_t>(PANEL, l.out_features - left);
    float begin[PANEL] = {}, edge[MOST_ROWS * PANEL], held[MOST_ROWS * PANEL];
    if (l.bias_O) memcpy(begin, l.bias_O + left, width * sizeof(float));
    const int64_t tiles = t.tiles(), ahead_step = t.ahead.step / tiles;
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t row = t.first + (t.last - t.first) * i / tiles;
        const int count = (int)(t.first + (t.last - t.first) * (i + 1) / tiles - row);
        float* out = l.out_NO + row * l.out_features + left;
        float* to = width == PANEL ? out : edge;
        const int64_t to_stride = width == PANEL ? l.out_features : PANEL;
        if (to == edge && t.start) for (int r = 0; r < count; r++) memcpy(edge + r * PANEL, out + r * l.out_features, width * 4);
        for (int64_t done = 0; done < t.depth; done += SUMMED) {
            const Ahead ahead{t.ahead.at + (i * t.depth + done) * ahead_step, ahead_step};
            const int64_t depth = std::min(SUMMED, t.depth - done);
            const bool last = done + depth == t.depth;
            const float* from = done ? held : t.start ? to : begin;
            const int64_t from_stride = done ? PANEL : t.start ? to_stride : 0;
            tile_of<MOST_ROWS>(count, l.x_NI + row * l.stride_N + t.start + done, l.stride_N, panel + done * PANEL, depth,
                               from, from_stride, last ? to : held, last ? to_stride : PANEL, ahead);
        }
        if (to == edge) for (int r = 0; r < count; r++) memcpy(out + r * l.out_features, edge + r * PANEL, width * 4);
    }
}

template <class Weight>
inline void take_turn_widened(const Linear& l, const Weight* panel, const Turn& t) {
    if constexpr (!std::is_same_v<Weight, float>) {
        if (t.tiles() > 2) {  // converted once, not once a tile
            thread_local Arena arena;
            arena.reserve(Arena::bytes_for<float>(t.depth * PANEL));
            float* wide = arena.take<float>(t.depth * PANEL);
            for (int64_t i = 0; i < t.depth * PANEL; i += VL) store(wide + i, load(panel + i));
            return take_turn(l, (const float*)wide, t);
        }
    }
    take_turn(l, panel, t);
}

// body(panel, the panel that this thread will probably need next, first row, last row): blocks of about `block` rows that
// all panels are multiplied with in turn
template <class Layer, class Body>
inline void for_panels(int threads, const Layer& l, int64_t block, Body&& body) {
    const int64_t panels = (l.out_features + PANEL - 1) / PANEL, blocks = (l.rows + block - 1) / block;
    for_tasks(threads, blocks * panels, [&](int, int64_t task) {
        const int64_t b = task / panels, number = task % panels;
        body(number, std::min(number + threads, panels - 1), l.rows * b / blocks, l.rows * (b + 1) / blocks);
    });
}

template <class Weight>
inline void multiply(Linear l, int threads) {
    thread_local Arena arena;
    if (l.stride_N % (SETS / 2) == 0 && l.rows > 4) {  // the rows of a tile would drive each other out of the cache
        const int64_t stride = l.in_features + 16;
        arena.reserve(Arena::bytes_for<float>(l.rows * stride));
        float* copy = arena.take<float>(l.rows * stride);
        for_ranges(threads, l.rows, (1 << 15) / l.in_features, [&](int64_t first, int64_t last) {
            for (int64_t n = first; n < last; n++) memcpy(copy + n * stride, l.x_NI + n * l.stride_N, l.in_features * 4);
        });
        l.x_NI = copy, l.stride_N = stride;
    }
    const int64_t passes = (l.in_features + MOST_DEPTH - 1) / MOST_DEPTH;
    const int64_t block = BLOCK_BYTES / 4 / std::min(l.in_features, MOST_DEPTH);
    for (int64_t pass = 0; pass < passes; pass++) {
        const int64_t start = l.in_features * pass / passes, end = l.in_features * (pass + 1) / passes;
        auto panel = [&](int64_t number) { return (const Weight*)l.panels + (number * l.in_features + start) * PANEL; };
        for_panels(threads, l, std::max<int64_t>(block, 2 * MOST_ROWS), [&](int64_t number, int64_t next, int64_t first, int64_t last) {
            const Ahead ahead{(const char*)panel(next), PANEL * sizeof(Weight)};
            take_turn_widened(l, panel(number), {number, start, end - start, first, last, ahead});
        });
    }
}

template <class Weight>
inline void pack(const float* w_OI, int64_t in_features, int64_t out_features, Weight* panels, int threads) {
    const int64_t count = (out_features + PANEL - 1) / PANEL;
    for_tasks(threads, count, [&](int, int64_t p) {
        Weight* panel = panels + p * in_features * PANEL;
        const float* rows = w_OI + p * PANEL * in_features;
        const int64_t width = std::min<int64_t>(PANEL, out_features - p * PANEL);
        for (int64_t i = 0; i < in_features; i++) {
            for (int64_t o = 0; o < PANEL; o++) convert(o < width ? rows[o * in_features + i] : 0.0f, panel + i * PANEL + o);
        }
    });
}

}  // namespace
