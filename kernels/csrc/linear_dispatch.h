// Linear layers by the fastest products that this instruction set has: those of tile registers, or of vectors.
#pragma once

#include "amx_linear.h"
#include "amx_quantized.h"
#include "block_linear.h"
#include "quantized_linear.h"
#include "rounded_linear.h"

namespace {

#if defined(TILE_REGISTERS)

template <class Kept, class Out>
inline void multiply_all(const LinearOf<float, Out>& l, int threads) {
    multiply_tiles<Kept>(l, threads);
}

template <class Out>
inline void multiply_all_rounded(const LinearOf<float, Out>& l, int threads) {
    multiply_tiles<InPairs>(l, threads);
}

inline void multiply_all_quantized(const QuantizedLinear& l, int threads) { multiply_quantized_tiles(l, threads); }

// up to MOST_ROWS rows times a panel, on this thread
template <class Kept, class Out>
inline void multiply_some(const LinearOf<float, Out>& l, int64_t number, char* space) {
    multiply_tiles_of_one<Kept>(l, number, space);
}
template <class Kept>
inline size_t some_bytes(int64_t in_features) {
    return row_tile_bytes<Kept>(in_features);
}

#else

template <class Kept, class Out>
inline void multiply_all(const LinearOf<float, Out>& l, int threads) {
    multiply<Kept>(l, threads);
}

template <class Out>
inline void multiply_all_rounded(const LinearOf<float, Out>& l, int threads) {
    multiply_rounded(l, threads);
}

inline void multiply_all_quantized(const QuantizedLinear& l, int threads) { multiply_quantized(l, threads); }

template <class Kept, class Out>
inline void multiply_some(const LinearOf<float, Out>& l, int64_t number, char*) {
    Kept::multiply(l, Block{0, l.rows, 1}, number, number);
}
template <class Kept>
inline size_t some_bytes(int64_t) {
    return 0;
}

#endif

}  // namespace
