// The ops as C functions over raw pointers and sizes. Compiled once per instruction set, with VARIANT in the names.
//
// T tokens · H query heads · K kv heads · D head size · N blocks, or rows · B slots per block · E features · R pairs ·
// F feed-forward size · I input features · O output features. Strides count numbers; the last axis is always dense.
// `threads` is the maximum that may be used.

#if defined(__linux__)
#include <sys/mman.h>
#if !defined(MADV_POPULATE_WRITE)
#define MADV_POPULATE_WRITE 23  // a newer kernel (Linux 5.14) may know what the headers do not
#endif
#endif

#include "argmax.h"
#include "block_linear.h"
#include "elementwise.h"
#include "linear.h"
#include "linear_dispatch.h"
#include "paged_attention.h"

#define JOINED(name, variant) name##_##variant
#define NAMED(name, variant) JOINED(name, variant)
#define CALL(name) NAMED(name, VARIANT)
#define OP(name) extern "C" __attribute__((visibility("default"))) int CALL(name)

namespace {

constexpr int64_t GRAIN = 1 << 14;  // numbers that are worth a thread

enum Type { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, BLOCKS_8 = 3, BLOCKS_4 = 4, BLOCKS_4_MINS = 5, ROUNDED = 6 };

// Call body(form) with the block form of a weight type.
template <class Body>
void with_form(int type, Body&& body) {
    if (type == BLOCKS_8) body(BlockForm<8, false>{});
    else if (type == BLOCKS_4) body(BlockForm<4, false>{});
    else body(BlockForm<4, true>{});
}

// Call body(form) with the storage form of a matrix of this type.
template <class Body>
void with_kept(int type, Body&& body) {
    if (type == FLOAT32) body(Plain<float>{});
    else if (type == BFLOAT16) body(Plain<bf16>{});
    else if (type == FLOAT16) body(Plain<f16>{});
    else with_form(type, [&](auto form) { body(InBlocks<decltype(form)>{}); });
}

template <class To>
void write_slots(
    const float* x_TKD, int64_t stride_T, int64_t stride_K, To* kv_N2KBD, int part, const int64_t* slots, int64_t tokens,
    int64_t kv_heads, int64_t block_size, int64_t size) {
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t k = 0; k < kv_heads; k++) {
            const float* from = x_TKD + t * stride_T + k * stride_K;
            const int64_t of_head = ((slots[t] / block_size * 2 + part) * kv_heads + k) * block_size;
            To* to = kv_N2KBD + (of_head + slots[t] % block_size) * size;
            if constexpr (std::is_same_v<To, float>) memcpy(to, from, size * sizeof(To));
            else for (int64_t d = 0; d < size; d++) convert(from[d], to + d);
        }
    }
}

}  // namespace

// Return 0, or 1 if out of memory.
OP(paged_attention)(
    const float* q_THD, int64_t q_stride_T, int64_t q_stride_H, float* out_THD, const void* kv_N2KBD, int kv_type,
    const int32_t* tables_SW, int64_t table_stride, const int64_t* query_starts, const int64_t* lengths,
    const bool* prompts, int64_t num_sequences, int64_t heads, int64_t kv_heads, int64_t head_size, int64_t block_size,
    float scale, int64_t window, float soft_cap, int threads) {
    const Attention a{q_THD, q_stride_T, q_stride_H, out_THD, kv_N2KBD, tables_SW, table_stride, query_starts,
                      lengths, prompts, num_sequences, heads, kv_heads, head_size, block_size, scale, window, soft_cap};
    try {
        if (kv_type == FLOAT32) attend<float>(a, threads);
        else if (kv_type == BFLOAT16) attend<bf16>(a, threads);
        else attend<f16>(a, threads);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

// Rotate queries and keys in place if angles are given, then write keys and values to a cache of any type.
OP(rope_kv_write)(
    float* q_THD, int64_t q_stride_T, int64_t q_stride_H, int64_t heads, float* k_TKD, int64_t k_stride_T,
    int64_t k_stride_K, const float* v_TKD, int64_t v_stride_T, int64_t v_stride_K, const float* cos_TR,
    const float* sin_TR, int64_t pairs, void* kv_N2KBD, int kv_type, const int64_t* slots, int64_t tokens,
    int64_t kv_heads, int64_t block_size, int64_t size, int threads) {
    auto run = [&](auto* cache) {
        for_ranges(threads, tokens, GRAIN / ((heads + 2 * kv_heads) * size), [&](int64_t first, int64_t last) {
            for (int64_t t = first; cos_TR && t < last; t++) {
                const float *cos = cos_TR + t * pairs, *sin = sin_TR + t * pairs;
                for (int64_t h = 0; h < heads; h++) rope_head(q_THD + t * q_stride_T + h * q_stride_H, cos, sin, pairs);
                for (int64_t k = 0; k < kv_heads; k++) rope_head(k_TKD + t * k_stride_T + k * k_stride_K, cos, sin, pairs);
            }
            const int64_t count = last - first;
            write_slots(k_TKD + first * k_stride_T, k_stride_T, k_stride_K, cache, 0, slots + first, count, kv_heads,
                        block_size, size);
            write_slots(v_TKD + first * v_stride_T, v_stride_T, v_stride_K, cache, 1, slots + first, count, kv_heads,
                        block_size, size);
        });
    };
    if (kv_type == FLOAT32) run((float*)kv_N2KBD);
    else if (kv_type == BFLOAT16) run((bf16*)kv_N2KBD);
    else run((f16*)kv_N2KBD);
    return 0;
}

// Copy whole blocks within each tensor; all sources are read before any target is written.
// Return 0, or 1 if out of memory.
OP(copy_blocks)(
    char* const* tensors, int64_t count, int64_t block_bytes, const int64_t* sources, const int64_t* targets,
    int64_t copies, int threads) {
    thread_local Arena arena;
    try {
        arena.reserve(threads * Arena::bytes_for<char>(copies * block_bytes));
    } catch (const std::bad_alloc&) {
        return 1;
    }
    char* const held = arena.take<char>(threads * Arena::bytes_for<char>(copies * block_bytes));
    for_tasks(threads, count, [&](int thread, int64_t i) {
        char* const here = held + thread * Arena::bytes_for<char>(copies * block_bytes);
        for (int64_t c = 0; c < copies; c++) memcpy(here + c * block_bytes, tensors[i] + sources[c] * block_bytes, block_bytes);
        for (int64_t c = 0; c < copies; c++) memcpy(tensors[i] + targets[c] * block_bytes, here + c * block_bytes, block_bytes);
    });
    return 0;
}

// bytes first .. last - 1 of each of some tensors get their pages now, of which the first write is the dearest: each one
// would stop a thread that others wait for. Where a system cannot, they get them when they are written
OP(populate)(char* const* tensors, int64_t count, int64_t first, int64_t last, int threads) {
#if defined(MADV_POPULATE_WRITE)
    for_tasks(threads, count, [&](int, int64_t i) {
        const uintptr_t from = (uintptr_t)(tensors[i] + first) / PAGE * PAGE;
        madvise((void*)from, (uintptr_t)(tensors[i] + last) - from, MADV_POPULATE_WRITE);
    });
#endif
    return 0;
}

// Rows have two strided axes; rows of `out` are one stride apart. The residual, if given, is dense
// and updated in place.
OP(rms_norm)(
    const float* x, int64_t outer, int64_t inner, int64_t outer_stride, int64_t inner_stride, float* residual,
    const float* weight_E, int64_t size, float eps, float offset, float* out, int64_t out_stride, int threads) {
    for_ranges(threads, outer * inner, GRAIN / size, [&](int64_t first, int64_t last) {
        for (int64_t n = first; n < last; n++) {
            const float* row = x + n / inner * outer_stride + n % inner * inner_stride;
            norm_row(row, residual ? residual + n * size : nullptr, weight_E, size, eps, offset, out + n * out_stride);
        }
    });
    return 0;
}

OP(silu_mul)(const float* x_T2F, int64_t tokens, int64_t size, float* out_TF, int threads) {
    for_ranges(threads, tokens, GRAIN / (2 * size), [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; t++) gated_row<SILU>(x_T2F + 2 * t * size, size, out_TF + t * size);
    });
    return 0;
}

OP(gelu_mul)(const float* x_T2F, int64_t tokens, int64_t size, float* out_TF, int threads) {
    for_ranges(threads, tokens, GRAIN / (2 * size), [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; t++) gated_row<GELU>(x_T2F + 2 * t * size, size, out_TF + t * size);
    });
    return 0;
}

// output features of a panel, and input features of a quantized group: whoever packs gives room for whole ones
OP(linear_panel)() { return PANEL; }
OP(quantized_group)() { return GROUP; }

// input features that lie side by side in the panels of a rounded matrix
OP(rounded_together)() { return TOGETHER<RoundedWeight>; }

// Pack the panels of `linear` in a type that holds each weight exactly, or rounded.
OP(pack_linear)(
    const float* w_OI, int64_t in_features, int64_t out_features, void* panels, int type, int threads) {
    if (type == FLOAT32) pack(w_OI, in_features, out_features, (float*)panels, threads);
    else if (type == BFLOAT16) pack(w_OI, in_features, out_features, (bf16*)panels, threads);
    else if (type == ROUNDED) pack(w_OI, in_features, out_features, (RoundedWeight*)panels, threads);
    else pack(w_OI, in_features, out_features, (f16*)panels, threads);
    return 0;
}

// Return 0, or 1 if out of memory. With an activation, `out` has half of the output features.
OP(linear)(
    const float* x_NI, int64_t stride_N, const void* panels, int type, const float* bias_O, float* out, int64_t out_stride_N,
    int activation, int64_t rows, int64_t in_features, int64_t out_features, int threads) {
    const Output output{bias_O, out, out_stride_N, out_features, (Activation)activation};
    const Linear l{x_NI, stride_N, panels, output, rows, in_features};
    try {
        if (type == ROUNDED) multiply_all_rounded(l, threads);
        else with_kept(type, [&](auto kept) { multiply_all<decltype(kept)>(l, threads); });
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

// bytes of a panel of one block of input features
OP(block_bytes)(int type) {
    int bytes = 0;
    with_form(type, [&](auto form) { bytes = (int)form.BYTES; });
    return bytes;
}

// Pack the panels of `linear` in the block types.
OP(pack_blocks)(
    const int8_t* values_OI, const void* scales_OG, const void* mins_OG, int64_t in_features, int64_t out_features,
    void* panels, int type, int threads) {
    const BlockMatrix m{values_OI, (const f16*)scales_OG, (const f16*)mins_OG, in_features, out_features};
    with_form(type, [&](auto form) { pack_blocks<decltype(form)>(m, (uint8_t*)panels, threads); });
    return 0;
}

OP(block_rows)(
    const void* panels, int type, int64_t in_features, const int64_t* rows_N, int64_t count, float* out_NI, int threads) {
    with_form(type, [&](auto form) {
        block_rows<decltype(form)>((const uint8_t*)panels, in_features, rows_N, count, out_NI, threads);
    });
    return 0;
}

// Make the bounds of `linear_argmax`, beside the panels of `linear`: rounded panels, and two lengths per output feature
OP(make_screen)(
    const void* panels, int type, int64_t in_features, int64_t out_features, void* rounded, float* lengths_O,
    float* errors_O, int threads) {
    with_kept(type, [&](auto kept) {
        make_screen<decltype(kept)>(
            panels, in_features, out_features, {(RoundedWeight*)rounded, lengths_O, errors_O}, threads);
    });
    return 0;
}

// Write each row's largest output of `linear` and its index (the first on ties). Return 0, or 1 if out of memory.
OP(linear_argmax)(
    const float* x_NI, int64_t stride_N, const void* rounded, const float* lengths_O, const float* errors_O,
    const void* panels, int type, float* values_N, int64_t* ids_N, int64_t rows, int64_t in_features,
    int64_t out_features, int threads) {
    const Screen screen{(RoundedWeight*)rounded, (float*)lengths_O, (float*)errors_O};
    try {
        with_kept(type, [&](auto kept) {
            find_largest<decltype(kept)>(
                x_NI, stride_N, screen, panels, rows, in_features, out_features, values_N, ids_N, threads);
        });
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

// Pack panels of whole groups of input features, padded with zeros.
OP(pack_quantized)(
    const int8_t* w_OI, int64_t in_features, int64_t out_features, int8_t* panels, int32_t* offsets, int threads) {
    pack_quantized(w_OI, in_features, out_features, panels, offsets, threads);
    return 0;
}

// Return 0, or 1 if out of memory.
OP(quantized_linear)(
    const float* x_NI, int64_t stride_N, const int8_t* panels, const int32_t* offsets, const float* scales_O,
    const float* bias_O, float* out, int64_t out_stride_N, int activation, int64_t rows, int64_t in_features,
    int64_t out_features, int threads) {
    const Output output{bias_O, out, out_stride_N, out_features, (Activation)activation};
    try {
        multiply_all_quantized({x_NI, stride_N, panels, offsets, scales_O, output, rows, in_features}, threads);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

#include "fused_layers.h"

// Return 0, or 1 if out of memory.
OP(decoder_layers)(const Model* model, const Step* step, int threads) {
    try {
        LayersRun{*model, *step, threads}.run();
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

#include "abi.h"
