// Attention of one query per sequence: bound by memory, so each key and value is read once for all heads that share it.
// The kv heads of a piece take turns, so that memory is read about in its order.
//
// A context is cut at fixed positions into pieces; each gives a maximum, a sum and a weighted value per head, and these
// are joined in order. The cut depends on positions alone: results are the same whoever computes which piece.
#pragma once

#include "attention.h"

namespace {

constexpr int PIECE = 256;  // keys
constexpr int HEADS = 4;    // query heads that are computed together
constexpr int64_t LONG_TURN = 64;   // keys of a kv head that stay in the first cache while its query heads pass over them
constexpr int64_t SHORT_TURN = 16;  // where nothing is read twice: a usual block, so that memory is read in its order
constexpr int64_t FETCHED = 16 << 10;  // bytes that are on the way
constexpr int64_t MOST_AHEAD = 32;     // runs, the same
constexpr int64_t MOST_BESIDE = 8;     // pages that are fetched side by side
constexpr int64_t MOST_APART = 8;      // runs, where a page has more

constexpr int lanes_of(int heads) { return heads == 3 ? 4 : heads; }

// Extent of a piece: positions first .. last - 1, at most PIECE, of `heads` kv heads from `kv_head` on, which change
// every `turn` keys (at most LONG_TURN)
struct Span {
    int64_t sequence, kv_head, heads, turn, first, last;
    int64_t keys() const { return last - first; }
};

// Keys that lie side by side, of one kv head and in one block: from a piece's `first` on
struct Run {
    int64_t kv_head, first, keys;
};

// Processors read ahead along a list of addresses. What computes on a run takes them in registers: an address that comes
// together in memory from parts is not there before all that was written and loaded earlier.
template <class KV>
struct DecodeSpace {
    const KV** places;  // where runs begin in the order of reading: this piece's keys, its values, the next one's keys
    Run* runs;
    float* q;       // [kv heads, G, P], P = D in whole vectors
    float* scores;  // [kv heads], per HEADS heads [PIECE + VL keys, lanes]
    float* staged;  // [LONG_TURN, P]

    // Upper bound of a kv head's runs in a piece: a run ends with a turn and with a block
    static int64_t most_runs(int64_t block_size) { return PIECE / SHORT_TURN + PIECE / block_size + 2; }
    static int64_t most_places(int64_t block_size) {
        return 3 * most_runs(block_size) + std::max(MOST_AHEAD + 1, 2 * MOST_BESIDE * MOST_APART);
    }

    static size_t bytes(const Attention& a, int64_t heads, int64_t padded) {
        return Arena::bytes_for<const KV*>(heads * most_places(a.block_size)) +
               Arena::bytes_for<Run>(heads * most_runs(a.block_size)) +
               Arena::bytes_for<float>(heads * a.group() * padded) +
               Arena::bytes_for<float>(heads * (a.group() + HEADS) * (PIECE + VL)) +
               Arena::bytes_for<float>(LONG_TURN * padded);
    }
    DecodeSpace(Arena& arena, const Attention& a, int64_t heads, int64_t padded)
        : places(arena.take<const KV*>(heads * most_places(a.block_size))),
          runs(arena.take<Run>(heads * most_runs(a.block_size))),
          q(arena.take<float>(heads * a.group() * padded)),
          scores(arena.take<float>(heads * (a.group() + HEADS) * (PIECE + VL))),
          staged(arena.take<float>(LONG_TURN * padded)) {}

    float* scores_of(int64_t kv_head, int64_t group, int64_t head) {
        return scores + (kv_head * (group + HEADS) + head) * (PIECE + VL);
    }

    // the number of runs; at least `known` places follow those of the values
    int64_t find(const Attention& a, const Span& at, const Span& next, int64_t known) {
        const KV** to = list(a, 0, at, places, runs);
        const int64_t count = to - places;
        to = list(a, 1, at, to);
        Span soon = next;
        soon.last = std::min(next.last, next.first + (known / next.heads + 1) * next.turn);
        to = list(a, 0, soon, to);
        for (; to < places + 2 * count + known; to++) *to = to[-1];
        return count;
    }

    // Lists places of keys, `part` 0, or values, 1, and their runs where wanted: turn by turn, and in a turn kv head by kv
    // head. Returns the end
    static const KV** list(const Attention& a, int part, const Span& span, const KV** to, Run* run = nullptr) {
        int64_t block = span.first / a.block_size, slot = span.first % a.block_size;
        for (int64_t turn = span.first; turn < span.last; turn += span.turn) {
            const int64_t end = std::min(span.last, turn + span.turn);
            int64_t listed = 0;
            for (int64_t p = turn, keys; p < end; p += keys, listed++) {
                keys = std::min(end - p, a.block_size - slot);
                if (run) *run++ = {0, p - span.first, keys};
                *to++ = a.place<KV>(part, span.sequence, span.kv_head, block, slot);
                slot += keys;
                if (slot == a.block_size) block++, slot = 0;
            }
            for (int64_t k = 1; k < span.heads; k++) {
                for (int64_t i = 0; i < listed; i++, to++) {
                    if (run) *run = {k, run[-listed].first, run[-listed].keys}, run++;
                    *to = to[-listed] + a.block_size * a.head_size;
                }
            }
        }
        return to;
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

// True if `load_two` permutes the numbers of a head; heads that are no whole vectors are copied as float32
template <class KV>
inline bool is_arranged(int64_t size) {
    return std::is_same_v<KV, bf16> && size % VL == 0;
}

template <int W, class KV>
inline void load_part(const KV* from, vec* to) {
    if constexpr (W == 1) to[0] = load(from);
    else for (int w = 0; w < W; w += 2) load_two(from + w * VL, to + w);
}

// Prefetch during the computation of a run: for each cache line that is read, one that is read later.

struct Nothing {};

// The same line of a later run, so many bytes from here, into the first cache: what sequences share is in the second one.
struct Further {
    int64_t bytes;
};

// Lines of 2**shift later runs in turn, into the second cache. A run fetches a part of each, those after it the rest. The
// runs lie in different pages of memory, so that these are looked up, and their reading begins, at the same time: a
// processor reads ahead in several pages at once.
template <class KV>
struct SideBySide {
    const KV* const* places;  // of the first of these runs; those of the others come `apart` later each
    int64_t row;              // the first key of the part
    int64_t apart, shift;
};

// `from`: W vectors of a run's key number i, from d on
template <int W, class KV>
inline void fetch(Nothing, const KV*, int64_t, int64_t, int64_t) {}

template <int W, class KV>
inline void fetch(Further later, const KV* from, int64_t, int64_t, int64_t) {
#pragma GCC unroll 8
    for (size_t at = 0; at < W * VL * sizeof(KV); at += 64) {
        __builtin_prefetch((const char*)from + later.bytes + at, 0, 3);
    }
}

template <int W, class KV>
inline void fetch(const SideBySide<KV>* later, const KV*, int64_t i, int64_t padded, int64_t d) {
    const int64_t which = i & ((1 << later->shift) - 1), row = later->row + (i >> later->shift);
    prefetch(later->places[which * later->apart] + row * padded + d, W * VL * (int64_t)sizeof(KV));
}

// Compute scores [keys, lanes_of(G)] of q [G, padded], arranged as KV, against keys `padded` apart; the output has room for
// up to a vector beyond
template <int G, class KV, class Later>
__attribute__((noinline)) void score_keys(
    const float* q, const KV* at, Later later, int64_t keys, int64_t padded, float* scores) {
    constexpr int LANES = lanes_of(G), KEYS = VL / LANES, WIDE = MANY_REGISTERS && G < 4 ? 4 : 2;
    for (int64_t i = 0; i < keys; i += KEYS, at += KEYS * padded, scores += VL) {
        vec sums[VL] = {};
        over_parts<WIDE>(padded, [&](auto width, int64_t d) __attribute__((always_inline)) {
            constexpr int W = decltype(width)::value;
            vec q_part[G][W];
#pragma GCC unroll 4
            for (int h = 0; h < G; h++) {
                for (int w = 0; w < W; w++) q_part[h][w] = load(q + h * padded + d + w * VL);
            }
#pragma GCC unroll 16
            for (int b = 0; b < KEYS; b++) {
                const int64_t key = b < keys - i ? b : keys - i - 1;
                const KV* from = at + key * padded + d;
                fetch<W>(later, from, i + b, padded, d);
                vec k[W];
                load_part<W>(from, k);
#pragma GCC unroll 4
                for (int h = 0; h < G; h++) {
                    for (int w = 0; w < W; w++) sums[b * LANES + h] += k[w] * q_part[h][w];
                }
            }
        });
        store(scores, row_sums<G, LANES>(sums));
    }
}

// Turn scores to weights in place, with each head's maximum and sum; prefetch from `later` on meanwhile.
template <int G>
void weigh(float* scores, int64_t keys, float cap_scale, const void* later, float* maximum, float* sum) {
    constexpr int LANES = lanes_of(G);
    const int64_t count = round_up(keys * LANES, VL);
    if (cap_scale > 0) {
        for (int64_t i = 0; i < count; i += VL) store(scores + i, tanh_of(load(scores + i)) * cap_scale);
    }
    for (int64_t i = keys * LANES; i < count; i++) scores[i] = -__builtin_inff();
    vec most = splat(LOWEST), total = {};
    for (int64_t i = 0; i < count; i += VL) most = vmax(most, load(scores + i));
    most = across<LANES>(most, [](vec a, vec b) { return vmax(a, b); });
    for (int64_t i = 0; i < count; i += VL) {
        if (i % 32 == 0) __builtin_prefetch((const char*)later + 2 * i, 0, 2);
        const vec weight = exp2_to_127(load(scores + i) - most);
        total += weight;
        store(scores + i, weight);
    }
    total = across<LANES>(total, [](vec a, vec b) { return a + b; });
    for (int h = 0; h < G; h++) maximum[h] = most[h], sum[h] = total[h];
}

// out [G, padded], arranged as KV, += weights · values
template <int G, class KV, class Later>
__attribute__((noinline)) void sum_values(
    const float* weights, const KV* at, Later later, int64_t keys, int64_t padded, float* out) {
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
            const KV* from = at + i * padded + d;
            fetch<W>(later, from, i, padded, d);
            vec v[W], weight[G];
            load_part<W>(from, v);
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

// Compute the partial result of a piece, one kv head after another.
template <class KV>
void attend_piece(const Attention& a, const Span& at, const Span& next, DecodeSpace<KV>& space, float* partial) {
    const int64_t group = a.group(), size = a.head_size, padded = round_up(size, VL), keys = at.keys();
    const int64_t stride = partial_size(group, padded);
    const bool whole = size == padded, shared = at.turn == LONG_TURN;
    const int64_t run_keys = std::min(at.turn, a.block_size), run_bytes = run_keys * size * (int64_t)sizeof(KV);
    SideBySide<KV> beside{nullptr, 0, std::clamp<int64_t>(PAGE / run_bytes, 1, MOST_APART), 0};
    while (2 << beside.shift <= std::min<int64_t>(run_keys, MOST_BESIDE)) beside.shift++;
    const bool in_order = shared || run_keys < 4;
    const int64_t together = in_order ? 1 : beside.apart << beside.shift;  // runs that are fetched at the same time
    const int64_t ahead = in_order ? std::clamp<int64_t>(FETCHED / run_bytes, 1, MOST_AHEAD) : together;
    const int64_t runs = space.find(a, at, next, ahead + together);
    const float* q = a.q_THD + a.query_starts[at.sequence] * a.q_stride_T + at.kv_head * group * a.q_stride_H;
    for (int64_t h = 0; h < at.heads * group; h++) {
        float* scaled = space.q + h * padded;
        widen(q + h * a.q_stride_H, size, padded, scaled);
        for (int64_t d = 0; d < padded; d += VL) store(scaled + d, load(scaled + d) * a.score_scale());
        if (is_arranged<KV>(size)) arrange(scaled, size);
    }

    auto per_heads = [&](auto&& body) {
        for (int64_t h = 0; h < group; h += HEADS) with_heads(group - h, [&](auto count) { body(count, h); });
    };
    // a head size that is no whole number of vectors goes through padded copies
    auto copied = [&](const KV* from, const KV* later, int64_t count) -> const float* {
        for (int64_t i = 0; i < count; i++) {
            prefetch(later + i * size, size * (int64_t)sizeof(KV));
            widen(from + i * size, size, padded, space.staged + i * padded);
        }
        return space.staged;
    };
    // body(a run, where its numbers are, what is fetched meanwhile, query heads, the first of them)
    int64_t nth = 0;  // run of as many as are fetched together
    auto over_runs = [&](const KV** places, auto&& body) {
        for (int64_t r = 0; r < runs; r++) {
            const Run& run = space.runs[r];
            const KV *from = places[r], *later = places[r + ahead];
            beside.places = places + r + ahead - nth + (nth >> beside.shift);
            beside.row = (nth & ((1 << beside.shift) - 1)) * (run_keys >> beside.shift);
            if (++nth == together) nth = 0;
            const float* copies = whole ? nullptr : copied(from, later, run.keys);
            per_heads([&](auto heads, int64_t h) {
                if (!whole) body(run, copies, Nothing{}, heads, h);
                else if (in_order) body(run, from, Further{(const char*)later - (const char*)from}, heads, h);
                else body(run, from, (const SideBySide<KV>*)&beside, heads, h);
            });
        }
    };
    over_runs(space.places, [&](const Run& run, auto* from, auto later, auto heads, int64_t h) {
        constexpr int G = decltype(heads)::value;
        const float* of_heads = space.q + (run.kv_head * group + h) * padded;
        float* scores = space.scores_of(run.kv_head, group, h) + run.first * lanes_of(G);
        score_keys<G>(of_heads, from, later, run.keys, padded, scores);
    });
    for (int64_t k = 0; k < at.heads; k++) {
        float *maximum = partial + k * stride, *values = maximum + round_up(2 * group, VL);
        per_heads([&](auto heads, int64_t h) {
            constexpr int G = decltype(heads)::value;
            float* scores = space.scores_of(k, group, h);
            weigh<G>(scores, keys, a.cap_scale(), space.places[runs + ahead + k], maximum + h, maximum + group + h);
        });
        for (int64_t d = 0; d < group * padded; d += VL) store(values + d, vec{});
    }
    over_runs(space.places + runs, [&](const Run& run, auto* from, auto later, auto heads, int64_t h) {
        constexpr int G = decltype(heads)::value;
        const float* weights = space.scores_of(run.kv_head, group, h) + run.first * lanes_of(G);
        float* out = partial + run.kv_head * stride + round_up(2 * group, VL) + h * padded;
        sum_values<G>(weights, from, later, run.keys, padded, out);
    });
}

// Merge the partial results of a context, in order and `stride` apart, to the output of one query and kv head.
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
        if (is_arranged<KV>(size)) restore(joined, size);
        memcpy(out + h * size, joined, size * sizeof(float));
    }
}

}  // namespace
