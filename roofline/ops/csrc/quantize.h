// Weights to INT8 groups, bit for bit as quantization/int8_groups.py defines. Included once per ISA.
#pragma once

#include <atomic>

#include "int8_rounding.h"
#include "team.h"

namespace roofline {
namespace RL_ISA {

constexpr float SMALLEST_NORMAL = 1.17549435e-38f;

// The largest |x|; NaN where one is.
template <class X>
INLINE float largest_size(const X* x, int64_t count) {
    Ints most = fill_ints(0);  // bits of |x| are in order as integers, NaN above all
    for (int64_t k = 0; k < count; k += LANES) most = largest(most, size_bits(load_some(x + k, count - k)));
    return float_of_bits(largest_lane(most));
}

// x / scale to the nearest integers, ties to even; 0 where x is NaN.
template <class X>
INLINE void to_int8(const X* x, int64_t count, float scale, int8_t* values) {
    for (int64_t k = 0; k < count; k += LANES) {
        const Ints q = round_to_ints(load_some(x + k, count - k) / fill(scale));
        if (count - k >= LANES) {
            store_bytes(values + k, q);
            continue;
        }
        int8_t some[LANES];
        store_bytes(some, q);
        std::memcpy(values + k, some, size_t(count - k));
    }
}

// X is the type of the weights: float, or uint16_t (bfloat16).
template <class X>
static void quantize(const void* arguments, Team& team) {
    const Quantize& a = *static_cast<const Quantize*>(arguments);
    const int64_t groups = (a.columns + a.group - 1) / a.group;
    team.run(a.rows, 8, [&](int64_t row) {
        const X* x = static_cast<const X*>(a.weights) + row * a.stride;
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t begin = g * a.group, left = a.columns - begin;
            const int64_t count = left < a.group ? left : a.group;
            const float most = largest_size(x + begin, count);
            if (!std::isfinite(most)) std::atomic_ref(*a.broken).store(1, std::memory_order_relaxed);
            const float scale = most / 127.0f;
            float& kept = a.scales[row * groups + g];
            kept = scale < SMALLEST_NORMAL ? 1.0f : scale;
            to_int8(x + begin, count, kept, a.values + row * a.columns + begin);
        }
    });
}

}  // namespace RL_ISA
}  // namespace roofline
