// The layers of a decoder, one after another in one call. They are the ops that this library has, in the same order, and
// give the same numbers; what is saved is the way from one to the next, which takes longer than a small model's norms.
//
// T tokens · N rows that come out · E hidden size · H query heads · K kv heads · D head size · R rotated pairs of a head.
// Included by ops.cpp, after the ops.
#pragma once

namespace {

struct Norm {
    const float* weight;  // null: there is no such norm
    int64_t size;
    float eps, offset;
};

struct Matrix {
    const void* panels;
    const int32_t* offsets;  // of a quantized one, as its scales are; else null
    const float* scales_O;
    const float* bias_O;     // or null
    int64_t in_features, out_features;
    int type, activation;
};

struct Layer {
    Norm attention_norm, q_norm, k_norm, attention_post_norm, mlp_norm, mlp_post_norm;
    Matrix qkv, out, gate_up, down;
    int64_t window;  // 0: none
    int64_t rope;    // its number, or -1: this layer has none
};

struct Model {
    const Layer* layers;
    int64_t num_layers, hidden_size, heads, kv_heads, head_size;
    float scale, soft_cap;  // soft_cap 0: none
    float residual_multiplier;
};

struct Step {
    const float* x_TE;
    int64_t tokens;
    const float* const* angles;  // cos and sin of each rope, [T, R]
    const int64_t* pairs;        // R of each rope
    void* const* caches;         // of each layer: [blocks, 2, K, block size, D], keys and values
    int64_t kv_type, block_size;
    const int64_t* slots_T;
    const int32_t* tables;
    int64_t table_stride;
    const int64_t *query_starts, *lengths;
    const bool* prompts;
    int64_t num_sequences;
    const int64_t* rows_N;  // of T
    int64_t outputs;        // N
    float *out_NE, *residual_NE;  // the last branch, and what it is still to be added to
};

struct LayersRun {
    const Model& m;
    const Step& s;
    const int threads;
    const int64_t hidden = m.hidden_size, q_size = m.heads * m.head_size;
    const int64_t qkv_size = q_size + 2 * m.kv_heads * m.head_size;
    int64_t rows = s.tokens;  // that are computed: T, at the end N
    float *x, *residual, *normed, *qkv, *attended, *gated;

    // throws std::bad_alloc
    void run() {
        int64_t widest = 0;
        for (int64_t i = 0; i < m.num_layers; i++) widest = std::max(widest, m.layers[i].down.in_features);
        thread_local Arena arena;
        size_t bytes = 0;
        for (const int64_t size : {hidden, hidden, row_stride(hidden), qkv_size, q_size, row_stride(widest)}) {
            bytes += Arena::bytes_for<float>(rows * size);
        }
        arena.reserve(bytes);
        x = arena.take<float>(rows * hidden);
        residual = arena.take<float>(rows * hidden);
        normed = arena.take<float>(rows * row_stride(hidden));
        qkv = arena.take<float>(rows * qkv_size);
        attended = arena.take<float>(rows * q_size);
        gated = arena.take<float>(rows * row_stride(widest));
        memcpy(x, s.x_TE, rows * hidden * sizeof(float));
        memset(residual, 0, rows * hidden * sizeof(float));
        for (int64_t i = 0; i < m.num_layers; i++) {
            const Layer& layer = m.layers[i];
            attend(layer, s.caches[i]);
            if (i == m.num_layers - 1) {  // nothing reads the other rows any more
                rows = s.outputs;
                attended = take_rows(attended, q_size, qkv);
                residual = take_rows(residual, hidden, s.residual_NE);
                x = s.out_NE;
            }
            multiply(layer.out, attended, q_size, x, hidden);
            finish_branch(layer.attention_post_norm);
            const auto [from, stride] = begin_branch(layer.mlp_norm);
            multiply(layer.gate_up, from, stride, gated, row_stride(layer.down.in_features));
            multiply(layer.down, gated, row_stride(layer.down.in_features), x, hidden);
            finish_branch(layer.mlp_post_norm);
        }
    }

    // Compute attention of a layer, from x to `attended`
    void attend(const Layer& layer, void* cache) {
        const auto [from, stride] = begin_branch(layer.attention_norm);
        multiply(layer.qkv, from, stride, qkv, qkv_size);
        const int64_t D = m.head_size, kv_size = m.kv_heads * D;
        float *k = qkv + q_size, *v = k + kv_size;
        norm_parts(layer.q_norm, qkv, q_size);
        norm_parts(layer.k_norm, k, kv_size);
        const bool turned = layer.rope >= 0;
        CALL(rope_kv_write)(
            qkv, qkv_size, D, m.heads, k, qkv_size, D, v, qkv_size, D, turned ? s.angles[2 * layer.rope] : nullptr,
            turned ? s.angles[2 * layer.rope + 1] : nullptr, turned ? s.pairs[layer.rope] : 0, cache,
            (int)s.kv_type, s.slots_T, rows, m.kv_heads, s.block_size, D, threads);
        check(CALL(paged_attention)(
            qkv, qkv_size, D, attended, cache, (int)s.kv_type, s.tables, s.table_stride, s.query_starts,
            s.lengths, s.prompts, s.num_sequences, m.heads, m.kv_heads, D, s.block_size, m.scale, layer.window,
            m.soft_cap, threads));
    }

    // The branch before is added to the residual: its norm, or without one the sum itself, and from row to row how far
    std::pair<const float*, int64_t> begin_branch(const Norm& norm) const {
        if (norm.weight) {
            CALL(rms_norm)(x, 1, rows, 0, hidden, residual, norm.weight, hidden, norm.eps, norm.offset, normed,
                           row_stride(hidden), threads);
            return {normed, row_stride(hidden)};
        }
        for_numbers(rows * hidden, [&](int64_t i) { residual[i] += x[i]; });
        return {residual, hidden};
    }

    void finish_branch(const Norm& norm) const {
        if (norm.weight) norm_parts(norm, x, hidden, hidden);
        const float factor = m.residual_multiplier;
        if (factor != 1) for_numbers(rows * hidden, [&](int64_t i) { x[i] *= factor; });
    }

    // Normalise in place each group of `norm.size` of the first `size` numbers of each row
    void norm_parts(const Norm& norm, float* from, int64_t size, int64_t stride) const {
        if (!norm.weight) return;
        const int64_t parts = size / norm.size;
        for_ranges(threads, rows * parts, GRAIN / norm.size, [&](int64_t first, int64_t last) {
            for (int64_t n = first; n < last; n++) {
                float* part = from + n / parts * stride + n % parts * norm.size;
                norm_row(part, nullptr, norm.weight, norm.size, norm.eps, norm.offset, part);
            }
        });
    }
    void norm_parts(const Norm& norm, float* from, int64_t size) const { norm_parts(norm, from, size, qkv_size); }

    template <class Body>
    void for_numbers(int64_t count, Body&& body) const {
        for_ranges(threads, count, GRAIN, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) body(i);
        });
    }

    float* take_rows(const float* from, int64_t size, float* to) const {
        for (int64_t n = 0; n < rows; n++) memcpy(to + n * size, from + s.rows_N[n] * size, size * sizeof(float));
        return to;
    }

    void multiply(const Matrix& w, const float* from, int64_t stride, float* to, int64_t to_stride) const {
        if (w.offsets) {
            check(CALL(quantized_linear)(
                from, stride, (const int8_t*)w.panels, w.offsets, w.scales_O, w.bias_O, to, to_stride, w.activation, rows,
                w.in_features, w.out_features, threads));
        } else {
            check(CALL(linear)(
                from, stride, w.panels, w.type, w.bias_O, to, to_stride, w.activation, rows, w.in_features,
                w.out_features, threads));
        }
    }

    static void check(int status) {
        if (status) throw std::bad_alloc();
    }
};

}  // namespace
