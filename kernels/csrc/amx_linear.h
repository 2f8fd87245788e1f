// Linear layers on tile registers, which multiply bfloat16 sixteen times as fast as vectors multiply float32: float32 too,
// and as exactly, as sums of products of bfloat16 numbers. See Leveraging the bfloat16 Artificial Intelligence Datatype
// For Higher-Precision Computations (Henry, Tang and Heinecke, 2019).
//
// A float32 number is the sum of three of bfloat16, its planes: the first eight bits, the eight after them, the rest. Of
// the nine products of two numbers' planes the three smallest are left out; together they are below 2^-23 of the whole
// product at the very most, and mostly below 2^-26. The five small ones of a piece of input features are added up first,
// and then the large one on top, 32 input features at a time: little is rounded off at the size of the result.
//
// Rows of x are cut into tiles of planes once a call. Pieces of panels are taken apart as they come: the next one between
// the products of this one, which take no vector unit.
//
// N rows · I input features · O output features
#pragma once

#include "amx.h"
#include "attention.h"
#include "block_linear.h"
#include "rounded_linear.h"

#if defined(TILE_REGISTERS)

namespace {

constexpr int64_t CHUNK = 32;             // input features of a tile of bfloat16, in pairs
constexpr int64_t ROWS_BYTES = 3 << 19;   // of a block of rows

inline int64_t chunks_of(int64_t in_features) { return (in_features + CHUNK - 1) / CHUNK; }

template <int ROW_TILES>
inline void add_products() {
    asm volatile("tdpbf16ps %tmm6, %tmm4, %tmm0\n" "tdpbf16ps %tmm7, %tmm4, %tmm1");
    if constexpr (ROW_TILES == 2) asm volatile("tdpbf16ps %tmm6, %tmm5, %tmm2\n" "tdpbf16ps %tmm7, %tmm5, %tmm3");
}

// One plane after another of two vectors: what each lane has in the one and in the other lies side by side
template <int PLANES>
INLINE void put_planes(vec first, vec second, char* to, int64_t apart) {
    const uvec high = uvec{} + 0xffff0000u;
    uvec a = bits_as<uvec>(first) & high, b = bits_as<uvec>(second) & high;
    store((float*)to, bits_as<vec>(a >> 16 | b));
    if constexpr (PLANES == 1) return;
    first -= bits_as<vec>(a), second -= bits_as<vec>(b);
    if constexpr (PLANES == 3) {  // to the nearest: what is left has either sign, and so has what is left out
        a = (bits_as<uvec>(first) + 0x8000u) & high, b = (bits_as<uvec>(second) + 0x8000u) & high;
    } else {
        a = bits_as<uvec>(first), b = bits_as<uvec>(second);
    }
    store((float*)(to + apart), bits_as<vec>(a >> 16 | b));
    if constexpr (PLANES == 2) return;
    first -= bits_as<vec>(a), second -= bits_as<vec>(b);
    store((float*)(to + 2 * apart), bits_as<vec>(bits_as<uvec>(first) >> 16 | bits_as<uvec>(second)));
}

// How a kept matrix is taken apart: X_PLANES of x by W_PLANES of weights. `put_pair` writes input features k and k + 1, or
// zeros for the second. PAIR: bytes that they take, about
template <class Kept>
struct Planes;

template <class Weight>
struct Planes<Plain<Weight>> {
    static constexpr int X_PLANES = 3;
    static constexpr int W_PLANES = std::is_same_v<Weight, float> ? 3 : std::is_same_v<Weight, f16> ? 2 : 1;
    static constexpr int64_t PAIR = 2 * PANEL * sizeof(Weight);

    static const char* panel(const void* panels, int64_t in_features, int64_t number) {
        return (const char*)((const Weight*)panels + number * in_features * PANEL);
    }
    template <bool BOTH>
    static INLINE void put_pair(const char* panel, int64_t k, char* to, int64_t apart) {
        const Weight* from = (const Weight*)panel + k * PANEL;
        for (int v = 0; v < PANEL_VECTORS; v++, from += VL, to += LINE) {
            put_planes<W_PLANES>(load(from), BOTH ? load(from + PANEL) : vec{}, to, apart);
        }
    }
};

template <class Form>
struct Planes<InBlocks<Form>> {
    static constexpr int X_PLANES = 3, W_PLANES = 3;
    static constexpr int64_t PAIR = 2 * Form::BYTES / SHARING;

    static const char* panel(const void* panels, int64_t in_features, int64_t number) {
        return (const char*)panels + number * (in_features / SHARING) * Form::BYTES;
    }
    template <bool>
    static INLINE void put_pair(const char* panel, int64_t k, char* to, int64_t apart) {
        const uint8_t* block = (const uint8_t*)panel + k / SHARING * Form::BYTES;
        const uint8_t* from = block + Form::HEADER + k % SHARING * Form::FEATURE;
        const Widener<Form> widener(block);
        vec first[PANEL_VECTORS], second[PANEL_VECTORS];
        widener(from, first);
        widener(from + Form::FEATURE, second);
        for (int v = 0; v < PANEL_VECTORS; v++) put_planes<W_PLANES>(first[v], second[v], to + v * LINE, apart);
    }
};

// a matrix in bfloat16 that x is rounded for
struct InPairs;
template <>
struct Planes<InPairs> {
    static constexpr int X_PLANES = 1, W_PLANES = 1;
    static constexpr int64_t PAIR = PANEL_LINE;

    static const char* panel(const void* panels, int64_t in_features, int64_t number) {
        return (const char*)((const pair*)panels + number * numbers_of<pair>(in_features) * PANEL);
    }
    template <bool>
    static INLINE void put_pair(const char* panel, int64_t k, char* to, int64_t) {
        memcpy(to, panel + k / 2 * PAIR, PAIR);
    }
};

// a row of x as its tiles have it, chunk after chunk, the planes of each a tile apart; zeros to the chunk's end
template <int X_PLANES>
inline void cut_row(const float* x, int64_t size, char* to) {
    for (int64_t i = 0; i < size; i += CHUNK, to += X_PLANES * TILE_BYTES) {
        vec two[2] = {};
        if (size - i >= CHUNK) two[0] = load(x + i), two[1] = load(x + i + VL);
        else memcpy(two, x + i, (size - i) * sizeof(float));
        if constexpr (X_PLANES == 1) {
            for (int v = 0; v < 2; v++, to += LINE / 2) {
                const auto rounded = _mm512_cvtneps_pbh(two[v]);
                memcpy(to, &rounded, sizeof rounded);
            }
            to -= LINE;
        } else {
            const ivec even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
            const vec first = _mm512_permutex2var_ps(two[0], (__m512i)even, two[1]);
            const vec second = _mm512_permutex2var_ps(two[0], (__m512i)(even + 1), two[1]);
            put_planes<X_PLANES>(first, second, to, TILE_BYTES);
        }
    }
}

template <class Kept>
inline int64_t row_tile_bytes(int64_t in_features) {  // of 16 rows
    return chunks_of(in_features) * Planes<Kept>::X_PLANES * TILE_BYTES;
}

template <class Kept>
inline void cut_rows(const float* x_NI, int64_t stride, int64_t first, int64_t last, int64_t in_features, char* tiles) {
    for (int64_t n = first; n < last; n++) {
        char* to = tiles + n / TILE_ROWS * row_tile_bytes<Kept>(in_features) + n % TILE_ROWS * LINE;
        cut_row<Planes<Kept>::X_PLANES>(x_NI + n * stride, in_features, to);
    }
}

// What one thread does: panels times rows, and between the products whatever vector units have to do. That has to be
// little code: what it waits for and what the tiles wait for are looked at together, a few hundred instructions ahead.
template <class Kept, class Out>
struct PanelWorker {
    using P = Planes<Kept>;
    static constexpr int64_t X_BYTES = P::X_PLANES * TILE_BYTES;  // of a chunk
    static constexpr int64_t MOST = 6;                            // chunks of a piece
    static constexpr int64_t PLANE_BYTES = MOST * PANEL_TILES;
    static constexpr int64_t CALLS = P::X_PLANES == 1 ? 1 : 2 * P::W_PLANES + (P::W_PLANES == 1);  // of `Between` a chunk
    static constexpr int64_t PUTS = (GROUP_ROWS + MOST * CALLS - 1) / (MOST * CALLS);  // rows that are put with every call

    struct Piece {  // of a panel
        const char* panel = nullptr;
        int64_t number = 0, chunk = 0, chunks = 0;  // the first of its chunks, and how many

        int64_t end() const { return (chunk + chunks) * CHUNK; }  // of its input features
    };
    struct Sums {  // of a group of rows and a piece, that are to be put where they belong
        bool first, last;  // of the panel's pieces
        int64_t number, row, count = 0;
        float* held;
        alignas(64) float values[GROUP_ROWS * PANEL];
    };
    // What is done between the products. Nothing else refers to it, so that it stays in registers
    struct Between {
        const char* panel;
        int64_t k, k_end, step;  // input features that are taken apart, and how many with every call
        int64_t ahead;           // how far to fetch
        char* planes;
        const float* begin;
        const Out& output;
        Sums& sums;
        int64_t row = 0;  // of the sums, that is put next

        INLINE void take_apart() {
            for (const int64_t stop = std::min(k_end, k + step); k < stop; k += 2, planes += PANEL_LINE) {
                prefetch(panel + k * (P::PAIR / 2) + ahead, P::PAIR);
                P::template put_pair<true>(panel, k, planes, PLANE_BYTES);
            }
        }
        INLINE void put(int64_t most) {
            for (const int64_t stop = std::min(sums.count, row + most); row < stop; row++) {
                float *values = sums.values + row * PANEL, *held = sums.held + row * PANEL;
                const float* from = sums.first ? begin : held;
                float* to = sums.last ? values : held;
                const vec left = load(values) + load(from), right = load(values + VL) + load(from + VL);
                store(to, left), store(to + VL, right);
                if (sums.last) output.put(sums.row + row, 1, sums.number, values);
            }
        }
        INLINE void operator()() {
            take_apart();
            put(PUTS);
        }
    };

    const LinearOf<float, Out>& l;
    const int64_t ahead;  // bytes from a panel to the one that this thread will probably have next
    const char* const x_tiles;
    float* const held;  // the sums of the pieces before, of each row of a block
    const int64_t chunks = chunks_of(l.in_features);
    Piece now, next;  // what is multiplied, and what is taken apart meanwhile
    int64_t k = 0;    // where that has come to
    int planes_turn = 0, sums_turn = 0;
    alignas(64) float begin[PANEL];
    Sums sums[2];
    alignas(64) char planes[2][P::W_PLANES * PLANE_BYTES];

    PanelWorker(const LinearOf<float, Out>& l, int threads, const char* x_tiles, float* held)
        : l(l), ahead(threads * numbers_of<pair>(l.in_features) * P::PAIR), x_tiles(x_tiles), held(held) {}

    // what comes after the piece of now
    void prepare(int64_t number, int64_t chunk) {
        next = {P::panel(l.panels, l.in_features, number), number, chunk, std::min(MOST, chunks - chunk)};
        k = chunk * CHUNK;
    }
    void advance() {
        for (; k < next.end(); k += 2) {
            char* to = next_planes();
            if (k + 1 < l.in_features) {
                P::template put_pair<true>(next.panel, k, to, PLANE_BYTES);
            } else if (k < l.in_features) {
                P::template put_pair<false>(next.panel, k, to, PLANE_BYTES);
            } else {
                for (int p = 0; p < P::W_PLANES; p++) memset(to + p * PLANE_BYTES, 0, PANEL_LINE);
            }
        }
        planes_turn ^= 1;
        now = next;
        next = {};
    }
    char* next_planes() { return planes[planes_turn ^ 1] + (k - next.chunk * CHUNK) / 2 * PANEL_LINE; }

    // the piece of now times rows first .. last - 1
    void multiply(int64_t first, int64_t last) {
        const int64_t groups = (last - first + GROUP_ROWS - 1) / GROUP_ROWS, calls = groups * now.chunks * CALLS;
        const int64_t step = (next.chunks * CHUNK / 2 + calls - 1) / calls * 2;
        for (int64_t row = first; row < last; row += GROUP_ROWS) {
            const char* x = x_tiles + row / TILE_ROWS * row_tile_bytes<Kept>(l.in_features) + now.chunk * X_BYTES;
            Sums& s = sums[sums_turn];
            s.first = now.chunk == 0, s.last = now.chunk + now.chunks == chunks, s.number = now.number;
            s.row = row, s.count = std::min(GROUP_ROWS, last - row), s.held = held + (row - first) * PANEL;
            if (s.count > TILE_ROWS) multiply_group<2>(x, s.values, step);
            else multiply_group<1>(x, s.values, step);
            if (s.first && row == first) l.output.begin(now.number, begin);  // the panel before is put by now
            sums_turn ^= 1;
        }
    }
    Between between(int64_t step) {
        const int64_t whole = std::min(next.end(), l.in_features / 2 * 2);  // pairs
        return {next.panel, k, whole, step, ahead, next_planes(), begin, l.output, sums[sums_turn ^ 1]};
    }
    void finish() { between(0).put(GROUP_ROWS); }

    template <int ROW_TILES>
    void multiply_group(const char* x, float* values, int64_t step) {
        const int64_t apart = chunks * X_BYTES;
        const char *const w = planes[planes_turn], *const w_end = w + now.chunks * PANEL_TILES;
        Between meanwhile = between(step);
        auto products = [&]() __attribute__((always_inline)) {
            add_products<ROW_TILES>();
            meanwhile();
        };
        clear_sums<ROW_TILES>();
        const char* a = x;
        for (const char* b = w; P::X_PLANES == 3 && b < w_end; a += X_BYTES, b += PANEL_TILES) {
            load_rows<ROW_TILES>(a, apart);
            if constexpr (P::W_PLANES == 3) {
                load_weights(b + 2 * PLANE_BYTES);
                products();
            }
            if constexpr (P::W_PLANES >= 2) {
                load_weights(b + PLANE_BYTES);
                products();
                load_rows<ROW_TILES>(a + TILE_BYTES, apart);
                products();
                load_weights(b);
            } else {
                load_weights(b);
                load_rows<ROW_TILES>(a + TILE_BYTES, apart);
            }
            products();
            load_rows<ROW_TILES>(a + 2 * TILE_BYTES, apart);
            products();
        }
        a = x;
        for (const char* b = w; b < w_end; a += X_BYTES, b += PANEL_TILES) {
            load_rows<ROW_TILES>(a, apart);
            load_weights(b);
            products();
        }
        meanwhile.put(GROUP_ROWS);
        if (meanwhile.k > k) k = meanwhile.k;
        store_sums<ROW_TILES>(values);
    }
};

// All rows times all panels; throws std::bad_alloc, before any thread starts
template <class Kept, class Out>
inline void multiply_tiles(const LinearOf<float, Out>& l, int threads) {
    if (l.rows == 0) return;
    thread_local Arena arena;
    const int64_t tile_bytes = row_tile_bytes<Kept>(l.in_features);
    const GroupBlocks blocks(l.rows, 2 * tile_bytes, ROWS_BYTES);
    const int64_t held_size = blocks.most_rows() * PANEL, panels = l.panel_count(), tasks = blocks.count * panels;
    arena.reserve(blocks.tiles() * tile_bytes + threads * Arena::bytes_for<float>(held_size));
    char* const x_tiles = arena.take<char>(blocks.tiles() * tile_bytes);
    float* const held = arena.take<float>(threads * held_size);
    for_ranges(threads, l.rows, (1 << 14) / l.in_features, [&](int64_t first, int64_t last) {
        cut_rows<Kept>(l.x_NI, l.stride_N, first, last, l.in_features, x_tiles);
    });
    int64_t taken = 0;
    auto take = [&] { return __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED); };
    auto work = [&](int thread) {
        int64_t task = take();
        if (task >= tasks) return;
        TileRegisters registers(l.rows);
        PanelWorker<Kept, Out> worker(l, threads, x_tiles, held + thread * held_size);
        worker.prepare(task % panels, 0);
        while (task < tasks) {
            const int64_t next = take(), block = task / panels;
            for (int64_t chunk = 0; chunk < worker.chunks;) {
                worker.advance();
                chunk += worker.now.chunks;
                if (chunk < worker.chunks) worker.prepare(task % panels, chunk);
                else if (next < tasks) worker.prepare(next % panels, 0);
                worker.multiply(blocks.first(block), blocks.last(block));
            }
            task = next;
        }
        worker.finish();
    };
    on_threads(tasks < threads ? (int)tasks : threads, work);
}

// up to a tile of rows times a panel, on this thread; `space` is for the tiles of the rows
template <class Kept, class Out>
inline void multiply_tiles_of_one(const LinearOf<float, Out>& l, int64_t number, char* space) {
    TileRegisters registers(l.rows);
    cut_rows<Kept>(l.x_NI, l.stride_N, 0, l.rows, l.in_features, space);
    float held[TILE_ROWS * PANEL];
    PanelWorker<Kept, Out> worker(l, 0, space, held);
    worker.prepare(number, 0);
    for (int64_t chunk = 0; chunk < worker.chunks;) {
        worker.advance();
        chunk += worker.now.chunks;
        if (chunk < worker.chunks) worker.prepare(number, chunk);
        worker.multiply(0, l.rows);
    }
    worker.finish();
}

}  // namespace

#endif
