// From logits to a token: the likeliest, or the likeliest once counter-based noise is added.
//
// noise[v] = Gumbel(Philox4x32-10(key = seed, counter = (position, v))), as in ops/noise.py. Its
// logarithms are taken only where a bound on them says that the token could win. Once per ISA.
#pragma once

#include <bit>

#include "linear.h"

namespace roofline {
namespace RL_ISA {

constexpr int CHUNK = 256;  // tokens at a time: loops that long are turned into SIMD

// The first Philox word of the tokens from `first` on (Salmon et al. 2011).
static void philox(uint64_t seed, uint32_t position, uint32_t first, uint32_t words[CHUNK]) {
    for (int t = 0; t < CHUNK; ++t) {
        uint32_t a = position, b = first + uint32_t(t), c = 0, d = 0;
        uint32_t low = uint32_t(seed), high = uint32_t(seed >> 32);
        for (int round = 0; round < 10; ++round) {
            const uint64_t one = uint64_t(a) * 0xD2511F53u, other = uint64_t(c) * 0xCD9E8D57u;
            a = uint32_t(other >> 32) ^ b ^ low;
            b = uint32_t(other);
            c = uint32_t(one >> 32) ^ d ^ high;
            d = uint32_t(one);
            low += 0x9E3779B9u;
            high += 0xBB67AE85u;
        }
        words[t] = a;
    }
}

static INLINE float gumbel(uint32_t word) {
    const double uniform = (double(word) + 0.5) * 0x1p-32;
    return float(-std::log(-std::log1p(-uniform)));
}

// At least gumbel(word): it is at most -ln u, and u = word / 2^32 has that many leading zeros.
static INLINE float gumbel_bound(uint32_t word) {
    const float upper = float(int32_t(word >> 8));  // exact; 0 bounds it by far more than there is
    return float(24 + 127 - int32_t(std::bit_cast<uint32_t>(upper) >> 23)) * 0.69314724f;
}

// The first index of the largest of `count` logits.
static int64_t likeliest(const float* logits, int64_t count) {
    Vec most = fill(-INFINITY);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) most = largest(most, load(logits + i));
    float top = largest_lane(most);
    for (; i < count; ++i) top = logits[i] > top ? logits[i] : top;
    for (i = 0; i < count; ++i)
        if (logits[i] == top) return i;
    return 0;
}

static int64_t draw(const float* logits, int64_t count, float temperature, uint64_t seed,
                    int64_t position) {
    int64_t winner = likeliest(logits, count);
    uint32_t words[CHUNK];
    float scaled[CHUNK], bounds[CHUNK];
    philox(seed, uint32_t(position), uint32_t(winner), words);
    float best = logits[winner] / temperature + gumbel(words[0]);
    for (int64_t first = 0; first < count; first += CHUNK) {
        philox(seed, uint32_t(position), uint32_t(first), words);
        const int tokens = int(count - first < CHUNK ? count - first : CHUNK);
        for (int t = 0; t < tokens; ++t) scaled[t] = logits[first + t] / temperature;
        for (int t = 0; t < CHUNK; ++t) bounds[t] = gumbel_bound(words[t]);
        for (int t = tokens; t < CHUNK; ++t) scaled[t] = -INFINITY;
        Vec hope = fill(-INFINITY);
        for (int t = 0; t < CHUNK; t += LANES) hope = largest(load(scaled + t) + load(bounds + t), hope);
        if (!(largest_lane(hope) >= best)) continue;
        for (int t = 0; t < tokens; ++t) {
            if (!(scaled[t] + bounds[t] >= best) || scaled[t] == -INFINITY) continue;
            const float value = scaled[t] + gumbel(words[t]);
            if (value > best || (value == best && first + t < winner)) {
                best = value;
                winner = first + t;
            }
        }
    }
    return winner;
}

static void choose(const void* arguments, Team& team) {
    const Choose& a = *static_cast<const Choose*>(arguments);
    team.run(a.step->sampled, 1, [&](int64_t s) {
        const float* logits = a.logits + s * a.stride;
        const float temperature = float(a.temperature[s]);
        a.out[s] = temperature == 0.0f
                       ? likeliest(logits, a.vocab)
                       : draw(logits, a.vocab, temperature, uint64_t(a.seed[s]), a.position[s]);
    });
}

}  // namespace RL_ISA
}  // namespace roofline
