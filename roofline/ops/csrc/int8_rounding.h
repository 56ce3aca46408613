// Activations as INT8, in the steps that `round_stretches` of ops/reference.py defines.
//
// A part has a unit, and a stretch of its columns a step that is a whole multiple of it: operands of
// 16 bits hold value times multiple, and a part is summed as one; of 8 bits they hold the value, and
// each stretch's sum is multiplied. Included once per ISA.
#pragma once

#include "int8_products.h"
#include "tiles.h"
#include "vec.h"

namespace roofline {
namespace RL_ISA {

constexpr int STRETCH_COLUMNS = 32;
constexpr bool WIDE_OPERANDS = sizeof(ByteOperand) == 2;
constexpr int PIECE_COLUMNS = WIDE_OPERANDS ? PANEL_COLUMNS : STRETCH_COLUMNS;  // summed in integers
constexpr int ROW_GAP = int(8 / sizeof(ByteOperand));  // tokens of a tile lie in different banks of L1

// Tokens as they are multiplied, T of them: part after part, in a part token after token.
struct Rounded {
    ByteOperand* values;  // of a part: [T, columns + ROW_GAP]
    float* units;         // [T, parts]
    int32_t* starts;      // [T, pieces], -128 times the sum of a piece
    float* multiples;     // [T, pieces], of operands of 8 bits
    int64_t parts, pieces;
};

INLINE float float_of_bits(int32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Sixteen activations; zeros past the first `count`.
template <class X>
INLINE Vec load_some(const X* x, int64_t count) {
    if (count >= LANES) return load(x);
    X some[LANES] = {};
    if (count > 0) std::memcpy(some, x, size_t(count) * sizeof(X));
    return load(some);
}

// The first `count` of sixteen operands.
INLINE void store_some(ByteOperand* out, Ints values, int64_t count) {
    if (count >= LANES) return store_operands(out, values);
    ByteOperand some[LANES];
    store_operands(some, values);
    std::memcpy(out, some, size_t(count) * sizeof(ByteOperand));
}

INLINE int32_t sum_lanes(Ints a) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32(a.v);
#else
    int32_t lanes[LANES], sum = 0;
    store(lanes, a);
    for (const int32_t lane : lanes) sum += lane;
    return sum;
#endif
}

// One part: `count` activations, their unit, and the starts and multiples of its pieces. Sixteen
// operands at a time, from column i on, are given to put(i, operands).
template <class X, class Put>
INLINE void round_part(const X* x, int64_t count, float* unit, int32_t* starts, float* multiples, Put&& put) {
    constexpr int STRETCHES = PANEL_COLUMNS / STRETCH_COLUMNS;
    int32_t size[STRETCHES], most = 0;  // bits of |x| are in order as integers, NaN above all
    for (int64_t s = 0, k = 0; k < count; ++s, k += STRETCH_COLUMNS) {
        const Vec low = load_some(x + k, count - k), high = load_some(x + k + LANES, count - k - LANES);
        size[s] = largest_lane(largest(size_bits(low), size_bits(high)));
        most = size[s] > most ? size[s] : most;
    }
    *unit = float_of_bits(most) / 32385.0f;  // 127 * 255
    if (*unit < 1.17549435e-38f) *unit = 1.0f;
    Ints total = fill_ints(0);
    for (int64_t s = 0, k = 0; k < count; ++s, k += STRETCH_COLUMNS) {
        float multiple = std::ceil(float_of_bits(size[s]) / (*unit * 127.0f));
        multiple = multiple > 1.0f ? (multiple < 255.0f ? multiple : 255.0f) : 1.0f;
        const Vec step = fill(multiple * *unit);  // NaN or infinity: the values are 0, the unit tells
        for (int64_t i = k; i < k + STRETCH_COLUMNS && i < count; i += LANES) {
            const Vec value = round_even(load_some(x + i, count - i) / step);
            const Ints q = round_to_ints(WIDE_OPERANDS ? value * fill(multiple) : value);
            total = total + q;
            put(i, q);
        }
        if constexpr (!WIDE_OPERANDS) {
            multiples[s] = multiple;
            starts[s] = -128 * sum_lanes(total);
            total = fill_ints(0);
        }
    }
    if constexpr (WIDE_OPERANDS) *starts = -128 * sum_lanes(total);
}

}  // namespace RL_ISA
}  // namespace roofline
