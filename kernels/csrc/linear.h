// Linear layers: y = x Wᵀ + b in float32, over weights that are packed once into panels. Anatomy of High-Performance
// Matrix Multiplication (Goto and van de Geijn, 2008) explains the blocking.
//
// A panel holds PANEL output features: for each input feature, their PANEL weights side by side, in float32 or, where
// that loses nothing, in 16 bits. A piece of it, SUMMED input features, stays in the first cache while the rows pass over
// it, a tile of up to MOST_ROWS at a time with its sums in registers. Each sum runs over the input features in their
// order, whatever the number of rows or threads: a row's result depends on nothing else. It is a sum of the pieces'
// sums: rounding errors then grow with the length of the pieces, not of the whole.
//
// N rows · I input features · O output features
#pragma once

#include <algorithm>
#include <type_traits>

#include "elementwise.h"
#include "parallel.h"
#include "gemm_microkernel.h"

namespace {

constexpr int64_t SUMMED = 128;             // input features of a piece
constexpr int64_t BLOCK_BYTES = 512 << 10;  // rows that all panels are multiplied with in turn: they stay in the second cache
constexpr int64_t FEWEST_TILES = 5, MOST_TILES = 18;  // of such a block
constexpr int64_t SETS = 64 * 16;           // floats after which a line falls into the same set of the first cache

// Row stride of a linear layer's next input: rows of a tile must not evict each other from the L1 cache.
inline int64_t row_stride(int64_t width) { return width % (SETS / 2) == 0 ? width + 16 : width; }

// Epilogue of a panel's sums. With an activation the first half of the output features are gates and the second half their
// factors; a panel holds a vector of gates and the same vector of factors.
struct Output {
    const float* bias_O;  // or null
    float* out;
    int64_t stride_N, out_features;
    Activation activation;

    int64_t width(int64_t number) const { return std::min<int64_t>(PANEL, out_features - number * PANEL); }
    // Address that a panel's sums can be stored at unchanged, or null
    float* straight(int64_t row, int64_t number) const {
        return activation == NO_ACTIVATION && width(number) == PANEL ? at(row, number) : nullptr;
    }
    float* at(int64_t row, int64_t number) const {
        return out + row * stride_N + number * (activation == NO_ACTIVATION ? PANEL : VL);
    }
    void begin(int64_t number, float* sums) const {
        memset(sums, 0, PANEL * sizeof(float));
        if (!bias_O) return;
        if (activation == NO_ACTIVATION) {
            memcpy(sums, bias_O + number * PANEL, width(number) * sizeof(float));
        } else {
            store(sums, load(bias_O + number * VL));
            store(sums + VL, load(bias_O + out_features / 2 + number * VL));
        }
    }
    // PANEL sums of each of some rows
    void put(int64_t row, int64_t rows, int64_t number, const float* sums) const {
        for (int64_t r = row; r < row + rows; r++, sums += PANEL) {
            if (activation == SILU) store(at(r, number), gated<SILU>(load(sums), load(sums + VL)));
            else if (activation == GELU) store(at(r, number), gated<GELU>(load(sums), load(sums + VL)));
            else if (width(number) == PANEL) memcpy(at(r, number), sums, PANEL * sizeof(float));
            else memcpy(at(r, number), sums, width(number) * sizeof(float));
        }
    }
};
static_assert(PANEL_VECTORS == 2, "a gate and what it multiplies");

// x in numbers of one input feature, or in pairs of two, which then count as one; Out is Output or has what it has
template <class Number, class Out = Output>
struct LinearOf {
    const Number* x_NI;
    int64_t stride_N;
    const void* panels;
    Out output;
    int64_t rows, in_features;

    int64_t panel_count() const { return (output.out_features + PANEL - 1) / PANEL; }
};
using Linear = LinearOf<float>;

// Rows first .. last - 1, which all panels are multiplied with in turn, in tiles of nearly the same size
struct Block {
    int64_t first, last, tiles;

    int64_t row(int64_t tile) const { return first + (last - first) * tile / tiles; }
};

struct Blocks {
    int64_t rows, most_rows, count;  // most_rows: of a tile

    Blocks(int64_t rows, int64_t row_bytes, int64_t most_rows) : rows(rows), most_rows(most_rows) {
        const int64_t block_rows = std::clamp(BLOCK_BYTES / row_bytes / most_rows, FEWEST_TILES, MOST_TILES) * most_rows;
        count = (rows + block_rows - 1) / block_rows;
    }
    Block operator[](int64_t b) const {
        const int64_t first = rows * b / count, last = rows * (b + 1) / count;
        return {first, last, (last - first + most_rows - 1) / most_rows};
    }
};

// body(block, panel, the panel that this thread will probably need next)
template <class Body>
inline void for_panels(int threads, const Blocks& blocks, int64_t panels, Body&& body) {
    for_shares(threads, blocks.count * panels, [&](int64_t task, int64_t next) {
        body(blocks[task / panels], task % panels, next % panels);
    });
}

// Multiply a block by a panel, read by piece_of(start, depth); prefetch what this thread probably needs next.
template <class Number, class Out, class PieceOf>
inline void multiply_panel(
    const LinearOf<Number, Out>& l, const Block& block, int64_t number, Ahead next, PieceOf&& piece_of) {
    const Out& output = l.output;
    const int64_t tiles = block.tiles, fetch_step = next.step / tiles;
    float begin[PANEL], held[MOST_TILES * MOST_ROWS * PANEL];
    output.begin(number, begin);
    for (int64_t start = 0; start < l.in_features; start += SUMMED) {
        const int64_t depth = std::min(SUMMED, l.in_features - start);
        const auto* piece = piece_of(start, depth);
        const bool last = start + depth == l.in_features;
        for (int64_t i = 0; i < tiles; i++) {
            const int64_t row = block.row(i);
            const int count = (int)(block.row(i + 1) - row);
            float* sums = held + (row - block.first) * PANEL;
            float* straight = last ? output.straight(row, number) : nullptr;
            tile_of<MOST_ROWS>(
                count, l.x_NI + row * l.stride_N + start, l.stride_N, piece, depth, start ? sums : begin, start ? PANEL : 0,
                straight ? straight : sums, straight ? output.stride_N : PANEL,
                {next.at + (start * tiles + i * depth) * fetch_step, fetch_step});
            if (last && !straight) output.put(row, count, number, sums);
        }
    }
}

// `depth` input features of a panel as float32
template <class Weight>
inline void widen_piece(const Weight* from, int64_t depth, float* to) {
    for (int64_t i = 0; i < depth * PANEL; i += VL) store(to + i, load(from + i));
}

template <class Weight, class Number, class Out>
inline void multiply_panel(const LinearOf<Number, Out>& l, const Block& block, int64_t number, int64_t next) {
    const int64_t size = l.in_features * PANEL;
    const Weight* panel = (const Weight*)l.panels + number * size;
    const Ahead ahead{(const char*)((const Weight*)l.panels + next * size), PANEL * sizeof(Weight)};
    if constexpr (!std::is_same_v<Weight, Number>) {
        if (block.tiles > 2) {  // converted once, not once a tile
            float wide[SUMMED * PANEL];
            return multiply_panel(l, block, number, ahead, [&](int64_t start, int64_t depth) {
                widen_piece(panel + start * PANEL, depth, wide);
                return (const float*)wide;
            });
        }
    }
    multiply_panel(l, block, number, ahead, [&](int64_t start, int64_t) { return panel + start * PANEL; });
}

// A matrix whose panels are weights of one type: one of the ways to keep it
template <class Weight>
struct Plain {
    static void widen(const void* panels, int64_t in_features, int64_t number, int64_t start, int64_t depth, float* to) {
        widen_piece((const Weight*)panels + (number * in_features + start) * PANEL, depth, to);
    }
    template <class Number, class Out>
    static void multiply(const LinearOf<Number, Out>& l, const Block& block, int64_t number, int64_t next) {
        multiply_panel<Weight>(l, block, number, next);
    }
};

// Multiply all rows by all panels of a matrix in this form; throws std::bad_alloc before any thread starts.
template <class Kept, class Number, class Out>
inline void multiply(LinearOf<Number, Out> l, int threads) {
    thread_local Arena arena;
    if (row_stride(l.stride_N) != l.stride_N && l.rows > 4) {
        const int64_t stride = l.in_features + 16;
        arena.reserve(Arena::bytes_for<Number>(l.rows * stride));
        Number* copy = arena.take<Number>(l.rows * stride);
        for_ranges(threads, l.rows, (1 << 15) / l.in_features, [&](int64_t first, int64_t last) {
            for (int64_t n = first; n < last; n++) {
                memcpy(copy + n * stride, l.x_NI + n * l.stride_N, l.in_features * sizeof(Number));
            }
        });
        l.x_NI = copy, l.stride_N = stride;
    }
    const Blocks blocks(l.rows, l.in_features * sizeof(Number), MOST_ROWS);
    for_panels(threads, blocks, l.panel_count(), [&](const Block& block, int64_t number, int64_t next) {
        Kept::multiply(l, block, number, next);
    });
}

// Zeros pad the last panel and the last pair
template <class Weight>
inline void pack(const float* w_OI, int64_t in_features, int64_t out_features, Weight* panels, int threads) {
    const int64_t count = (out_features + PANEL - 1) / PANEL, numbers = numbers_of<Weight>(in_features);
    for_tasks(threads, count, [&](int, int64_t p) {
        Weight* to = panels + p * numbers * PANEL;
        const float* rows = w_OI + p * PANEL * in_features;
        const int64_t width = std::min<int64_t>(PANEL, out_features - p * PANEL);
        auto weight = [&](int64_t o, int64_t i) { return o < width && i < in_features ? rows[o * in_features + i] : 0.0f; };
        for (int64_t i = 0; i < in_features; i += TOGETHER<Weight>) {
            for (int64_t o = 0; o < PANEL; o++, to++) {
                if constexpr (std::is_same_v<Weight, pair>) {
                    for (int k = 0; k < 2; k++) convert(weight(o, i + k), to->features + k);
                } else {
                    convert(weight(o, i), to);
                }
            }
        }
    });
}

}  // namespace
