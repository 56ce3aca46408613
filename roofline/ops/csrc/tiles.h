// How large the pieces are that a product is made in. Included once per ISA.
#pragma once

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

}  // namespace RL_ISA
}  // namespace roofline
