// Attention of prompt chunks: bound by arithmetic, as two matrix products over tiles of queries × keys.
//
// A vector's lanes are rows (queries × the heads that share a kv head), so that maximum, sum and mask need no lane to
// meet another. Keys and values of a tile are laid out once, in float32, for all panels of rows. A row's result does
// not depend on the rows beside it: tiles of keys lie at fixed positions, and keys that it does not see change nothing.
//
// P rows of a panel, whole vectors · W vectors in P
#pragma once

#include "attention.h"

namespace {

constexpr int KEYS = 64;                       // of a tile
constexpr int WIDTH = 3;                       // vectors of a panel, at most
constexpr int DEPTH = MANY_REGISTERS ? 8 : 4;  // rows of C that gemm keeps in registers
constexpr int ROWS = 192;                      // of a task, about

struct PromptSpace {
    float* q;      // panels [D, P]
    float* out;    // panels [D, P]
    float* k;      // [KEYS, D]
    float* v;      // [KEYS, D]
    float* score;  // [KEYS, P]
    float* most;   // [rows]
    float* sum;    // [rows]
    int32_t* last;  // [rows] the last position that a row sees

    static size_t bytes(int64_t rows, int64_t size) {
        return 2 * Arena::bytes_for<float>(rows * size) + 2 * Arena::bytes_for<float>(KEYS * size) +
               Arena::bytes_for<float>(KEYS * WIDTH * VL) + 3 * Arena::bytes_for<float>(rows);
    }
    PromptSpace(Arena& arena, int64_t rows, int64_t size) {
        q = arena.take<float>(rows * size);
        out = arena.take<float>(rows * size);
        k = arena.take<float>(KEYS * size);
        v = arena.take<float>(KEYS * size);
        score = arena.take<float>(KEYS * WIDTH * VL);
        most = arena.take<float>(rows);
        sum = arena.take<float>(rows);
        last = arena.take<int32_t>(rows);
    }
};

// c [M, P] = a · b (plus c times `factor` where there is one): a[m, k] at a[m * a_m + k * a_k], b [depth, P]
template <int M, int W>
inline void gemm_rows(
    const float* a, int64_t a_m, int64_t a_k, const float* b, int64_t depth, float* c, const vec* factor) {
    vec sums[M][W];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
#pragma GCC unroll 3
        for (int w = 0; w < W; w++) sums[m][w] = factor ? load(c + (m * W + w) * VL) * factor[w] : vec{};
    }
#pragma GCC unroll 2  // or GCC moves the sums from register to register
    for (int64_t k = 0; k < depth; k++) {
        vec right[W];
#pragma GCC unroll 3
        for (int w = 0; w < W; w++) right[w] = load(b + (k * W + w) * VL);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const vec left = splat(a[m * a_m + k * a_k]);
#pragma GCC unroll 3
            for (int w = 0; w < W; w++) sums[m][w] += left * right[w];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
#pragma GCC unroll 3
        for (int w = 0; w < W; w++) store(c + (m * W + w) * VL, sums[m][w]);
    }
}

template <int W>
inline void gemm(
    const float* a, int64_t a_m, int64_t a_k, const float* b, int64_t depth, float* c, int64_t rows,
    const vec* factor) {
    int64_t m = 0;
    for (; m + DEPTH <= rows; m += DEPTH) {
        gemm_rows<DEPTH, W>(a + m * a_m, a_m, a_k, b, depth, c + m * W * VL, factor);
    }
    for (; m < rows; m++) gemm_rows<1, W>(a + m * a_m, a_m, a_k, b, depth, c + m * W * VL, factor);
}

// Cap and mask scores [keys, P]; the first key is at `position`.
template <int W>
void shape_scores(const Attention& a, float* score, int64_t position, int64_t keys, const int32_t* last, bool masked) {
    if (a.soft_cap > 0) {
        for (int64_t i = 0; i < keys * W * VL; i += VL) store(score + i, tanh_of(load(score + i)) * a.cap_scale());
    }
    if (!masked) return;
    const int32_t window = a.window > 0 && a.window < (1 << 30) ? (int32_t)a.window : 1 << 30;
    for (int w = 0; w < W; w++) {
        ivec seen;
        memcpy(&seen, last + w * VL, sizeof seen);
        for (int64_t i = 0; i < keys; i++) {
            const ivec behind = seen - (int32_t)(position + i);  // how many tokens after the key the query is
            float* at = score + (i * W + w) * VL;
            store(at, ((behind >= 0) & (behind < window)) ? load(at) : splat(-__builtin_inff()));
        }
    }
}

// Attend one panel of W vectors of rows, starting at row `row`, to one tile of keys.
template <int W>
void attend_panel(const Attention& a, PromptSpace& s, int64_t row, int64_t position, int64_t keys, bool masked) {
    const int64_t size = a.head_size;
    float* out = s.out + row * size;
    gemm<W>(s.k, size, 1, s.q + row * size, size, s.score, keys, nullptr);
    shape_scores<W>(a, s.score, position, keys, s.last + row, masked);
    vec most[W], sum[W], factor[W];
    for (int w = 0; w < W; w++) most[w] = load(s.most + row + w * VL);
    for (int64_t i = 0; i < keys; i++) {
#pragma GCC unroll 3
        for (int w = 0; w < W; w++) most[w] = vmax(most[w], load(s.score + (i * W + w) * VL));
    }
    for (int w = 0; w < W; w++) {
        factor[w] = exp2_to_127(load(s.most + row + w * VL) - most[w]);
        sum[w] = load(s.sum + row + w * VL) * factor[w];
    }
    for (int64_t i = 0; i < keys; i++) {
#pragma GCC unroll 3
        for (int w = 0; w < W; w++) {
            float* at = s.score + (i * W + w) * VL;
            const vec weight = exp2_to_127(load(at) - most[w]);
            sum[w] += weight;
            store(at, weight);
        }
    }
    for (int w = 0; w < W; w++) {
        store(s.most + row + w * VL, most[w]);
        store(s.sum + row + w * VL, sum[w]);
    }
    gemm<W>(s.v, 1, size, s.score, keys, out, size, factor);
}

struct PromptTile {
    int64_t sequence, kv_head;
    int64_t first, count;  // queries, from the sequence's first in this step
};

template <class KV>
void attend_tile(const Attention& a, const PromptTile& tile, PromptSpace& s) {
    const int64_t group = a.group(), size = a.head_size, rows = tile.count * group, padded = round_up(rows, VL);
    const int64_t start = a.query_starts[tile.sequence], queries = a.queries(tile.sequence);
    const int64_t position = a.lengths[tile.sequence] - queries + tile.first;  // of the first query
    const float* q = a.q_THD + (start + tile.first) * a.q_stride_T + tile.kv_head * group * a.q_stride_H;
    float* result = a.out_THD + ((start + tile.first) * a.heads + tile.kv_head * group) * size;
    // panel of row r: it begins at row `r - r % (WIDTH * VL)`, and is narrower at the end
    auto at = [&](int64_t r, int64_t d) {
        const int64_t first = r - r % (WIDTH * VL);
        const int64_t width = padded - first < WIDTH * VL ? padded - first : WIDTH * VL;
        return first * size + d * width + r - first;
    };
    const float score_scale = a.score_scale();
    for (int64_t r = 0; r < padded; r++) {
        const float* from = q + r / group * a.q_stride_T + r % group * a.q_stride_H;
        float* to = s.q + at(r, 0);
        const int64_t step = at(r, 1) - at(r, 0);
        for (int64_t d = 0; d < size; d++) to[d * step] = r < rows ? from[d] * score_scale : 0;
        s.last[r] = (int32_t)(position + (r < rows ? r / group : tile.count - 1));
        s.most[r] = LOWEST;
        s.sum[r] = 0;
    }
    memset(s.out, 0, padded * size * sizeof(float));

    const int64_t end = position + tile.count, seen_from = a.first_seen(position);
    const KV *keys[KEYS], *values[KEYS];
    for (int64_t tile_at = seen_from - seen_from % KEYS; tile_at < end; tile_at += KEYS) {
        const int64_t low = tile_at < seen_from ? seen_from - tile_at : 0;
        const int64_t high = end - tile_at < KEYS ? end - tile_at : KEYS;
        a.find(0, tile.sequence, tile.kv_head, tile_at + low, tile_at + high, keys + low);
        a.find(1, tile.sequence, tile.kv_head, tile_at + low, tile_at + high, values + low);
        memset(s.k, 0, low * size * sizeof(float));
        memset(s.v, 0, low * size * sizeof(float));
        for (int64_t i = low; i < high; i++) {
            widen(keys[i], size, size, s.k + i * size);
            widen(values[i], size, size, s.v + i * size);
        }
        memset(s.k + high * size, 0, (KEYS - high) * size * sizeof(float));
        memset(s.v + high * size, 0, (KEYS - high) * size * sizeof(float));
        for (int64_t row = 0; row < padded; row += WIDTH * VL) {
            const int64_t width = padded - row < WIDTH * VL ? padded - row : WIDTH * VL;
            const int64_t newest = s.last[row + width - 1], oldest = s.last[row];
            if (newest < tile_at || a.first_seen(oldest) >= tile_at + KEYS) continue;
            const int64_t seen = newest - tile_at + 1 < KEYS ? newest - tile_at + 1 : KEYS;
            const bool masked = oldest < tile_at + KEYS - 1 || a.first_seen(newest) > tile_at;
            switch (width / VL) {
                case 1: attend_panel<1>(a, s, row, tile_at, round_up(seen, DEPTH), masked); break;
                case 2: attend_panel<2>(a, s, row, tile_at, round_up(seen, DEPTH), masked); break;
                default: attend_panel<3>(a, s, row, tile_at, round_up(seen, DEPTH), masked); break;
            }
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        const float* from = s.out + at(r, 0);
        const int64_t step = at(r, 1) - at(r, 0);
        float* to = result + r / group * a.heads * size + r % group * size;
        for (int64_t d = 0; d < size; d++) to[d] = from[d * step] / s.sum[r];
    }
}

}  // namespace
