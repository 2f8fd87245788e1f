// A step's attention as one list of tasks: tiles of prompt chunks, largest first, then pieces of decodes.
#pragma once

#include <algorithm>
#include <vector>

#include "decode_attention.h"
#include "prefill_attention.h"

namespace {

struct DecodeUnit {
    Span seen;  // all its positions
    int64_t pieces;
    int64_t partial_at;  // in the partial results, in floats
    int64_t left;        // pieces to be computed; whoever computes the last one joins them
};

struct DecodePiece {
    int64_t unit, number;
};

constexpr int64_t PIECES_A_THREAD = 8;   // of decodes, at least, where there are so many
constexpr int64_t MOST_TOGETHER = 16;    // query heads of a piece, whose scores stay in the nearest caches

struct Tasks {
    std::vector<PromptTile> tiles;
    std::vector<int64_t> decodes;  // sequences
    std::vector<DecodeUnit> units;
    std::vector<DecodePiece> pieces;
    std::vector<int64_t> starts;  // of the decodes' tasks among the pieces, and their end
    Arena arena;
    int64_t tile_queries = 0, partial_floats = 0;
    int64_t heads = 1;  // kv heads of a decode's piece, at most

    void list(const Attention& a, int threads) {
        tiles.clear();
        list_decodes(a, threads);
        int64_t prompt_queries = 0;
        for (int64_t s = 0; s < a.num_sequences; s++) prompt_queries += a.is_decode(s) ? 0 : a.queries(s);
        if (prompt_queries == 0) return;
        // smaller tiles where there would be too few: no row's result changes by it
        tile_queries = std::max<int64_t>(1, ROWS / a.group());
        while (tile_queries * a.group() > 2 * VL && prompt_queries * a.kv_heads < 4 * threads * tile_queries) {
            tile_queries = (tile_queries + 1) / 2;
        }
        for (int64_t s = 0; s < a.num_sequences; s++) list_prompt(a, s);
        std::stable_sort(tiles.begin(), tiles.end(), [&](const PromptTile& one, const PromptTile& other) {
            return cost(a, one) > cost(a, other);
        });
    }

    // Pieces of sequences that begin in the same block come one after another, while the second cache holds what they
    // share; others read memory about in its order.
    void list_decodes(const Attention& a, int64_t threads) {
        decodes.clear();
        units.clear();
        pieces.clear();
        starts.clear();
        partial_floats = 0;
        int64_t count = 0;  // of a kv head
        for (int64_t s = 0; s < a.num_sequences; s++) {
            if (!a.is_decode(s)) continue;
            decodes.push_back(s);
            count += pieces_of(a, s);
        }
        heads = std::clamp<int64_t>(MOST_TOGETHER / a.group(), 1, a.kv_heads);
        if (count * a.kv_heads < PIECES_A_THREAD * threads * heads) heads = 1;
        const int64_t total = (int64_t)decodes.size();
        for (int64_t i = 0, end; i < total; i = end) {
            for (end = i + 1; end < total && first_block(a, decodes[end]) == first_block(a, decodes[i]);) end++;
            const int64_t before = (int64_t)units.size();
            for (int64_t j = i; j < end; j++) list_units(a, decodes[j], end - i > 1 ? LONG_TURN : SHORT_TURN);
            list_pieces(before, ((int64_t)units.size() - before) / (end - i));
        }
        // long tasks first, for memory is read ahead within a task, and short ones at the end: no thread waits long there
        const int64_t listed = (int64_t)pieces.size();
        for (int64_t at = 0; at < listed; at += std::max<int64_t>(1, (listed - at) / (2 * threads))) starts.push_back(at);
        starts.push_back(listed);
    }

    void list_units(const Attention& a, int64_t s, int64_t turn) {
        const int64_t last = a.lengths[s], first = a.first_seen(last - 1), count = pieces_of(a, s);
        for (int64_t k = 0; k < a.kv_heads; k += heads) {
            const int64_t own = std::min(heads, a.kv_heads - k);
            units.push_back({{s, k, own, turn, first, last}, count, partial_floats, count});
            partial_floats += count * own * partial_size(a.group(), round_up(a.head_size, VL));
        }
    }

    // List the pieces of the units from `first` on, `each` units of a sequence
    void list_pieces(int64_t first, int64_t each) {
        const int64_t end = (int64_t)units.size();
        int64_t from = units[first].seen.first, to = units[first].seen.last;
        for (int64_t u = first; u < end; u += each) {
            from = std::min(from, units[u].seen.first), to = std::max(to, units[u].seen.last);
        }
        for (int64_t number = from / PIECE; number <= (to - 1) / PIECE; number++) {
            for (int64_t k = 0; k < each; k++) {
                for (int64_t u = first + k; u < end; u += each) {
                    const int64_t own = number - units[u].seen.first / PIECE;
                    if (own >= 0 && own < units[u].pieces) pieces.push_back({u, own});
                }
            }
        }
    }

    static int64_t pieces_of(const Attention& a, int64_t s) {
        const int64_t last = a.lengths[s] - 1;
        return last / PIECE - a.first_seen(last) / PIECE + 1;
    }

    Span span(const DecodePiece& piece) const {
        Span span = units[piece.unit].seen;
        const int64_t cut = (span.first / PIECE + piece.number) * PIECE;
        span.first = std::max(span.first, cut), span.last = std::min(span.last, cut + PIECE);
        return span;
    }

    static int64_t first_block(const Attention& a, int64_t s) { return a.tables[s * a.table_stride]; }

    void list_prompt(const Attention& a, int64_t s) {
        if (a.is_decode(s)) return;
        const int64_t queries = a.queries(s);
        for (int64_t first = 0; first < queries; first += tile_queries) {
            const int64_t count = std::min(tile_queries, queries - first);
            for (int64_t k = 0; k < a.kv_heads; k++) tiles.push_back({s, k, first, count});
        }
    }

    static int64_t cost(const Attention& a, const PromptTile& tile) {
        const int64_t queries = a.queries(tile.sequence);
        const int64_t position = a.lengths[tile.sequence] - queries + tile.first;
        return (position + tile.count - a.first_seen(position)) * tile.count;
    }
};

template <class KV>
void run_piece(
    const Attention& a, Tasks& tasks, const DecodePiece& piece, const DecodePiece& next, DecodeSpace<KV>& space,
    float* partials) {
    DecodeUnit& unit = tasks.units[piece.unit];
    const Span& seen = unit.seen;
    float* of_unit = partials + unit.partial_at;
    const int64_t each = partial_size(a.group(), round_up(a.head_size, VL)), stride = seen.heads * each;
    attend_piece<KV>(a, tasks.span(piece), tasks.span(next), space, of_unit + piece.number * stride);
    if (__atomic_sub_fetch(&unit.left, 1, __ATOMIC_ACQ_REL) > 0) return;
    for (int64_t k = 0; k < seen.heads; k++) {
        join_pieces<KV>(a, seen.sequence, seen.kv_head + k, of_unit + k * each, stride, unit.pieces);
    }
}

// throws std::bad_alloc, before any thread starts
template <class KV>
void attend(const Attention& a, int threads) {
    thread_local Tasks tasks;
    tasks.list(a, threads);
    const int64_t group = a.group(), size = a.head_size, padded = round_up(size, VL);
    const int64_t rows = tasks.tiles.empty() ? 0 : round_up(tasks.tile_queries * group, VL);
    const size_t decode_bytes = DecodeSpace<KV>::bytes(a, tasks.heads, padded);
    const size_t prompt_bytes = PromptSpace::bytes(rows, size);
    tasks.arena.reserve(
        Arena::bytes_for<float>(tasks.partial_floats) + threads * (decode_bytes + prompt_bytes));
    float* partials = tasks.arena.take<float>(tasks.partial_floats);
    std::vector<DecodeSpace<KV>> decode_spaces;
    std::vector<PromptSpace> prompt_spaces;
    for (int i = 0; i < threads; i++) {
        decode_spaces.emplace_back(tasks.arena, a, tasks.heads, padded);
        prompt_spaces.emplace_back(tasks.arena, rows, size);
    }
    // few large tasks first, then small ones in the order of memory
    Tasks& shared = tasks;  // a thread_local name means another object on another thread
    const int64_t tiles = (int64_t)tasks.tiles.size();
    for_tasks(threads, tiles + (int64_t)tasks.starts.size() - 1, [&](int thread, int64_t i) {
        if (i < tiles) return attend_tile<KV>(a, shared.tiles[i], prompt_spaces[thread]);
        const int64_t last = shared.starts[i - tiles + 1] - 1;
        for (int64_t at = shared.starts[i - tiles]; at <= last; at++) {
            const DecodePiece& next = shared.pieces[std::min(at + 1, last)];
            run_piece<KV>(a, shared, shared.pieces[at], next, decode_spaces[thread], partials);
        }
    });
}

}  // namespace
