// The library's interface as text, one line per function and per struct: `cpu/library.py` compares it with its own tables
// when it loads the library. The letters come from the C++ types, so they cannot be out of date.
//
// A function: its name and a letter per argument. A struct: its name, its size, then letter and offset of each field.
// p pointer · n int64_t · i int · f float · s struct. Included by ops.cpp, after the ops.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <type_traits>

namespace {

struct InterfaceText {
    char* text;
    int64_t size, length = 0;

    // no std::string: its templates would be compiled once per instruction set, and the linker keeps one of them
    void add(const char* format, ...) {
        va_list values;
        va_start(values, format);
        const int64_t left = length < size ? size - length : 0;
        length += vsnprintf(text + size - left, left, format, values);
        va_end(values);
    }

    template <class T>
    static constexpr char letter() {
        if constexpr (std::is_pointer_v<T>) return 'p';
        else if constexpr (std::is_same_v<T, int64_t>) return 'n';
        else if constexpr (std::is_same_v<T, int>) return 'i';
        else if constexpr (std::is_same_v<T, float>) return 'f';
        else if constexpr (std::is_class_v<T>) return 's';
        else return '?';
    }

    template <class... Arguments>
    void function(const char* name, int (*)(Arguments...)) {
        const char letters[] = {letter<Arguments>()..., 0};
        add("%s %s\n", name, letters);
    }

    template <class Struct, class... Fields>
    void layout(const char* name, Fields Struct::*... fields) {
        const Struct s{};
        add("%s %zu", name, sizeof(Struct));
        (add(" %c%td", letter<Fields>(), (const char*)&(s.*fields) - (const char*)&s), ...);
        add("\n");
    }
};

}  // namespace

#define FUNCTION(name) interface.function(#name, &CALL(name))

// Write at most `size` bytes of the text, zero-terminated; return the size of the whole text in bytes
OP(interface)(char* text, int64_t size) {
    InterfaceText interface{text, size};
    FUNCTION(paged_attention);
    FUNCTION(rms_norm);
    FUNCTION(rope_kv_write);
    FUNCTION(copy_blocks);
    FUNCTION(populate);
    FUNCTION(silu_mul);
    FUNCTION(gelu_mul);
    FUNCTION(linear_panel);
    FUNCTION(quantized_group);
    FUNCTION(rounded_together);
    FUNCTION(pack_linear);
    FUNCTION(linear);
    FUNCTION(block_bytes);
    FUNCTION(pack_blocks);
    FUNCTION(block_rows);
    FUNCTION(make_screen);
    FUNCTION(linear_argmax);
    FUNCTION(pack_quantized);
    FUNCTION(quantized_linear);
    FUNCTION(decoder_layers);
    FUNCTION(interface);
    interface.layout("Norm", &Norm::weight, &Norm::size, &Norm::eps, &Norm::offset);
    interface.layout(
        "Matrix", &Matrix::panels, &Matrix::offsets, &Matrix::scales_O, &Matrix::bias_O, &Matrix::in_features,
        &Matrix::out_features, &Matrix::type, &Matrix::activation);
    interface.layout(
        "Layer", &Layer::attention_norm, &Layer::q_norm, &Layer::k_norm, &Layer::attention_post_norm, &Layer::mlp_norm,
        &Layer::mlp_post_norm, &Layer::qkv, &Layer::out, &Layer::gate_up, &Layer::down, &Layer::window, &Layer::rope);
    interface.layout(
        "Model", &Model::layers, &Model::num_layers, &Model::hidden_size, &Model::heads, &Model::kv_heads,
        &Model::head_size, &Model::scale, &Model::soft_cap, &Model::residual_multiplier);
    interface.layout(
        "Step", &Step::x_TE, &Step::tokens, &Step::angles, &Step::pairs, &Step::caches, &Step::kv_type, &Step::block_size,
        &Step::slots_T, &Step::tables, &Step::table_stride, &Step::query_starts, &Step::lengths, &Step::prompts,
        &Step::num_sequences, &Step::rows_N, &Step::outputs, &Step::out_NE, &Step::residual_NE);
    return (int)interface.length;
}
