// What min_p, top_k and top_p leave of a row of logits, as in ops/truncation.py. Once per ISA.
//
// Nothing is sorted: a border is found digit by digit in a number that orders as the float does, by
// sums of integers, which are the same in any order.
#pragma once

#include <bit>

#include "linear.h"

namespace roofline {
namespace RL_ISA {

// A number that orders as x does; zeros are equal, NaN is above all.
static INLINE uint32_t rank_of(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x + 0.0f);
    const uint32_t sign = uint32_t(int32_t(bits) >> 31) | 0x80000000u;
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0xffffffffu : bits ^ sign;
}
static INLINE float value_of(uint32_t rank) {
    return std::bit_cast<float>(rank ^ (rank >> 31 ? 0x80000000u : 0xffffffffu));
}

// e^x in units of 2^-43 to the nearest, for x <= 0: 2^n e^r with a Taylor polynomial of degree 13.
static INLINE uint64_t mass_of(double x) {
    constexpr double shift = 0x1.8p52;  // brings a whole number into the low bits
    x = x < -32.0 ? -32.0 : x;          // below half a unit
    const double shifted = x * 0x1.71547652b82fep0 + shift, n = shifted - shift;
    const double r = (x - n * 0x1.62e42fefa3800p-1) - n * 0x1.ef35793c76730p-45;
    double p = 1.0 / 6227020800;
    p = p * r + 1.0 / 479001600;
    p = p * r + 1.0 / 39916800;
    p = p * r + 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    const uint64_t power = (std::bit_cast<uint64_t>(shifted) + 1023 + 43) << 52;
    const double units = p * std::bit_cast<double>(power) + 0x1p52;
    return std::bit_cast<uint64_t>(units) & ((uint64_t(1) << 52) - 1);
}

// What top_k sums up: tokens.
struct EachIsOne {
    INLINE void operator()(const float* logits, int lanes, uint64_t shares[LANES]) const {
        for (int t = 0; t < lanes; ++t) shares[t] = logits[t] != -INFINITY;
    }
};

// What top_p sums up: probability.
struct EachHasMass {
    double top;
    INLINE void operator()(const float* logits, int lanes, uint64_t shares[LANES]) const {
        if (lanes == LANES)
            for (int t = 0; t < LANES; ++t) shares[t] = mass_of(double(logits[t]) - top);
        else
            for (int t = 0; t < lanes; ++t) shares[t] = mass_of(double(logits[t]) - top);
    }
};

// Where a sum from the largest logit down comes to its limit.
struct Border {
    uint32_t rank;   // of the logit that brings it there; 0 where none does
    uint64_t above;  // the sum over all that are larger
    double limit;
};

// `share` says what sixteen logits add to the sum, `limit` where it ends, given the sum of all.
template <class Share, class Limit>
static Border find_border(const float* logits, int64_t count, Share&& share, Limit&& limit) {
    Border border{0, 0, 0.0};
    uint64_t sums[2048], shares[LANES];
    for (const int shift : {21, 10, 0}) {
        const int bits = shift ? 11 : 10;
        const uint32_t known = uint32_t(~uint64_t(0) << (shift + bits));  // digits found so far
        std::memset(sums, 0, sizeof sums);
        for (int64_t i = 0; i < count; i += LANES) {
            const int lanes = int(count - i < LANES ? count - i : LANES);
            uint32_t ranks[LANES], wanted = 0;
            for (int t = 0; t < lanes; ++t) ranks[t] = rank_of(logits[i + t]);
            for (int t = 0; t < lanes; ++t)
                wanted |= ((ranks[t] ^ border.rank) & known) == 0 && logits[i + t] != -INFINITY;
            if (!wanted) continue;
            share(logits + i, lanes, shares);
            for (int t = 0; t < lanes; ++t)
                if (((ranks[t] ^ border.rank) & known) == 0)
                    sums[ranks[t] >> shift & ((1u << bits) - 1)] += shares[t];
        }
        if (shift == 21) {
            uint64_t total = 0;
            for (uint64_t sum : sums) total += sum;
            border.limit = limit(double(total));
        }
        int digit = (1 << bits) - 1;
        while (digit > 0 && double(border.above + sums[digit]) < border.limit)
            border.above += sums[digit--];
        border.rank |= uint32_t(digit) << shift;
    }
    return border;
}

// Leave out what is smaller than `least`.
static void drop_below(float* logits, int64_t count, float least) {
    for (int64_t i = 0; i < count; ++i) logits[i] = logits[i] < least ? -INFINITY : logits[i];
}

// Of the logits at a border of mass leave out the ids past the limit.
static void drop_ties(float* logits, int64_t count, const Border& border, double top) {
    const float value = value_of(border.rank);
    const uint64_t mass = mass_of(double(value) - top);
    uint64_t before = border.above;
    for (int64_t i = 0; i < count; ++i) {
        if (logits[i] != value) continue;
        if (double(before) >= border.limit) logits[i] = -INFINITY;
        before += mass;
    }
}

// The largest logit; NaN where there is one.
static float top_of(const float* logits, int64_t count) {
    Vec most = fill(-INFINITY);
    uint32_t unordered = 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) most = largest(load(logits + i), most);
    float top = largest_lane(most);
    for (; i < count; ++i) top = logits[i] > top ? logits[i] : top;
    for (i = 0; i < count; ++i)
        unordered |= (std::bit_cast<uint32_t>(logits[i]) & 0x7fffffffu) > 0x7f800000u;
    return unordered ? NAN : top;
}

static void truncate_row(float* logits, int64_t count, float min_p, int64_t top_k, double top_p) {
    const double top = double(top_of(logits, count));
    const bool finite = std::isfinite(top);
    if (min_p > 0.0f && finite) {
        const double least = std::log(double(min_p));
        for (int64_t i = 0; i < count; ++i)
            logits[i] = double(logits[i]) - top < least ? -INFINITY : logits[i];
    }
    if (top_k > 0 && top_k < count) {
        const Border border =
            find_border(logits, count, EachIsOne{}, [&](double) { return double(top_k); });
        drop_below(logits, count, border.rank == 0xffffffffu ? NAN : value_of(border.rank));
    }
    if (top_p < 1.0 && finite) {
        const Border border = find_border(logits, count, EachHasMass{top},
                                          [&](double total) { return top_p * total; });
        drop_below(logits, count, value_of(border.rank));
        drop_ties(logits, count, border, top);
    }
}

static void truncate(const void* arguments, Team& team) {
    const Truncate& a = *static_cast<const Truncate*>(arguments);
    team.run(a.step->sampled, 1, [&](int64_t s) {
        if (a.min_p[s] > 0.0f || a.top_k[s] > 0 || a.top_p[s] < 1.0)
            truncate_row(a.logits + s * a.stride, a.vocab, a.min_p[s], a.top_k[s], a.top_p[s]);
    });
}

}  // namespace RL_ISA
}  // namespace roofline
