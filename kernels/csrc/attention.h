// Shared by decode and prefill attention: the arguments of a call, and the address of a position's key.
//
// T tokens of the step · S sequences · H query heads · K kv heads · G = H / K · N blocks · B slots per block · D head size
#pragma once

#include <algorithm>

#include "parallel.h"
#include "simd.h"

namespace {

// scores are kept as powers of two: exp(x) = 2**(x log2(e))
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LOWEST = -3e38f;  // a maximum over nothing: finite, so that differences are never NaN

struct Attention {
    const float* q_THD;  // strided over T and H
    int64_t q_stride_T, q_stride_H;
    float* out_THD;  // contiguous
    const void* kv_N2KBD;
    const int32_t* tables;  // [S, table_stride]
    int64_t table_stride;
    const int64_t* query_starts;  // [S + 1]
    const int64_t* lengths;       // [S]
    const bool* prompts;          // [S]
    int64_t num_sequences, heads, kv_heads, head_size, block_size;
    float scale;
    int64_t window;  // 0: none
    float soft_cap;  // 0: none

    int64_t group() const { return heads / kv_heads; }
    int64_t queries(int64_t sequence) const { return query_starts[sequence + 1] - query_starts[sequence]; }
    // the results of a prompt do not depend on how it is cut, even into single queries
    bool is_decode(int64_t sequence) const { return queries(sequence) == 1 && !prompts[sequence]; }
    // Factors to the base-2 exponent: of q · k, and after the soft cap
    float score_scale() const { return soft_cap > 0 ? scale / soft_cap : scale * LOG2_E; }
    float cap_scale() const { return soft_cap * LOG2_E; }
    int64_t first_seen(int64_t position) const {
        return window > 0 && position >= window ? position - window + 1 : 0;
    }
    // Address of the key (`part` 0) or value (1) in a slot of the sequence's block number `block`
    template <class KV>
    const KV* place(int part, int64_t sequence, int64_t kv_head, int64_t block, int64_t slot) const {
        const int64_t number = tables[sequence * table_stride + block];
        return (const KV*)kv_N2KBD + (((number * 2 + part) * kv_heads + kv_head) * block_size + slot) * head_size;
    }
    // Addresses of the keys, or values, of positions first .. last - 1
    template <class KV>
    void find(int part, int64_t sequence, int64_t kv_head, int64_t first, int64_t last, const KV** to) const {
        int64_t block = first / block_size, slot = first % block_size;
        for (int64_t p = first; p < last; block++, slot = 0) {
            const KV* at = place<KV>(part, sequence, kv_head, block, slot);
            for (; slot < block_size && p < last; slot++, p++, at += head_size) *to++ = at;
        }
    }
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// numbers as float32, and zeros up to `padded`
template <class KV>
inline void widen(const KV* from, int64_t count, int64_t padded, float* to) {
    int64_t d = 0;
    for (; d + VL <= count; d += VL) store(to + d, load(from + d));
    for (; d < count; d++) to[d] = to_float(from[d]);
    for (; d < padded; d++) to[d] = 0;
}

constexpr int64_t PAGE = 4096;  // bytes of memory that are looked up together

// into the second cache
inline void prefetch(const void* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char*)from + at, 0, 2);
}

}  // namespace
