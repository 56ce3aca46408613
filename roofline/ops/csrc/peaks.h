// What the machine can do at most: how fast memory is read, and how many products a second each
// kind of arithmetic makes. The yardstick of benchmarks/kernels.py. Included once per ISA.
#pragma once

#include "linear.h"

namespace roofline {
namespace RL_ISA {

constexpr int64_t PIECE = 1 << 18;  // bytes of a task

// Sum all of `buffer`, read once.
static void read_memory(const void* arguments, Team& team) {
    const Measure& a = *static_cast<const Measure*>(arguments);
    team.run(a.count / PIECE, 1, [&](int64_t i) {
        const float* from = reinterpret_cast<const float*>(static_cast<const char*>(a.buffer) + i * PIECE);
        Vec sum[4] = {fill(0.0f), fill(0.0f), fill(0.0f), fill(0.0f)};
        for (int64_t k = 0; k < PIECE / 4; k += 4 * LANES) {
            __builtin_prefetch(from + k + 1024);
            __builtin_prefetch(from + k + 1024 + LANES);
            __builtin_prefetch(from + k + 1024 + 2 * LANES);
            __builtin_prefetch(from + k + 1024 + 3 * LANES);
            for (int j = 0; j < 4; ++j) sum[j] = sum[j] + load(from + k + j * LANES);
        }
        a.sink[i % 64] = sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
    });
}

// DOT_TASKS times `count` products and some, of vectors in L1 with sums in registers: as many sums
// as the latency of a product needs and registers hold.
#if defined(__AVX512F__)
constexpr int DOT_SUMS = 12;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int DOT_SUMS = 6;
#else
constexpr int DOT_SUMS = 3;
#endif
constexpr int DOT_TASKS = 64;

#if defined(RL_AMX)
// So many products of tiles, into four C. Of no zeros: with those tiles are a third faster.
template <bool BYTES>
static void dot_tiles(int64_t count) {
    alignas(64) uint16_t values[2 * TILE_BYTES];  // bfloat16 from 0.5 to 2, of either sign
    uint32_t random = 1;
    for (uint16_t& value : values) {
        random = random * 1664525u + 1013904223u;
        value = uint16_t(0x3f00 + (random >> 16 & 0x80ff));
    }
    const TilesInUse tiles(TILE_ROWS);
    RL_TILE_LOAD(4, values, 64);
    RL_TILE_LOAD(5, values + 512, 64);
    RL_TILE_LOAD(6, values + 1024, 64);
    RL_TILE_LOAD(7, values + 1536, 64);
    for (int64_t k = 0; k < count; k += 4 * TILE_ROWS * LANES * (BYTES ? 64 : 32)) {
        if constexpr (BYTES) {
            RL_TILE_DOT(RL_UNSIGNED, 0, 4, 6);
            RL_TILE_DOT(RL_UNSIGNED, 1, 5, 6);
            RL_TILE_DOT(RL_UNSIGNED, 2, 4, 7);
            RL_TILE_DOT(RL_UNSIGNED, 3, 5, 7);
        } else {
            RL_TILE_DOT(RL_BF16, 0, 4, 6);
            RL_TILE_DOT(RL_BF16, 1, 5, 6);
            RL_TILE_DOT(RL_BF16, 2, 4, 7);
            RL_TILE_DOT(RL_BF16, 3, 5, 7);
        }
    }
}
#else
template <bool BYTES>
static void dot_tiles(int64_t) {}
#endif

template <class X>
static void dot_floats(const void* arguments, Team& team) {
    const Measure& a = *static_cast<const Measure*>(arguments);
    using P = Panel<X>;
    team.run(DOT_TASKS, 1, [&](int64_t i) {
        if constexpr (sums_in_halves<X>) {
            dot_tiles<false>(a.count);
            a.sink[i] = 0.0f;
            return;
        }
        alignas(64) const typename P::Item weights[P::step * LANES] = {};
        const typename P::Operand x[2] = {};
        const typename P::Item* volatile from = weights;  // for all the compiler knows, each time
        const typename P::Operand* volatile by = x;       // another
        Vec sums[DOT_SUMS];
        for (int s = 0; s < DOT_SUMS; ++s) sums[s] = fill(float(i));
        for (int64_t k = 0, count = a.count; k < count; k += DOT_SUMS * P::step * LANES) {
            const typename P::Item* now = from;
            const auto multiplier = P::multiplier(by);
            for (int s = 0; s < DOT_SUMS; ++s) sums[s] = P::multiply(now, multiplier, sums[s]);
        }
        for (int s = 1; s < DOT_SUMS; ++s) sums[0] = sums[0] + sums[s];
        a.sink[i] = sum_lanes(sums[0]);
    });
}

static void dot_int8(const void* arguments, Team& team) {
    const Measure& a = *static_cast<const Measure*>(arguments);
    team.run(DOT_TASKS, 1, [&](int64_t i) {
        if constexpr (HAS_TILES) {
            dot_tiles<true>(a.count);
            a.sink[i] = 0.0f;
            return;
        }
        alignas(64) const char weights[64] = {};
        const ByteOperand x[4 * DOT_SUMS] = {};  // one for all would be multiplied once for all
        const char* volatile from = weights;
        const ByteOperand* volatile by = x;
        Ints sums[DOT_SUMS];
        for (int s = 0; s < DOT_SUMS; ++s) sums[s] = fill_ints(int32_t(i));
        for (int64_t k = 0, count = a.count; k < count; k += DOT_SUMS * 64 / QUAD_PARTS) {
            const auto part = load_part(from);
            const ByteOperand* now = by;
            for (int s = 0; s < DOT_SUMS; ++s) sums[s] = dot_part(sums[s], part, now + 4 * s);
        }
        for (int s = 1; s < DOT_SUMS; ++s) sums[0] = sums[0] + sums[s];
        a.sink[i] = sum_lanes(to_floats(sums[0]));
    });
}

}  // namespace RL_ISA
}  // namespace roofline
