// Linear layers on tile registers, which multiply bfloat16 sixteen times as fast as vectors multiply float32: float32 too,
// and as exactly, as sums of products of bfloat16 numbers. See Leveraging the bfloat16 Artificial Intelligence Datatype
// For Higher-Precision Computations (Henry, Tang and Heinecke, 2019).
//
// A float32 number is the sum of three of bfloat16, its planes: the first eight bits, the eight after them, the rest. Of
// the nine products of two numbers' planes the three smallest are left out; together they are below 2^-23 of the whole
// product at the very most, and mostly below 2^-26. A tile's instruction adds up the products of 32 input features by
// itself, and pieces of panels have sums of their own: little is rounded off at the size of the result.
//
// Every thread cuts the rows of x that it multiplies into tiles of planes for itself, which takes less time than to get them
// from another core.
// Pieces of panels are taken apart as they come: the next one between the products of this one, which take no vector unit.
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
constexpr int64_t ROWS_BYTES = 1 << 20;   // of a block of rows

inline int64_t chunks_of(int64_t in_features) { return (in_features + CHUNK - 1) / CHUNK; }

template <int ROW_TILES>
inline void add_products() {
    asm volatile("tdpbf16ps %tmm6, %tmm4, %tmm0\n" "tdpbf16ps %tmm7, %tmm4, %tmm1");
    if constexpr (ROW_TILES == 2) asm volatile("tdpbf16ps %tmm6, %tmm5, %tmm2\n" "tdpbf16ps %tmm7, %tmm5, %tmm3");
}

// Constants that cut planes, held in registers: GCC would rebuild them at each use
struct Cut {
    uvec high = uvec{} + 0xffff0000u, half = uvec{} + 0x8000u;

    INLINE Cut() { asm("" : "+v"(high), "+v"(half)); }
};

// One plane after another of two vectors: what each lane has in the one and in the other lies side by side
template <int PLANES>
INLINE void put_planes(const Cut& cut, vec first, vec second, char* to, int64_t apart) {
    const uvec high = cut.high;
    uvec a = bits_as<uvec>(first) & high, b = bits_as<uvec>(second) & high;
    store((float*)to, bits_as<vec>(a >> 16 | b));
    if constexpr (PLANES == 1) return;
    first -= bits_as<vec>(a), second -= bits_as<vec>(b);
    if constexpr (PLANES == 3) {  // to the nearest: what is left has either sign, and so has what is left out
        a = (bits_as<uvec>(first) + cut.half) & high, b = (bits_as<uvec>(second) + cut.half) & high;
    } else {
        a = bits_as<uvec>(first), b = bits_as<uvec>(second);
    }
    store((float*)(to + apart), bits_as<vec>(a >> 16 | b));
    if constexpr (PLANES == 2) return;
    first -= bits_as<vec>(a), second -= bits_as<vec>(b);
    // eight bits are left of each, but more than that of numbers whose third part is not normal any more
    store((float*)(to + 2 * apart), bits_as<vec>(bits_as<uvec>(first) >> 16 | (bits_as<uvec>(second) & high)));
}

// Decomposition of a kept matrix: X_PLANES of x times W_PLANES of weights. `put_pair` writes a panel's input features k and
// k + 1, or zeros for the second. PAIR: their size in bytes, about
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
    static INLINE void put_pair(const Cut& cut, const char* panel, int64_t k, char* to, int64_t apart) {
        const Weight* from = (const Weight*)panel + k * PANEL;
        for (int v = 0; v < PANEL_VECTORS; v++, from += VL, to += LINE) {
            put_planes<W_PLANES>(cut, load(from), BOTH ? load(from + PANEL) : vec{}, to, apart);
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
    static INLINE void put_pair(const Cut& cut, const char* panel, int64_t k, char* to, int64_t apart) {
        const uint8_t* block = (const uint8_t*)panel + k / SHARING * Form::BYTES;
        const uint8_t* from = block + Form::HEADER + k % SHARING * Form::FEATURE;
        const Widener<Form> widener(block);
        vec first[PANEL_VECTORS], second[PANEL_VECTORS];
        widener(from, first);
        widener(from + Form::FEATURE, second);
        for (int v = 0; v < PANEL_VECTORS; v++) put_planes<W_PLANES>(cut, first[v], second[v], to + v * LINE, apart);
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
    static INLINE void put_pair(const Cut&, const char* panel, int64_t k, char* to, int64_t) {
        memcpy(to, panel + k / 2 * PAIR, PAIR);
    }
};

// up to CHUNK numbers of a row of x, as tiles have it: planes are a tile apart, and end with zeros
template <int X_PLANES>
INLINE void cut_chunk(const Cut& cut, const float* x, int64_t size, char* to) {
    vec two[2] = {};
    if (size >= CHUNK) two[0] = load(x), two[1] = load(x + VL);
    else memcpy(two, x, size * sizeof(float));
    if constexpr (X_PLANES == 1) {
        for (int v = 0; v < 2; v++, to += LINE / 2) {
            const auto rounded = _mm512_cvtneps_pbh(two[v]);
            memcpy(to, &rounded, sizeof rounded);
        }
    } else {
        const ivec even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
        const vec first = _mm512_permutex2var_ps(two[0], (__m512i)even, two[1]);
        const vec second = _mm512_permutex2var_ps(two[0], (__m512i)(even + 1), two[1]);
        put_planes<X_PLANES>(cut, first, second, to, TILE_BYTES);
    }
}

template <class Kept>
inline int64_t row_tile_bytes(int64_t in_features) {  // of 16 rows
    return chunks_of(in_features) * Planes<Kept>::X_PLANES * TILE_BYTES;
}

// tile by tile of 16 rows, and chunk by chunk: what is written lies side by side
template <class Kept>
inline void cut_rows(const float* x_NI, int64_t stride, int64_t rows, int64_t in_features, char* to) {
    const Cut cut;
    for (int64_t n = 0; n < rows; n += TILE_ROWS) {
        const int64_t count = std::min(TILE_ROWS, rows - n);
        for (int64_t i = 0; i < in_features; i += CHUNK, to += Planes<Kept>::X_PLANES * TILE_BYTES) {
            const float* from = x_NI + n * stride + i;
            for (int64_t r = 0; r < count; r++) {
                cut_chunk<Planes<Kept>::X_PLANES>(cut, from + r * stride, in_features - i, to + r * LINE);
            }
        }
    }
}

// Work of one thread: panels times rows on the tile unit, and the vector units' work interleaved between tile products.
// That work must be little code: the reorder buffer overlaps both only within a few hundred instructions.
template <class Kept, class Out>
struct PanelWorker {
    using P = Planes<Kept>;
    static constexpr int64_t X_BYTES = P::X_PLANES * TILE_BYTES;  // of a chunk
    // A pair fetches as many lines as it has, of the next PAGES pages of the panel in turn: several are looked up, and their
    // reading begins, at the same time. For bfloat16, which is taken apart at once, one is enough, and where there are many
    // rows its BEGINNING in lines: a processor goes on by itself to the end of a page.
    static constexpr uint64_t LINES = std::max<int64_t>(1, P::PAIR / LINE);
    static constexpr uint64_t PAGES = P::W_PLANES > 1 ? LINES : 1, SIDE = PAGES * PAGE, BEGINNING = 8;
    static constexpr int64_t MOST = 24;                           // chunks whose products registers add up, from the first
    static constexpr int64_t FEW = 2;                             // chunks of a piece where it is not MOST, a part of them
    static constexpr int64_t PLANE_BYTES = MOST * PANEL_TILES;
    static constexpr int64_t STORED_NEXT = 8 * LINE;              // how far ahead the first cache is made ready for stores
    static constexpr int64_t CALLS = P::X_PLANES == 1 ? 1 : P::W_PLANES == 1 ? 3 : 2 * P::W_PLANES;  // of `Between` a chunk
    static constexpr int64_t PUTS = (GROUP_ROWS + MOST * CALLS - 1) / (MOST * CALLS);  // rows that are put with every call

    struct Piece {  // of a panel
        const char* panel = nullptr;
        const char* beyond = nullptr;  // the panel that is probably next, less the bytes of one
        int64_t number = 0, chunk = 0, chunks = 0;  // the first of its chunks, and how many

        int64_t end() const { return (chunk + chunks) * CHUNK; }  // of its input features
    };
    struct Sums {  // of a group of rows, that are to be put where they belong
        bool first, last;  // of the panel's sums
        int64_t number, row, count = 0;
        float* held;
        alignas(64) float values[GROUP_ROWS * PANEL];
    };
    // Work interleaved between the products. Nothing else refers to it, so that it stays in registers
    struct Between {
        const char* panel;
        int64_t at, end, step;  // input features that are taken apart, and how many with every call: pairs
        const char* beyond;     // as in Piece
        uint64_t bytes, lines;  // of a panel; of a page, that are fetched
        char* planes;
        Cut cut;
        const float* begin;
        const Out& output;
        Sums& sums;
        int64_t row = 0;  // of the sums, that is put next

        INLINE void fetch() {
            const uint64_t from = (uint64_t)at / 2 * P::PAIR, line = from % SIDE / (PAGES * LINE);
            if (P::W_PLANES == 1 && line >= lines) return;
            for (uint64_t i = 0; i < LINES; i++) {
                const uint64_t later = from / SIDE * SIDE + SIDE + i % PAGES * PAGE + (line + i / PAGES) * LINE;
                __builtin_prefetch((later < bytes ? panel : beyond) + later, 0, 2);
            }
        }
        INLINE void take_apart() {
            for (const int64_t stop = std::min(end, at + step); at < stop; at += 2, planes += PANEL_LINE) {
                fetch();
                for (int p = 0; p < P::W_PLANES; p++) {
                    for (int64_t i = 0; i < PANEL_LINE; i += LINE) {
                        __builtin_prefetch(planes + p * PLANE_BYTES + STORED_NEXT + i, 1, 3);
                    }
                }
                P::template put_pair<true>(cut, panel, at, planes, PLANE_BYTES);
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
    const char* const x_tiles;
    float* const held;  // the sums of the pieces before, of each row
    int64_t out_row = 0;
    const int64_t chunks = chunks_of(l.in_features);
    const int64_t most = l.rows > GROUP_ROWS ? MOST : FEW;  // one group alone uses planes once: the first cache holds them
    const uint64_t panel_bytes = P::panel(l.panels, l.in_features, 1) - P::panel(l.panels, l.in_features, 0);
    Piece now, next;  // what is multiplied, and what is taken apart meanwhile
    int64_t at = 0;   // where that has come to: an input feature
    int planes_turn = 0, sums_turn = 0;
    alignas(64) float begin[PANEL];
    Sums sums[2];
    alignas(64) char planes[2][P::W_PLANES * PLANE_BYTES];

    PanelWorker(const LinearOf<float, Out>& l, const char* x_tiles, float* held) : l(l), x_tiles(x_tiles), held(held) {}

    // Set up the piece after the current one; `following` is the panel after that
    void prepare(int64_t number, int64_t chunk, int64_t following) {
        const char* beyond = P::panel(l.panels, l.in_features, following < 0 ? number : following) - panel_bytes;
        next = {P::panel(l.panels, l.in_features, number), beyond, number, chunk, std::min(most, chunks - chunk)};
        at = chunk * CHUNK;
    }
    void advance() {
        const Cut cut;
        for (; at < next.end(); at += 2) {
            char* to = next_planes();
            if (at + 1 < l.in_features) {
                P::template put_pair<true>(cut, next.panel, at, to, PLANE_BYTES);
            } else if (at < l.in_features) {
                P::template put_pair<false>(cut, next.panel, at, to, PLANE_BYTES);
            } else {
                for (int p = 0; p < P::W_PLANES; p++) memset(to + p * PLANE_BYTES, 0, PANEL_LINE);
            }
        }
        planes_turn ^= 1;
        now = next;
        next = {}, at = 0;
    }
    char* next_planes() { return planes[planes_turn ^ 1] + (at - next.chunk * CHUNK) / 2 * PANEL_LINE; }

    // the piece of now times all rows
    void multiply() {
        for (int64_t row = 0; row < l.rows; row += GROUP_ROWS) {
            const int64_t groups = (l.rows - row + GROUP_ROWS - 1) / GROUP_ROWS, calls = groups * now.chunks * CALLS;
            const bool evenly = P::W_PLANES > 1 && groups > 1;  // what takes long; the last group leaves nothing
            const int64_t pairs = (next.end() - at) / 2, step = 2 * ((pairs + (evenly ? calls / 2 : calls - 1)) / calls);
            const char* x = x_tiles + row / TILE_ROWS * row_tile_bytes<Kept>(l.in_features) + now.chunk * X_BYTES;
            const int64_t count = std::min(GROUP_ROWS, l.rows - row);
            if (count > TILE_ROWS) multiply_group<2>(x, step);
            else multiply_group<1>(x, step);
            sums[sums_turn ^ 1].count = 0;
            if (now.chunk == 0 && row == 0) l.output.begin(now.number, begin);  // the panel before is put by now
            const int64_t end = now.chunk + now.chunks;
            if (!is_summed(end)) continue;
            Sums& s = sums[sums_turn];
            s.first = now.chunk < MOST, s.last = end == chunks, s.number = now.number;
            s.row = out_row + row, s.count = count, s.held = held + row * PANEL;
            sums_turn ^= 1;
        }
    }
    bool is_summed(int64_t chunk) const { return chunk % MOST == 0 || chunk == chunks; }
    Between between(int64_t step) {
        const int64_t whole = std::min(next.end(), l.in_features / 2 * 2);  // pairs
        const uint64_t lines = most == FEW ? PAGE / LINE : BEGINNING;
        return {
            next.panel, at, whole, step, next.beyond, panel_bytes, lines, next_planes(), {}, begin, l.output, sums[sums_turn ^ 1]};
    }
    // All rows times the panels that `take` gives, until it gives -1. Results are those of rows from `first_row` on
    template <class Take>
    void run(int64_t first_row, Take&& take) {
        int64_t number = take();
        if (number < 0) return;
        TileRegisters registers(l.rows);
        out_row = first_row;
        prepare(number, 0, number);
        while (number >= 0) {
            const int64_t following = take();
            const int64_t after = std::clamp<int64_t>(2 * following - number, 0, l.panel_count() - 1);  // probably
            for (int64_t chunk = 0; chunk < chunks;) {
                advance();
                chunk += now.chunks;
                if (chunk < chunks) prepare(number, chunk, following);
                else if (following >= 0) prepare(following, 0, after);
                multiply();
            }
            number = following;
        }
        between(0).put(GROUP_ROWS);
    }

    template <int ROW_TILES>
    void multiply_group(const char* x, int64_t step) {
        const int64_t apart = chunks * X_BYTES;
        const char *const w = planes[planes_turn], *const w_end = w + now.chunks * PANEL_TILES;
        Between meanwhile = between(step);
        auto products = [&]() __attribute__((always_inline)) {
            add_products<ROW_TILES>();
            meanwhile();
        };
        if (is_summed(now.chunk)) clear_sums<ROW_TILES>();
        for (const char *a = x, *b = w; b < w_end; a += X_BYTES, b += PANEL_TILES) {
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
            }
            load_weights(b);
            if constexpr (P::X_PLANES == 3) {
                if constexpr (P::W_PLANES == 1) load_rows<ROW_TILES>(a + TILE_BYTES, apart);
                products();
                load_rows<ROW_TILES>(a + 2 * TILE_BYTES, apart);
                products();
                load_rows<ROW_TILES>(a, apart);
            }
            products();
        }
        meanwhile.put(GROUP_ROWS);
        at = meanwhile.at;
        if (is_summed(now.chunk + now.chunks)) store_sums<ROW_TILES>(sums[sums_turn].values);
    }
};

// All rows times all panels; throws std::bad_alloc, before any thread starts. Rows are taken block by block, so that the
// second cache holds what they are cut into, and a thread has its own blocks where there are as many: they lie together,
// in what it reads and in what it writes, and are cut once. Threads do not meet.
template <class Kept, class Out>
inline void multiply_tiles(const LinearOf<float, Out>& l, int threads) {
    if (l.rows == 0) return;
    using Worker = PanelWorker<Kept, Out>;
    constexpr int64_t WORTH_CUTTING = 32 / Worker::CALLS;  // panels that take twice as long as to cut the rows for them
    thread_local Arena arena;
    const int64_t tile_bytes = row_tile_bytes<Kept>(l.in_features), panels = l.panel_count();
    const GroupBlocks blocks(l.rows, 2 * tile_bytes, ROWS_BYTES);
    const int64_t x_bytes = blocks.most_rows() / TILE_ROWS * tile_bytes;
    const int64_t sums = blocks.most_rows() * PANEL;
    threads = (int)std::min<int64_t>(threads, blocks.count * panels);
    arena.reserve(threads * (Arena::bytes_for<char>(x_bytes) + Arena::bytes_for<float>(sums)));
    char* const x_tiles = arena.take<char>(threads * x_bytes);
    float* const held = arena.take<float>(threads * sums);
    Shares shares(threads, blocks.count * panels);
    auto work = [&](int thread) {
        char* const tiles = x_tiles + thread * x_bytes;
        LinearOf<float, Out> part = l;
        int64_t cut = -1;  // the block whose rows they are
        for (int i = 0; i < shares.count; i++) {
            const int share = (thread + i) % shares.count;
            for (Shares::Range left; (left = shares.left(share)).size() > 0;) {
                const bool own = i == 0 || left.first == shares.all(share).first;  // or nobody's yet
                const int64_t block = (own ? left.first : left.end - 1) / panels, first = block * panels;
                if (!own && block != cut && left.size() < WORTH_CUTTING) break;
                if (block != cut) {
                    cut = block;
                    part.x_NI = l.x_NI + blocks.first(block) * l.stride_N;
                    part.rows = blocks.last(block) - blocks.first(block);
                    cut_rows<Kept>(part.x_NI, part.stride_N, part.rows, part.in_features, tiles);
                }
                Worker worker(part, tiles, held + thread * sums);
                worker.run(blocks.first(block), [&] {
                    const int64_t task = own ? shares.take_first(share, first + panels) : shares.take_last(share, first);
                    return task < 0 ? -1 : task - first;
                });
            }
        }
    };
    on_threads(threads, work);
}

// up to a tile of rows times a panel, on this thread; `space` is for the tile
template <class Kept, class Out>
inline void multiply_tiles_of_one(const LinearOf<float, Out>& l, int64_t number, char* space) {
    cut_rows<Kept>(l.x_NI, l.stride_N, l.rows, l.in_features, space);
    float held[TILE_ROWS * PANEL];
    PanelWorker<Kept, Out> worker(l, space, held);
    worker.run(0, [&] { return std::exchange(number, -1); });
}

}  // namespace

#endif
