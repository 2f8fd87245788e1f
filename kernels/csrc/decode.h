// Attention of one query per sequence: bound by memory, so each key and value is read once for all heads that share it.
// The kv heads of a piece take turns, so that memory is read about in its order.
//
// A context is cut at fixed positions into pieces; each gives a maximum, a sum and a weighted value per head, and these
// are joined in order. The cut depends on positions alone: results are the same whoever computes which piece.
#pragma once

#include "attention.h"

namespace {

constexpr int PIECE = 256;   // keys
constexpr int RUN = 64;      // keys of a kv head that stay in the first cache while its query heads pass over them
constexpr int HEADS = 4;     // query heads that are computed together
constexpr int64_t FETCHED = 24 << 10;  // bytes that are on the way into the second cache, which waits for most at once
constexpr int64_t MOST_AHEAD = 128;    // keys, the same
constexpr int64_t PAGES_AHEAD = 64;    // keys beyond: where their pages lie is looked up, for which a fetch would wait
constexpr int64_t SOON = 16;           // keys on the way from there into the first cache

constexpr int lanes_of(int heads) { return heads == 3 ? 4 : heads; }

// What a piece is about: positions first .. last - 1, at most PIECE, of `heads` kv heads from `kv_head` on, which change
// every `turn` keys (at most RUN)
struct Span {
    int64_t sequence, kv_head, heads, turn, first, last;
    int64_t keys() const { return last - first; }
};

template <class KV>
struct DecodeSpace {
    // in the first kv head: this piece's keys, its values, and the next one's first keys, as they are read
    const KV* places[2 * PIECE + MOST_AHEAD + PAGES_AHEAD + VL];
    float* q;       // [kv heads, G, P], P = D in whole vectors
    float* scores;  // [kv heads], per HEADS heads [PIECE + VL keys, lanes]
    float* staged;  // [RUN + VL, P]

    static size_t bytes(int64_t heads, int64_t group, int64_t padded) {
        return Arena::bytes_for<float>(heads * group * padded) +
               Arena::bytes_for<float>(heads * (group + HEADS) * (PIECE + VL)) +
               Arena::bytes_for<float>((RUN + VL) * padded) + Arena::bytes_for<DecodeSpace<KV>>(1);
    }
    static DecodeSpace* make(Arena& arena, int64_t heads, int64_t group, int64_t padded) {
        DecodeSpace* space = arena.take<DecodeSpace<KV>>(1);
        space->q = arena.take<float>(heads * group * padded);
        space->scores = arena.take<float>(heads * (group + HEADS) * (PIECE + VL));
        space->staged = arena.take<float>((RUN + VL) * padded);
        return space;
    }
    float* scores_of(int64_t kv_head, int64_t group, int64_t head) {
        return scores + (kv_head * (group + HEADS) + head) * (PIECE + VL);
    }

    // how many places ahead to fetch
    int64_t find(const Attention& a, const Span& at, const Span& next) {
        const int64_t keys = at.keys(), wanted = FETCHED / (at.heads * a.head_size * (int64_t)sizeof(KV));
        const int64_t ahead = wanted < 1 ? 1 : wanted < MOST_AHEAD ? wanted : MOST_AHEAD;
        const int64_t wanted_places = ahead + PAGES_AHEAD;
        const int64_t known = next.keys() < wanted_places ? next.keys() : wanted_places;
        const KV** end = places + 2 * keys;
        a.find(0, at.sequence, at.kv_head, at.first, at.last, places);
        a.find(1, at.sequence, at.kv_head, at.first, at.last, places + keys);
        a.find(0, next.sequence, next.kv_head, next.first, next.first + known, end);
        for (int64_t i = known; i < wanted_places + VL; i++) end[i] = end[known - 1];
        return ahead;
    }
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

// Keys or values that are computed, in the kv head that begins `offset` numbers behind the places' first
template <class KV>
struct Run {
    const KV* const* places;
    int64_t keys, offset, ahead;

    const KV* operator[](int64_t i) const { return places[i] + offset; }

    template <int W>
    void fetch(int64_t i, int64_t d) const {
        const char* later = (const char*)(places[i + ahead] + offset + d);
        const char* soon = (const char*)(places[i + SOON] + offset + d);
#pragma GCC unroll 8
        for (size_t at = 0; at < W * VL * sizeof(KV); at += 64) {
            __builtin_prefetch(later + at, 0, 2);
            __builtin_prefetch(soon + at, 0, 3);
        }
    }
};

// scores [keys, lanes_of(G)] of q [G, padded], arranged as KV; there are places for up to a vector beyond the keys
template <class KV, int G, bool FETCH>
void score_keys(const float* q, const Run<KV>& run, int64_t padded, float* scores) {
    constexpr int LANES = lanes_of(G), KEYS = VL / LANES;
    for (int64_t i = 0; i < run.keys; i += KEYS) {
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
                if constexpr (FETCH) run.template fetch<W>(i + b, d);
                vec k[W];
                load_part<W>(run[i + b] + d, k);
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
template <class KV, int G, bool FETCH>
void sum_values(const float* weights, const Run<KV>& run, int64_t padded, float* out) {
    constexpr int LANES = lanes_of(G), WIDE = G == 4 && !MANY_REGISTERS ? 2 : 4;
    over_parts<WIDE>(padded, [&](auto width, int64_t d) __attribute__((always_inline)) {
        constexpr int W = decltype(width)::value;
        vec sums[G][W];
#pragma GCC unroll 4
        for (int h = 0; h < G; h++) {
#pragma GCC unroll 4
            for (int w = 0; w < W; w++) sums[h][w] = load(out + h * padded + d + w * VL);
        }
        for (int64_t i = 0; i < run.keys; i++) {
            if constexpr (FETCH) run.template fetch<W>(i, d);
            vec v[W], weight[G];
            load_part<W>(run[i] + d, v);
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

// Partial result of a piece, one kv head's after another
template <class KV>
void attend_piece(const Attention& a, const Span& at, const Span& next, DecodeSpace<KV>& space, float* partial) {
    const int64_t group = a.group(), size = a.head_size, padded = round_up(size, VL), keys = at.keys();
    const int64_t stride = partial_size(group, padded), between = a.block_size * size;  // partials; heads of a block
    const bool whole = size == padded;
    const int64_t ahead = space.find(a, at, next);
    const float* q = a.q_THD + a.query_starts[at.sequence] * a.q_stride_T + at.kv_head * group * a.q_stride_H;
    for (int64_t h = 0; h < at.heads * group; h++) {
        float* scaled = is_arranged<KV>(size) ? space.staged : space.q + h * padded;
        const float* from = q + h * a.q_stride_H;
        for (int64_t d = 0; d < size; d++) scaled[d] = from[d] * a.score_scale();
        for (int64_t d = size; d < padded; d++) scaled[d] = 0;
        if (is_arranged<KV>(size)) arrange(scaled, size, space.q + h * padded);
    }

    // a head size that is no whole number of vectors goes through padded copies
    const float* copies[RUN + VL];
    for (int64_t i = 0; i < RUN + VL; i++) copies[i] = space.staged + (i < RUN ? i : 0) * padded;
    auto copied = [&](const Run<KV>& run) {
        for (int64_t i = 0; i < run.keys; i++) {
            prefetch(run[i + ahead], size * (int64_t)sizeof(KV));
            widen(run[i], size, padded, space.staged + i * padded);
        }
        for (int64_t i = run.keys; i < round_up(run.keys, VL) && i < RUN; i++) {
            memset(space.staged + i * padded, 0, padded * sizeof(float));
        }
        return Run<float>{copies, run.keys, 0, 0};
    };
    auto per_heads = [&](auto&& body) {
        for (int64_t h = 0; h < group; h += HEADS) with_heads(group - h, [&](auto count) { body(count, h); });
    };
    // body(run, its first key, kv head)
    auto over_runs = [&](const KV* const* places, auto&& body) {
        for (int64_t i = 0; i < keys; i += at.turn) {
            const int64_t count = keys - i < at.turn ? keys - i : at.turn;
            for (int64_t k = 0; k < at.heads; k++) {
                prefetch(places[i + ahead + PAGES_AHEAD] + k * between, 1);
                body(Run<KV>{places + i, count, k * between, ahead}, i, k);
            }
        }
    };
    over_runs(space.places, [&](const Run<KV>& run, int64_t i, int64_t k) {
        const Run<float> narrow = whole ? Run<float>{} : copied(run);
        per_heads([&](auto heads, int64_t h) {
            constexpr int G = decltype(heads)::value;
            const float* from = space.q + (k * group + h) * padded;
            float* scores = space.scores_of(k, group, h) + i * lanes_of(G);
            if (whole) score_keys<KV, G, true>(from, run, padded, scores);
            else score_keys<float, G, false>(from, narrow, padded, scores);
        });
    });
    for (int64_t k = 0; k < at.heads; k++) {
        float* maximum = partial + k * stride;
        per_heads([&](auto heads, int64_t h) {
            constexpr int G = decltype(heads)::value;
            weigh<G>(space.scores_of(k, group, h), keys, a.cap_scale(), maximum + h, maximum + group + h);
        });
        memset(maximum + round_up(2 * group, VL), 0, group * padded * sizeof(float));
    }
    over_runs(space.places + keys, [&](const Run<KV>& run, int64_t i, int64_t k) {
        const Run<float> narrow = whole ? Run<float>{} : copied(run);
        per_heads([&](auto heads, int64_t h) {
            constexpr int G = decltype(heads)::value;
            const float* weights = space.scores_of(k, group, h) + i * lanes_of(G);
            float* out = partial + k * stride + round_up(2 * group, VL) + h * padded;
            if (whole) sum_values<KV, G, true>(weights, run, padded, out);
            else sum_values<float, G, false>(weights, narrow, padded, out);
        });
    });
}

// The output of one query and kv head from its context's partial results, in order, `stride` apart
template <class KV>
void join_pieces(
    const Attention& a, int64_t sequence, int64_t kv_head, float* partials, int64_t stride, int64_t pieces) {
    const int64_t group = a.group(), size = a.head_size, padded = round_up(size, VL);
    const int64_t values_at = round_up(2 * group, VL);
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
