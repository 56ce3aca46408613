// Weights to INT8 groups, bit for bit as quantization/int8_groups.py defines. Included once per ISA.
#pragma once

#include <atomic>

#include "int8_products.h"
#include "team.h"

namespace roofline {
namespace RL_ISA {

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
