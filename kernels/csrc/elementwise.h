// Norms, rotary embedding and gated activations of float32 rows. E features · R rotated pairs · F feed-forward size
#pragma once

#include "parallel.h"
#include "simd.h"

namespace {

// Call body(index, count) over 0 .. n - 1 in whole vectors, then once for the tail.
template <class Body>
inline void over_vectors(int64_t n, Body&& body) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) body(i, VL);
    if (i < n) body(i, (int)(n - i));
}

inline vec load_some(const float* p, int count) {
    if (count == VL) return load(p);
    vec v = {};
    memcpy(&v, p, count * sizeof(float));
    return v;
}

inline void store_some(float* p, vec v, int count) {
    if (count == VL) store(p, v);
    else memcpy(p, &v, count * sizeof(float));
}

inline float lane_sum(vec v) {
    float sum = 0, lanes[VL];
    store(lanes, v);
    for (int i = 0; i < VL; i++) sum += lanes[i];
    return sum;
}

// out = x / rms(x) * (offset + weight). A residual, if given, first has x added and is normed in place of x.
inline void norm_row(const float* x, float* residual, const float* weight, int64_t size, float eps, float offset, float* out) {
    vec squares[2] = {};
    int turn = 0;
    over_vectors(size, [&](int64_t i, int count) {
        vec v = load_some(x + i, count);
        if (residual) {
            v += load_some(residual + i, count);
            store_some(residual + i, v, count);
        }
        squares[turn] += v * v;
        turn ^= 1;
    });
    const float factor = 1.0f / __builtin_sqrtf(lane_sum(squares[0] + squares[1]) / (float)size + eps);
    const float* from = residual ? residual : x;
    over_vectors(size, [&](int64_t i, int count) {
        store_some(out + i, load_some(from + i, count) * factor * (load_some(weight + i, count) + offset), count);
    });
}

// Rotate the pairs (i, i + R) of one head.
inline void rope_head(float* x, const float* cos, const float* sin, int64_t pairs) {
    over_vectors(pairs, [&](int64_t i, int count) {
        const vec first = load_some(x + i, count), second = load_some(x + pairs + i, count);
        const vec c = load_some(cos + i, count), s = load_some(sin + i, count);
        store_some(x + i, first * c - second * s, count);
        store_some(x + pairs + i, second * c + first * s, count);
    });
}

enum Activation { NO_ACTIVATION, SILU, GELU };

// gelu's tanh form is x * sigmoid(2 u) as well, u its inner polynomial
template <Activation WHICH>
inline vec gated(vec gate, vec up) {
    vec inner = gate;
    if (WHICH == GELU) inner = 1.5957691216057308f * (gate + 0.044715f * gate * gate * gate);
    return gate / (1.0f + exp2_any(inner * -1.4426950408889634f)) * up;
}

template <Activation WHICH>
inline void gated_row(const float* x, int64_t size, float* out) {
    over_vectors(size, [&](int64_t i, int count) {
        store_some(out + i, gated<WHICH>(load_some(x + i, count), load_some(x + size + i, count)), count);
    });
}

}  // namespace
