// Linear layers in 8 bits on tile registers: the panels and the numbers of quantized_linear.h. A tile holds GROUP input
// features, which share a scale: sums of each group are exact, and are scaled and added up while the next are multiplied.
#pragma once

#include "amx.h"
#include "attention.h"
#include "quantized_linear.h"

#if defined(TILE_REGISTERS)

namespace {

static_assert(GROUP == LINE && BIAS == 0, "a tile is a group wide, and has signs");

template <int ROW_TILES>
inline void add_byte_products() {
    asm volatile("tdpbssd %tmm6, %tmm4, %tmm0\n" "tdpbssd %tmm7, %tmm4, %tmm1");
    if constexpr (ROW_TILES == 2) asm volatile("tdpbssd %tmm6, %tmm5, %tmm2\n" "tdpbssd %tmm7, %tmm5, %tmm3");
}

struct QuantizedRows {
    int8_t* tiles;     // by tile of rows and group
    float* scales_GN;  // of each group, those of all rows

    static int64_t tile_bytes(int64_t groups) { return groups * TILE_BYTES; }
    void quantize(const QuantizedLinear& l, int64_t stride, int64_t n) const {
        for (int64_t g = 0; g < l.groups(); g++) {
            const int64_t start = g * GROUP, size = std::min(GROUP, l.in_features - start);
            int8_t* to = tiles + n / TILE_ROWS * tile_bytes(l.groups()) + g * TILE_BYTES + n % TILE_ROWS * LINE;
            scales_GN[g * stride + n] = quantize_group(l.x_NI + n * l.stride_N + start, size, (uint8_t*)to);
        }
    }
};

// A group of rows times a panel: totals [rows, PANEL]
template <int ROW_TILES>
inline void multiply_bytes(
    const int8_t* x, int64_t x_apart, const int8_t* panel, const float* scales_GN, int64_t stride, int64_t groups,
    const char* next, int64_t next_bytes, float* totals) {
    constexpr int64_t ROWS = ROW_TILES * TILE_ROWS;
    alignas(64) int32_t sums[2][ROWS * PANEL];
    auto scale = [&](int64_t g) __attribute__((always_inline)) {
        const int32_t* from = sums[g % 2];
        const float* scales = scales_GN + g * stride;
        for (int64_t r = 0; r < ROWS; r++) {
            const vec factor = splat(scales[r]);
            for (int v = 0; v < PANEL_VECTORS; v++) {
                ivec sum;
                memcpy(&sum, from + r * PANEL + v * VL, sizeof sum);
                float* at = totals + r * PANEL + v * VL;
                store(at, (g ? load(at) : vec{}) + __builtin_convertvector(sum, vec) * factor);
            }
        }
    };
    for (int64_t g = 0; g < groups; g++) {
        clear_sums<ROW_TILES>();
        load_rows<ROW_TILES>((const char*)x + g * TILE_BYTES, x_apart);
        load_weights((const char*)panel + g * PANEL_TILES);
        add_byte_products<ROW_TILES>();
        prefetch(next + g * next_bytes, next_bytes);
        if (g) scale(g - 1);
        store_sums<ROW_TILES>(sums[g % 2]);
    }
    scale(groups - 1);
}

inline void multiply_quantized_tiles(const QuantizedLinear& l, int threads) {
    if (l.rows == 0) return;
    thread_local Arena arena;
    const int64_t groups = l.groups(), tile_bytes = QuantizedRows::tile_bytes(groups), panels = l.panel_count();
    const GroupBlocks blocks(l.rows, 2 * tile_bytes, BLOCK_BYTES);
    const int64_t stride = blocks.tiles() * TILE_ROWS, panel_bytes = groups * PANEL_TILES;
    arena.reserve(blocks.tiles() * tile_bytes + Arena::bytes_for<float>(groups * stride));
    QuantizedRows rows;
    rows.tiles = arena.take<int8_t>(blocks.tiles() * tile_bytes);
    rows.scales_GN = arena.take<float>(groups * stride);
    for_ranges(threads, l.rows, (1 << 14) / l.in_features, [&](int64_t first, int64_t last) {
        for (int64_t n = first; n < last; n++) rows.quantize(l, stride, n);
    });
    for_shares(threads, blocks.count * panels, [&](int64_t task, int64_t then) {
        TileRegisters registers(l.rows);
        const int64_t number = task % panels, first = blocks.first(task / panels), last = blocks.last(task / panels);
        const int8_t* panel = l.panels + number * panel_bytes;
        const char* next = (const char*)l.panels + then % panels * panel_bytes;
        const int64_t next_bytes = PANEL_TILES * GROUP_ROWS / (last - first + GROUP_ROWS - 1);
        float begin[PANEL], scales[PANEL];
        l.output.begin(number, begin);
        memset(scales, 0, sizeof scales);
        memcpy(scales, l.scales_O + number * PANEL, l.output.width(number) * sizeof(float));
        alignas(64) float totals[GROUP_ROWS * PANEL];
        for (int64_t row = first; row < last; row += GROUP_ROWS) {
            const int64_t count = std::min(GROUP_ROWS, last - row);
            const int8_t* x = rows.tiles + row / TILE_ROWS * tile_bytes;
            const float* scales_GN = rows.scales_GN + row;
            const char* fetched = next + (row - first) / GROUP_ROWS * groups * next_bytes;
            if (count > TILE_ROWS) {
                multiply_bytes<2>(x, tile_bytes, panel, scales_GN, stride, groups, fetched, next_bytes, totals);
            } else {
                multiply_bytes<1>(x, tile_bytes, panel, scales_GN, stride, groups, fetched, next_bytes, totals);
            }
            for (int64_t i = 0; i < count * PANEL; i += VL) {
                store(totals + i, load(totals + i) * load(scales + i % PANEL) + load(begin + i % PANEL));
            }
            l.output.put(row, count, number, totals);
        }
    });
}

}  // namespace

#endif
