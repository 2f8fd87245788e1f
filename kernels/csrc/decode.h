// Attention of one query per sequence: bound by memory, so each key and value is read once for all heads that share it.
//
// A context is cut at fixed positions into pieces; each gives a maximum, a sum and a weighted value per head, and these
// are joined in order. The cut depends on positions alone: results are the same whoever computes which piece.
#pragma once

#include "attention.h"

namespace {

constexpr int PIECE = 256;   // keys
constexpr int STAGE = 64;    // keys whose values stay in the first cache while heads pass over them
constexpr int AHEAD = 40;    // keys that are fetched in advance into the second cache, which waits for more lines at once
constexpr int NEAR = 8;      // and from there into the first
constexpr int HEADS = 4;     // query heads that are computed together

constexpr int lanes_of(int heads) { return heads == 3 ? 4 : heads; }

struct DecodeSpace {
    int64_t rows[PIECE + AHEAD + VL];
    float* q;       // [G, P], P = D in whole vectors
    float* scores;  // per HEADS heads [PIECE + VL keys, lanes]
    float* staged;  // [STAGE + VL, P]

    static size_t bytes(int64_t group, int64_t padded) {
        return Arena::bytes_for<float>(group * padded) +
               Arena::bytes_for<float>((group + HEADS) * (PIECE + VL)) +
               Arena::bytes_for<float>((STAGE + VL) * padded) + Arena::bytes_for<DecodeSpace>(1);
    }
    static DecodeSpace* make(Arena& arena, int64_t group, int64_t padded) {
        DecodeSpace* space = arena.take<DecodeSpace>(1);
        space->q = arena.take<float>(group * padded);
        space->scores = arena.take<float>((group + HEADS) * (PIECE + VL));
        space->staged = arena.take<float>((STAGE + VL) * padded);
        return space;
    }
    float* scores_of(int64_t head) { return scores + head * (PIECE + VL); }
};

// per head of a piece: its maximum and its sum of weights, then the weighted values [G, P]
inline int64_t partial_size(int64_t group, int64_t padded) { return round_up(2 * group, VL) + group * padded; }

template <class Body>
inline void with_heads(int64_t heads, Body&& body) {
    switch (heads) {
        case 1: body(std::integral_constant<int, 1>{}); break;
        case 2: body(std::integral_constant<int, 2>{}); break;
        case 3: body(std::integral_constant<int, 3>{}); break;
        default: body(std::integral_constant<int, 4>{}); break;
    }
}

// body(W, d) over `padded` numbers, W vectors from d on: as many as MOST, else 2, else 1
template <int MOST, class Body>
__attribute__((always_inline)) inline void over_parts(int64_t padded, Body&& body) {
    int64_t d = 0;
    for (; d + MOST * VL <= padded; d += MOST * VL) body(std::integral_constant<int, MOST>{}, d);
    for (; d + 2 * VL <= padded; d += 2 * VL) body(std::integral_constant<int, 2>{}, d);
    if (d < padded) body(std::integral_constant<int, 1>{}, d);
}

// whether `load_two` takes the numbers of a head out of their order; copies of heads of no whole vectors are float32
template <class KV>
inline bool is_arranged(int64_t size) {
    return std::is_same_v<KV, bf16> && size % VL == 0;
}

template <int W, class KV>
inline void load_part(const KV* from, vec* to) {
    if constexpr (W == 1) to[0] = load(from);
    else for (int w = 0; w < W; w += 2) load_two(from + w * VL, to + w);
}

template <int W, class KV>
inline void prefetch_part(const KV* cache, const int64_t* rows) {
    const char *far = (const char*)(cache + rows[AHEAD]), *near = (const char*)(cache + rows[NEAR]);
#pragma GCC unroll 8
    for (size_t at = 0; at < W * VL * sizeof(KV); at += 64) {
        __builtin_prefetch(far + at, 0, 2);
        __builtin_prefetch(near + at, 0, 3);
    }
}

// scores [keys, lanes_of(G)] of q [G, padded], arranged as KV; rows goes on for a vector and AHEAD keys beyond `keys`
template <class KV, int G>
void score_keys(const float* q, const KV* cache, const int64_t* rows, int64_t keys, int64_t padded, float* scores) {
    constexpr int LANES = lanes_of(G), KEYS = VL / LANES;
    for (int64_t i = 0; i < keys; i += KEYS) {
        vec sums[VL] = {};
        over_parts<2>(padded, [&](auto width, int64_t d) __attribute__((always_inline)) {
            constexpr int W = decltype(width)::value;
            vec q_part[G][W];
#pragma GCC unroll 4
            for (int h = 0; h < G; h++) {
                for (int w = 0; w < W; w++) q_part[h][w] = load(q + h * padded + d + w * VL);
            }
#pragma GCC unroll 16
            for (int b = 0; b < KEYS; b++) {
                prefetch_part<W>(cache + d, rows + i + b);
                vec k[W];
                load_part<W>(cache + rows[i + b] + d, k);
#pragma GCC unroll 4
                for (int h = 0; h < G; h++) {
                    for (int w = 0; w < W; w++) sums[b * LANES + h] += k[w] * q_part[h][w];
                }
            }
        });
        store(scores + i * LANES, row_sums<G, LANES>(sums));
    }
}

// scores to weights, in place; the maximum and the sum of each head
template <int G>
void weigh(float* scores, int64_t keys, float cap_scale, float* maximum, float* sum) {
    constexpr int LANES = lanes_of(G);
    const int64_t count = round_up(keys * LANES, VL);
    if (cap_scale > 0) {
        for (int64_t i = 0; i < count; i += VL) store(scores + i, tanh_of(load(scores + i)) * cap_scale);
    }
    for (int64_t i = keys * LANES; i < count; i++) scores[i] = -__builtin_inff();
    vec most = splat(LOWEST);
    for (int64_t i = 0; i < count; i += VL) most = vmax(most, load(scores + i));
    float by_lane[VL];
    store(by_lane, most);
    for (int i = LANES; i < VL; i++) {
        if (by_lane[i] > by_lane[i % LANES]) by_lane[i % LANES] = by_lane[i];
    }
    for (int i = LANES; i < VL; i++) by_lane[i] = by_lane[i % LANES];
    most = load(by_lane);
    vec total = {};
    for (int64_t i = 0; i < count; i += VL) {
        const vec weight = exp2_to_127(load(scores + i) - most);
        total += weight;
        store(scores + i, weight);
    }
    for (int h = 0; h < G; h++) maximum[h] = by_lane[h];
    store(by_lane, total);
    for (int h = 0; h < G; h++) {
        sum[h] = 0;
        for (int i = h; i < VL; i += LANES) sum[h] += by_lane[i];
    }
}

// out [G, padded], arranged as KV, += weights · values
template <class KV, int G>
void sum_values(
    const float* weights, const KV* cache, const int64_t* rows, int64_t keys, int64_t padded, float* out) {
    constexpr int LANES = lanes_of(G), WIDE = G == 4 && !MANY_REGISTERS ? 2 : 4;
    over_parts<WIDE>(padded, [&](auto width, int64_t d) __attribute__((always_inline)) {
        constexpr int W = decltype(width)::value;
        vec sums[G][W];
#pragma GCC unroll 4
        for (int h = 0; h < G; h++) {
#pragma GCC unroll 4
            for (int w = 0; w < W; w++) sums[h][w] = load(out + h * padded + d + w * VL);
        }
        for (int64_t i = 0; i < keys; i++) {
            prefetch_part<W>(cache + d, rows + i);
            vec v[W], weight[G];
            load_part<W>(cache + rows[i] + d, v);
#pragma GCC unroll 4
            for (int h = 0; h < G; h++) weight[h] = splat(weights[i * LANES + h]);
#pragma GCC unroll 4
            for (int h = 0; h < G; h++) {
#pragma GCC unroll 4
                for (int w = 0; w < W; w++) sums[h][w] += weight[h] * v[w];
            }
        }
#pragma GCC unroll 4
        for (int h = 0; h < G; h++) {
#pragma GCC unroll 4
            for (int w = 0; w < W; w++) store(out + h * padded + d + w * VL, sums[h][w]);
        }
    });
}

// Partial result of positions first .. last - 1, at most PIECE
template <class KV>
void attend_piece(
    const Attention& a, int64_t sequence, int64_t kv_head, int64_t first, int64_t last, DecodeSpace& space,
    float* partial) {
    const int64_t group = a.group(), size = a.head_size, padded = round_up(size, VL), keys = last - first;
    const bool whole = size == padded;
    const KV* k_cache = (const KV*)a.k_NKBD;
    const KV* v_cache = (const KV*)a.v_NKBD;
    a.rows(sequence, kv_head, first, last, space.rows);
    for (int64_t i = keys; i < keys + AHEAD + VL; i++) space.rows[i] = space.rows[keys - 1];
    const float* q = a.q_THD + a.query_starts[sequence] * a.q_stride_T + kv_head * group * a.q_stride_H;
    for (int64_t h = 0; h < group; h++) {
        float* scaled = is_arranged<KV>(size) ? space.staged : space.q + h * padded;
        const float* from = q + h * a.q_stride_H;
        for (int64_t d = 0; d < size; d++) scaled[d] = from[d] * a.score_scale();
        for (int64_t d = size; d < padded; d++) scaled[d] = 0;
        if (is_arranged<KV>(size)) arrange(scaled, size, space.q + h * padded);
    }
    float* maximum = partial;
    float* sum = partial + group;
    float* values = partial + round_up(2 * group, VL);
    memset(values, 0, group * padded * sizeof(float));

    // a head size that is no whole number of vectors goes through padded copies
    int64_t copied_rows[STAGE + VL + AHEAD];
    for (int64_t i = 0; i < STAGE + VL + AHEAD; i++) copied_rows[i] = (i < STAGE ? i : 0) * padded;
    auto copy = [&](const KV* cache, int64_t i, int64_t count) {
        for (int64_t j = 0; j < count; j++) widen(cache + space.rows[i + j], size, padded, space.staged + j * padded);
        for (int64_t j = count; j < round_up(count, VL) && j < STAGE; j++) {
            memset(space.staged + j * padded, 0, padded * sizeof(float));
        }
    };
    auto per_heads = [&](auto&& body) {
        for (int64_t h = 0; h < group; h += HEADS) with_heads(group - h, [&](auto count) { body(count, h); });
    };
    for (int64_t i = 0; i < keys; i += STAGE) {
        const int64_t count = keys - i < STAGE ? keys - i : STAGE;
        if (!whole) copy(k_cache, i, count);
        if (i + STAGE >= keys) {  // the first values, which nothing else would fetch in time
            for (int64_t j = 0; j < AHEAD && j < keys; j++) {
                prefetch(v_cache + space.rows[j], size * (int64_t)sizeof(KV));
            }
        }
        per_heads([&](auto heads, int64_t h) {
            constexpr int G = decltype(heads)::value;
            float* scores = space.scores_of(h) + i * lanes_of(G);
            if (whole) score_keys<KV, G>(space.q + h * padded, k_cache, space.rows + i, count, padded, scores);
            else score_keys<float, G>(space.q + h * padded, space.staged, copied_rows, count, padded, scores);
        });
    }
    per_heads([&](auto heads, int64_t h) {
        constexpr int G = decltype(heads)::value;
        weigh<G>(space.scores_of(h), keys, a.cap_scale(), maximum + h, sum + h);
    });
    for (int64_t i = 0; i < keys; i += STAGE) {
        const int64_t count = keys - i < STAGE ? keys - i : STAGE;
        if (!whole) copy(v_cache, i, count);
        per_heads([&](auto heads, int64_t h) {
            constexpr int G = decltype(heads)::value;
            const float* weights = space.scores_of(h) + i * lanes_of(G);
            float* out = values + h * padded;
            if (whole) sum_values<KV, G>(weights, v_cache, space.rows + i, count, padded, out);
            else sum_values<float, G>(weights, space.staged, copied_rows, count, padded, out);
        });
    }
}

// The output of one query and kv head from its context's partial results, in order
template <class KV>
void join_pieces(const Attention& a, int64_t sequence, int64_t kv_head, float* partials, int64_t pieces) {
    const int64_t group = a.group(), size = a.head_size, padded = round_up(size, VL);
    const int64_t stride = partial_size(group, padded), values_at = round_up(2 * group, VL);
    float* out = a.out_THD + (a.query_starts[sequence] * a.heads + kv_head * group) * size;
    for (int64_t h = 0; h < group; h++) {
        float most = LOWEST, sum = 0;
        for (int64_t i = 0; i < pieces; i++) {
            if (partials[i * stride + h] > most) most = partials[i * stride + h];
        }
        float* joined = partials + values_at + h * padded;
        for (int64_t i = 0; i < pieces; i++) {
            const float* piece = partials + i * stride;
            const vec factor = exp2_to_127(splat(piece[h] - most));
            sum += piece[group + h] * factor[0];
            for (int64_t d = 0; d < padded; d += VL) {
                const vec part = load(piece + values_at + h * padded + d) * factor;
                store(joined + d, i == 0 ? part : load(joined + d) + part);
            }
        }
        for (int64_t d = 0; d < padded; d += VL) store(joined + d, load(joined + d) / sum);
        if (is_arranged<KV>(size)) restore(joined, size, out + h * size);
        else memcpy(out + h * size, joined, size * sizeof(float));
    }
}

}  // namespace
