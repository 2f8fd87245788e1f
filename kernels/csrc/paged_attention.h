// A step's attention as one list of tasks: tiles of prompt chunks, largest first, then pieces of decodes.
#pragma once

#include <algorithm>
#include <vector>

#include "decode.h"
#include "prompt.h"

namespace {

struct DecodeUnit {
    int64_t sequence, kv_head;
    int64_t first, last;  // positions that are seen
    int64_t pieces;
    int64_t partial_at;  // in the partial results, in floats
    int64_t left;        // pieces to be computed; whoever computes the last one joins them
};

struct DecodePiece {
    int64_t unit, number;
};

constexpr int64_t TASKS_A_THREAD = 8;    // of decodes, at least, where there are so many pieces
constexpr int64_t MOST_TOGETHER = 8;     // sequences whose pieces one thread computes in turn, where they share blocks

struct Tasks {
    std::vector<PromptTile> tiles;
    std::vector<DecodeUnit> units;
    std::vector<DecodePiece> pieces;
    std::vector<int64_t> starts;  // of the decodes' tasks among the pieces, and their end
    Arena arena;
    int64_t tile_queries = 0, partial_floats = 0;

    void list(const Attention& a, int threads) {
        tiles.clear();
        units.clear();
        pieces.clear();
        starts.clear();
        partial_floats = 0;
        int64_t prompt_queries = 0, count = 0;
        for (int64_t s = 0; s < a.num_sequences; s++) {
            const int64_t queries = a.query_starts[s + 1] - a.query_starts[s];
            if (queries == 1) count += list_units(a, s);
            else prompt_queries += queries;
        }
        list_pieces(a, count, TASKS_A_THREAD * threads);
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

    // how many pieces they have
    int64_t list_units(const Attention& a, int64_t s) {
        const int64_t last = a.lengths[s], first = a.first_seen(last - 1);
        const int64_t count = (last - 1) / PIECE - first / PIECE + 1;
        for (int64_t k = 0; k < a.kv_heads; k++) {
            units.push_back({s, k, first, last, count, partial_floats, count});
            partial_floats += count * partial_size(a.group(), round_up(a.head_size, VL));
        }
        return count * a.kv_heads;
    }

    // `count` of them, as at least `tasks` tasks if there are so many: what lies in the same memory in one task, in turn
    void list_pieces(const Attention& a, int64_t count, int64_t tasks) {
        const int64_t kv_heads = a.kv_heads, total = (int64_t)units.size();
        const bool all_heads = count >= tasks * kv_heads;  // of the same blocks: they share pages
        const int64_t most = std::clamp<int64_t>(count / (tasks * kv_heads), 1, MOST_TOGETHER) * kv_heads;
        for (int64_t unit = 0, end; unit < total; unit = end) {
            const int64_t block = first_block(a, unit);
            int64_t from = units[unit].first, to = units[unit].last;
            for (end = unit + kv_heads; end < total && end < unit + most && first_block(a, end) == block; end += kv_heads) {
                from = std::min(from, units[end].first), to = std::max(to, units[end].last);
            }
            for (int64_t number = from / PIECE; number <= (to - 1) / PIECE; number++) {
                for (int64_t k = 0; k < kv_heads; k++) {
                    if (k == 0 || !all_heads) starts.push_back((int64_t)pieces.size());
                    for (int64_t u = unit + k; u < end; u += kv_heads) {
                        const int64_t own = number - units[u].first / PIECE;
                        if (own >= 0 && own < units[u].pieces) pieces.push_back({u, own});
                    }
                }
            }
        }
        starts.push_back((int64_t)pieces.size());
    }

    int64_t first_block(const Attention& a, int64_t unit) const {
        return a.tables[units[unit].sequence * a.table_stride];
    }

    void list_prompt(const Attention& a, int64_t s) {
        const int64_t queries = a.query_starts[s + 1] - a.query_starts[s];
        if (queries == 1) return;
        for (int64_t first = 0; first < queries; first += tile_queries) {
            const int64_t count = std::min(tile_queries, queries - first);
            for (int64_t k = 0; k < a.kv_heads; k++) tiles.push_back({s, k, first, count});
        }
    }

    static int64_t cost(const Attention& a, const PromptTile& tile) {
        const int64_t queries = a.query_starts[tile.sequence + 1] - a.query_starts[tile.sequence];
        const int64_t position = a.lengths[tile.sequence] - queries + tile.first;
        return (position + tile.count - a.first_seen(position)) * tile.count;
    }
};

template <class KV>
void run_piece(const Attention& a, Tasks& tasks, const DecodePiece& piece, DecodeSpace& space, float* partials) {
    DecodeUnit& unit = tasks.units[piece.unit];
    const int64_t cut = (unit.first / PIECE + piece.number) * PIECE;
    const int64_t first = std::max(unit.first, cut), last = std::min(unit.last, cut + PIECE);
    float* of_unit = partials + unit.partial_at;
    const int64_t stride = partial_size(a.group(), round_up(a.head_size, VL));
    attend_piece<KV>(a, unit.sequence, unit.kv_head, first, last, space, of_unit + piece.number * stride);
    if (__atomic_sub_fetch(&unit.left, 1, __ATOMIC_ACQ_REL) == 0) {
        join_pieces<KV>(a, unit.sequence, unit.kv_head, of_unit, unit.pieces);
    }
}

// throws std::bad_alloc, before any thread starts
template <class KV>
void attend(const Attention& a, int threads) {
    thread_local Tasks tasks;
    tasks.list(a, threads);
    const int64_t group = a.group(), size = a.head_size, padded = round_up(size, VL);
    const int64_t rows = tasks.tiles.empty() ? 0 : round_up(tasks.tile_queries * group, VL);
    const size_t decode_bytes = DecodeSpace::bytes(group, padded), prompt_bytes = PromptSpace::bytes(rows, size);
    tasks.arena.reserve(
        Arena::bytes_for<float>(tasks.partial_floats) + threads * (decode_bytes + prompt_bytes));
    float* partials = tasks.arena.take<float>(tasks.partial_floats);
    std::vector<DecodeSpace*> decode_spaces;
    std::vector<PromptSpace> prompt_spaces;
    for (int i = 0; i < threads; i++) {
        decode_spaces.push_back(DecodeSpace::make(tasks.arena, group, padded));
        prompt_spaces.emplace_back(tasks.arena, rows, size);
    }
    // few large tasks first, then small ones in the order of memory
    Tasks& shared = tasks;  // a thread_local name means another object on another thread
    const int64_t tiles = (int64_t)tasks.tiles.size();
    for_tasks(threads, tiles + (int64_t)tasks.starts.size() - 1, [&](int thread, int64_t i) {
        if (i < tiles) return attend_tile<KV>(a, shared.tiles[i], prompt_spaces[thread]);
        for (int64_t piece = shared.starts[i - tiles]; piece < shared.starts[i - tiles + 1]; piece++) {
            run_piece<KV>(a, shared, shared.pieces[piece], *decode_spaces[thread], partials);
        }
    });
}

}  // namespace
