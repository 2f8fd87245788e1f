// The largest output feature of each row, without all of them: what `linear` would give, bit for bit.
//
// Products of what is rounded to bfloat16 come close to those of the numbers themselves. By the Cauchy-Schwarz inequality
//     |x · w - x̂ · ŵ| <= |x - x̂| |w| + |x̂| |w - ŵ|,
// and what the sums round off is less than 2^-24 |x| |w| for each input feature. That bounds the largest sum of a panel
// from below and from above. A row's largest lies in a panel that may reach above what some panel reaches for sure: of a
// language model's head nearly always in one. Only such panels are multiplied as `linear` does it.
//
// N rows · P panels · I input features · O output features, in whole panels
#pragma once

#include <cmath>

#include "linear_dispatch.h"

namespace {

// A matrix as rounded_linear.h reads it; of each output feature |w| and |w - ŵ|
struct Screen {
    RoundedWeight* panels;
    float *lengths_O, *errors_O;
};

// rounding of what is computed here
constexpr double MARGIN = 1 + 1e-6;

inline float length_of(double sum_of_squares) { return (float)(std::sqrt(sum_of_squares) * MARGIN); }

inline void put_weight(float w, int64_t i, pair* panel) { convert(w, &panel[i / 2 * PANEL].features[i % 2]); }
inline void put_weight(float w, int64_t i, bf16* panel) { convert(w, panel + i * PANEL); }

template <class Kept>
inline void make_screen(const void* panels, int64_t in_features, int64_t out_features, Screen screen, int threads) {
    const int64_t size = numbers_of<Rounded>(in_features) * PANEL;
    for_tasks(threads, (out_features + PANEL - 1) / PANEL, [&](int, int64_t p) {
        double squares[PANEL] = {}, missed[PANEL] = {};
        float wide[SUMMED * PANEL];
        RoundedWeight* to = screen.panels + p * size;
        memset(to, 0, size * sizeof(RoundedWeight));
        for (int64_t start = 0; start < in_features; start += SUMMED) {
            const int64_t depth = std::min(SUMMED, in_features - start);
            Kept::widen(panels, in_features, p, start, depth, wide);
            for (int64_t i = 0; i < depth; i++) {
                for (int64_t o = 0; o < PANEL; o++) {
                    const float w = wide[i * PANEL + o];
                    bf16 rounded;
                    convert(w, &rounded);
                    put_weight(w, start + i, to + o);
                    const double error = (double)w - to_float(rounded);
                    squares[o] += (double)w * w, missed[o] += error * error;
                }
            }
        }
        for (int64_t o = 0; o < PANEL; o++) {
            screen.lengths_O[p * PANEL + o] = length_of(squares[o]);
            screen.errors_O[p * PANEL + o] = length_of(missed[o]);
        }
    });
}

// Tile registers take numbers below 2^-126 for zero, and of a float32 number's three parts the last is 2^16 times smaller
constexpr float LOST = 1e-33f;

// Error bound of a row's sums: `a_length` times |w|, `an_error` times |w - ŵ|, and `lost` for underflow of the smallest
struct RowError {
    float a_length, an_error, lost;

    RowError(const float* x, int64_t size) {
        double squares = 0, missed = 0, rounded_squares = 0;
        for (int64_t i = 0; i < size; i++) {
            bf16 bits;
            convert(x[i], &bits);
            const double whole = x[i], rounded = to_float(bits), error = whole - rounded;
            squares += whole * whole, missed += error * error, rounded_squares += rounded * rounded;
        }
        // both sums, of rounded products and of exact ones, with those of the pieces
        a_length = length_of(missed) + 2 * (float)(size + 16) * 0x1p-24f * length_of(squares) + LOST;
        an_error = length_of(rounded_squares);
        lost = 1e-30f + LOST * length_of(squares);
    }
    bool is_known() const { return a_length < __builtin_inff() && an_error < __builtin_inff(); }
};

inline float largest_of(vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(v);
#else
    float most = v[0];
    for (int i = 1; i < VL; i++) most = v[i] > most ? v[i] : most;
    return most;
#endif
}

// Replacement of linear.h's Output that stores no sums.
struct Sums {
    static constexpr int64_t stride_N = 0;

    static float* straight(int64_t, int64_t) { return nullptr; }
    static void begin(int64_t, float* sums) { memset(sums, 0, PANEL * sizeof(float)); }
};

// Lower and upper bound of a row's largest sum in a panel.
struct Bounds : Sums {
    const float *lengths_O, *errors_O;
    const RowError* errors_N;
    float *lows_PN, *highs_PN;
    int64_t rows, out_features;

    void put(int64_t row, int64_t count, int64_t number, const float* sums) const {
        const int64_t width = out_features - number * PANEL;
        for (int64_t n = row; n < row + count; n++, sums += PANEL) {
            vec low = splat(-__builtin_inff()), high = low;
            for (int v = 0; v < PANEL_VECTORS; v++) {
                const float* lengths = lengths_O + number * PANEL + v * VL;
                const float* errors = errors_O + number * PANEL + v * VL;
                const vec sum = load(sums + v * VL);
                const RowError& error = errors_N[n];
                const vec bound = load(lengths) * error.a_length + load(errors) * error.an_error + error.lost;
                vec least = sum - bound, most = sum + bound;
                for (int64_t o = std::max<int64_t>(0, width - v * VL); o < VL; o++) least[o] = most[o] = -__builtin_inff();
                low = vmax(low, least), high = vmax(high, most);
            }
            const bool known = errors_N[n].is_known();
            lows_PN[number * rows + n] = known ? largest_of(low) : -__builtin_inff();
            highs_PN[number * rows + n] = known ? largest_of(high) : __builtin_inff();
        }
    }
};

// The first of the largest numbers; a NaN is larger than all others
inline bool is_better(float value, float than) { return !(value <= than) && than == than; }

// The largest exact sum of each row in a panel, and its index.
struct Best : Sums {
    const int64_t* rows_R;
    float* values_N;
    int32_t* ids_N;
    int64_t out_features;

    void put(int64_t row, int64_t count, int64_t number, const float* sums) const {
        const int64_t width = std::min<int64_t>(PANEL, out_features - number * PANEL);
        for (int64_t r = row; r < row + count; r++, sums += PANEL) {
            int64_t best = 0;
            for (int64_t o = 1; o < width; o++) best = is_better(sums[o], sums[best]) ? o : best;
            values_N[rows_R[r]] = sums[best];
            ids_N[rows_R[r]] = (int32_t)(number * PANEL + best);
        }
    }
};

// throws std::bad_alloc, before any thread starts
template <class Kept>
inline void find_largest(
    const float* x_NI, int64_t stride_N, const Screen& screen, const void* panels, int64_t rows, int64_t in_features,
    int64_t out_features, float* values_N, int64_t* ids_N, int threads) {
    const int64_t count = (out_features + PANEL - 1) / PANEL, stride = row_stride(in_features);
    thread_local Arena arena;
    arena.reserve(
        Arena::bytes_for<RowError>(rows) + 2 * Arena::bytes_for<float>(count * rows) +
        Arena::bytes_for<int32_t>(count * rows) +
        threads * (Arena::bytes_for<float>(MOST_ROWS * stride) + some_bytes<Kept>(in_features)));
    RowError* errors_N = arena.take<RowError>(rows);
    float* lows_PN = arena.take<float>(count * rows);
    float* highs_PN = arena.take<float>(count * rows);
    int32_t* ids_PN = arena.take<int32_t>(count * rows);
    float* const copies = arena.take<float>(threads * MOST_ROWS * stride);
    char* const spaces = arena.take<char>(threads * some_bytes<Kept>(in_features));
    for_ranges(threads, rows, (1 << 14) / in_features, [&](int64_t first, int64_t last) {
        for (int64_t n = first; n < last; n++) errors_N[n] = RowError(x_NI + n * stride_N, in_features);
    });
    const Bounds bounds{{}, screen.lengths_O, screen.errors_O, errors_N, lows_PN, highs_PN, rows, out_features};
    multiply_all_rounded(LinearOf<float, Bounds>{x_NI, stride_N, screen.panels, bounds, rows, in_features}, threads);

    float* floors_N = values_N;
    for (int64_t n = 0; n < rows; n++) floors_N[n] = -__builtin_inff();
    for (int64_t p = 0; p < count; p++) {
        for (int64_t n = 0; n < rows; n++) floors_N[n] = std::max(floors_N[n], lows_PN[p * rows + n]);
    }
    float* const values_PN = lows_PN;
    for_tasks(threads, count, [&](int thread, int64_t p) {
        float* copy = copies + thread * MOST_ROWS * stride;
        int64_t chosen[MOST_ROWS], size = 0;
        const Best best{{}, chosen, values_PN + p * rows, ids_PN + p * rows, out_features};
        for (int64_t n = 0; n < rows; n++) {
            if (highs_PN[p * rows + n] >= floors_N[n]) {
                memcpy(copy + size * stride, x_NI + n * stride_N, in_features * sizeof(float));
                chosen[size++] = n;
            }
            if (size == MOST_ROWS || (size && n == rows - 1)) {
                const LinearOf<float, Best> some{copy, stride, panels, best, size, in_features};
                multiply_some<Kept>(some, p, spaces + thread * some_bytes<Kept>(in_features));
                size = 0;
            }
        }
    });
    for (int64_t n = 0; n < rows; n++) {
        const float floor = floors_N[n];
        int64_t best = -1;
        for (int64_t p = n; p < count * rows; p += rows) {
            if (highs_PN[p] >= floor && (best < 0 || is_better(values_PN[p], values_PN[best]))) best = p;
        }
        values_N[n] = values_PN[best];
        ids_N[n] = ids_PN[best];
    }
}

}  // namespace
