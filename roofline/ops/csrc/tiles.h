// How large the pieces are that a product is made in. Included once per ISA.
#pragma once

#include <type_traits>
#include <utility>

#include "vec.h"

#define INLINED __attribute__((always_inline))  // of a lambda

namespace roofline {
namespace RL_ISA {

constexpr int MAX_CHUNKS = 4;      // of 16 rows in a block
constexpr int PANEL_COLUMNS = 128; // columns taken at a time, so that a panel stays in L1
constexpr int TILE_TOKENS = 96;    // tokens whose totals a block keeps at hand
constexpr int DIRECT_TOKENS = 4;   // up to here weights go from memory through registers only
constexpr int MICRO_TOKENS = 6;    // at most, whose sums registers hold
constexpr int AHEAD = 4096;        // bytes of weights that are called for before their turn

// Chunks whose sums registers hold besides: of 32 registers of sixteen floats, or 16 of eight.
constexpr int chunks_at_once(int tokens) {
#if defined(__AVX512F__)
    return tokens ? MAX_CHUNKS : 0;
#else
    return tokens == 1 ? MAX_CHUNKS : tokens == 2 ? 2 : 1;
#endif
}

// Call visit with the constants 0 to N - 1: no loop is left, so that an array of sums is registers.
template <int N, class Visit>
INLINE void unroll(Visit&& visit) {
    [&]<int... I>(std::integer_sequence<int, I...>) INLINED {
        (visit(std::integral_constant<int, I>{}), ...);
    }(std::make_integer_sequence<int, N>{});
}

// Call visit with n as a constant, LEAST <= n <= MOST.
template <int LEAST, int MOST, class Visit>
INLINE void as_constant(int n, Visit&& visit) {
    if constexpr (LEAST < MOST)
        if (n < MOST) return as_constant<LEAST, MOST - 1>(n, visit);
    visit(std::integral_constant<int, MOST>{});
}

}  // namespace RL_ISA
}  // namespace roofline
