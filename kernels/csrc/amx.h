// The tile registers of AMX (Intel's manual, volume 1, chapter 18), and what its users have in common.
//
// A tile is 16 rows of 64 bytes. Two tiles of rows by two of weights, side by side the width of a panel, are multiplied at
// once: a GROUP. Sums are in registers 0 to 3, by tile of rows and half of the panel, rows in 4 and 5, weights in 6 and 7.
#pragma once

#include "linear.h"

#if defined(TILE_REGISTERS)
#define INLINE __attribute__((always_inline)) inline

namespace {

constexpr int64_t TILE_ROWS = 16, TILE_BYTES = 1024, LINE = 64;
constexpr int64_t GROUP_ROWS = 2 * TILE_ROWS;
constexpr int64_t PANEL_LINE = 2 * LINE;                       // a row of both halves' tiles
constexpr int64_t PANEL_TILES = TILE_ROWS * PANEL_LINE;        // both, in bytes
static_assert(PANEL == 2 * TILE_ROWS && VL == TILE_ROWS, "a panel is two tiles wide");

// Tile configuration of this thread for the lifetime of the object. Tiles of rows and sums have as many rows as there are,
// at most 16: rows beyond are neither read nor written.
struct TileRegisters {
    struct alignas(64) Shapes {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    };

    explicit TileRegisters(int64_t rows) {
        Shapes shapes;
        for (int i = 0; i < 8; i++) {
            shapes.row_bytes[i] = LINE;
            shapes.rows[i] = (uint8_t)(i < 6 ? std::min(rows, TILE_ROWS) : TILE_ROWS);
        }
        asm volatile("ldtilecfg %0" ::"m"(shapes));
    }
    ~TileRegisters() { asm volatile("tilerelease" ::: "memory"); }
    TileRegisters(const TileRegisters&) = delete;
};

// written as assembly: GCC's intrinsics do not say which memory they read
template <int REGISTER>
inline void load_tile(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(REGISTER) : "memory");
}
template <int REGISTER>
inline void store_tile(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(REGISTER) : "memory");
}

template <int ROW_TILES>
inline void clear_sums() {
    asm volatile("tilezero %tmm0\n" "tilezero %tmm1");
    if constexpr (ROW_TILES == 2) asm volatile("tilezero %tmm2\n" "tilezero %tmm3");
}
// `apart` bytes from one tile of rows to the other
template <int ROW_TILES>
inline void load_rows(const char* from, int64_t apart) {
    load_tile<4>(from, LINE);
    if constexpr (ROW_TILES == 2) load_tile<5>(from + apart, LINE);
}
inline void load_weights(const char* from) {
    load_tile<6>(from, PANEL_LINE);
    load_tile<7>(from + LINE, PANEL_LINE);
}
// [rows, PANEL]
template <int ROW_TILES>
inline void store_sums(void* to) {
    constexpr int64_t stride = PANEL * 4, below = TILE_ROWS * stride;
    store_tile<0>(to, stride), store_tile<1>((char*)to + LINE, stride);
    if constexpr (ROW_TILES == 2) store_tile<2>((char*)to + below, stride), store_tile<3>((char*)to + below + LINE, stride);
}

// Rows in groups, and groups in blocks that all panels are multiplied with in turn: they stay in the second cache
struct GroupBlocks {
    int64_t rows, groups, count;

    GroupBlocks(int64_t rows, int64_t group_bytes, int64_t block_bytes) : rows(rows) {
        const int64_t most = std::max<int64_t>(1, block_bytes / group_bytes);
        groups = (rows + GROUP_ROWS - 1) / GROUP_ROWS;
        count = (groups + most - 1) / most;
    }
    int64_t tiles() const { return (rows + TILE_ROWS - 1) / TILE_ROWS; }
    int64_t most_rows() const { return (groups + count - 1) / count * GROUP_ROWS; }  // of a block
    int64_t first(int64_t block) const { return groups * block / count * GROUP_ROWS; }
    int64_t last(int64_t block) const { return std::min(rows, first(block + 1)); }
};

}  // namespace

#endif
