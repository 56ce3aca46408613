// Sixteen floats, whatever the instruction set; integers and bfloat16 pairs are in *_products.h.
//
// Included once per ISA inside that ISA's namespace. Every function means the same everywhere except
// that `fma` is fused where the machine can. Sums over lanes have one fixed order.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace roofline {
namespace RL_ISA {

constexpr int LANES = 16;

INLINE float bf16_to_float(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

INLINE uint16_t float_to_bf16(float x) {  // to nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__)

struct Vec {
    __m512 v;
};
INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
INLINE Vec fill(float x) { return {_mm512_set1_ps(x)}; }
INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
INLINE Vec largest(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where one is NaN
INLINE Vec smallest(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
INLINE Vec round_even(Vec a) { return {_mm512_roundscale_ps(a.v, 8)}; }
INLINE Vec times_power_of_two(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }

// Lane t of `a` where begin <= t < end, else `other`.
INLINE Vec keep_lanes(Vec a, int begin, int end, float other) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __mmask16 in = _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(begin)) &
                         _mm512_cmplt_epi32_mask(lane, _mm512_set1_epi32(end));
    return {_mm512_mask_blend_ps(in, _mm512_set1_ps(other), a.v)};
}
INLINE Vec load_bf16(const uint16_t* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
INLINE void store_bf16(uint16_t* p, Vec a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}
// Column i of four INT8 columns of sixteen rows, [16][4]: a byte, 128 too large, is put under the
// exponent of 2^23, from which that and 128 are taken.
INLINE Vec int8_column(const int8_t* p, int i) {
    const __m512i raised = _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(char(0x80)));
    const __m512i first = _mm512_setr4_epi32(0, 4, 8, 12), magic = _mm512_set1_epi32(0x4b000000);
    const __m512i from = _mm512_add_epi32(first, _mm512_set1_epi32(i));
    const __m512i under = _mm512_mask_shuffle_epi8(magic, 0x1111111111111111, raised, from);
    return {_mm512_sub_ps(_mm512_castsi512_ps(under), _mm512_set1_ps(8388736.0f))};
}
// Column i of two bfloat16 columns of sixteen rows, [16][2].
INLINE Vec bf16_column(const uint16_t* p, int i) {
    const __m512i raw = _mm512_loadu_si512(p);
    return {_mm512_castsi512_ps(i ? _mm512_and_si512(raw, _mm512_set1_epi32(int(0xffff0000u)))
                                  : _mm512_slli_epi32(raw, 16))};
}

#elif defined(__AVX2__)

struct Vec {
    __m256 lo, hi;
};
INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float* p, Vec a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
INLINE Vec fill(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
#define RL_EACH(name, op)                                                        \
    INLINE Vec name(Vec a, Vec b) { return {op(a.lo, b.lo), op(a.hi, b.hi)}; }
RL_EACH(operator+, _mm256_add_ps)
RL_EACH(operator-, _mm256_sub_ps)
RL_EACH(operator*, _mm256_mul_ps)
RL_EACH(operator/, _mm256_div_ps)
RL_EACH(largest, _mm256_max_ps)
RL_EACH(smallest, _mm256_min_ps)
#undef RL_EACH
INLINE Vec fma(Vec a, Vec b, Vec c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
INLINE Vec round_even(Vec a) { return {_mm256_round_ps(a.lo, 8), _mm256_round_ps(a.hi, 8)}; }
INLINE __m256 times_power_of_two(__m256 a, __m256 n) {  // in two steps: n may leave the exponent
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    const __m256i rest = _mm256_sub_epi32(whole, half), bias = _mm256_set1_epi32(127);
    const __m256i one = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    const __m256i two = _mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23);
    return _mm256_mul_ps(_mm256_mul_ps(a, _mm256_castsi256_ps(one)), _mm256_castsi256_ps(two));
}
INLINE Vec times_power_of_two(Vec a, Vec n) {
    return {times_power_of_two(a.lo, n.lo), times_power_of_two(a.hi, n.hi)};
}
INLINE __m256 keep_lanes(__m256 a, int begin, int end, float other) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i before = _mm256_cmpgt_epi32(_mm256_set1_epi32(begin), lane);
    const __m256i in = _mm256_andnot_si256(before, _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane));
    return _mm256_blendv_ps(_mm256_set1_ps(other), a, _mm256_castsi256_ps(in));
}
INLINE Vec keep_lanes(Vec a, int begin, int end, float other) {
    return {keep_lanes(a.lo, begin, end, other), keep_lanes(a.hi, begin - 8, end - 8, other)};
}
INLINE __m256 half_bf16(const uint16_t* p) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
INLINE Vec load_bf16(const uint16_t* p) { return {half_bf16(p), half_bf16(p + 8)}; }
INLINE __m256i bf16_bits(__m256 a) {  // in the lower half of each lane
    const __m256i bits = _mm256_castps_si256(a), upper = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, up), 16);
    const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, quiet, nan);
}
INLINE void store_bf16(uint16_t* p, Vec a) {
    const __m256i both = _mm256_packus_epi32(bf16_bits(a.lo), bf16_bits(a.hi));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(both, 0xd8));
}
INLINE __m256 int8_column(__m256i quads, int i) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(quads, 24 - 8 * i), 24));
}
INLINE Vec int8_column(const int8_t* p, int i) {
    const __m256i* quads = reinterpret_cast<const __m256i*>(p);
    return {int8_column(_mm256_loadu_si256(quads), i), int8_column(_mm256_loadu_si256(quads + 1), i)};
}
INLINE __m256 bf16_column(__m256i pairs, int i) {
    return _mm256_castsi256_ps(i ? _mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000u)))
                                 : _mm256_slli_epi32(pairs, 16));
}
INLINE Vec bf16_column(const uint16_t* p, int i) {
    const __m256i* pairs = reinterpret_cast<const __m256i*>(p);
    return {bf16_column(_mm256_loadu_si256(pairs), i), bf16_column(_mm256_loadu_si256(pairs + 1), i)};
}

#else  // portable: the compiler's own vectors of four, which become what the machine has

static_assert(std::endian::native == std::endian::little, "packed weights are read as words");

using Four = float __attribute__((vector_size(16)));
using FourInts = int32_t __attribute__((vector_size(16)));
using FourWords = uint32_t __attribute__((vector_size(16)));
using FourHalves = uint16_t __attribute__((vector_size(8)));

struct Vec {
    Four v[4];
};
#define RL_EACH(name, expression)                           \
    INLINE Vec name(Vec a, Vec b) {                         \
        Vec c;                                              \
        for (int j = 0; j < 4; ++j) c.v[j] = (expression);  \
        return c;                                           \
    }
RL_EACH(operator+, a.v[j] + b.v[j])
RL_EACH(operator-, a.v[j] - b.v[j])
RL_EACH(operator*, a.v[j] * b.v[j])
RL_EACH(operator/, a.v[j] / b.v[j])
RL_EACH(largest, a.v[j] > b.v[j] ? a.v[j] : b.v[j])
RL_EACH(smallest, a.v[j] < b.v[j] ? a.v[j] : b.v[j])
#undef RL_EACH
INLINE Vec load(const float* p) {
    Vec a;
    for (int j = 0; j < 4; ++j) std::memcpy(&a.v[j], p + 4 * j, 16);
    return a;
}
INLINE void store(float* p, Vec a) {
    for (int j = 0; j < 4; ++j) std::memcpy(p + 4 * j, &a.v[j], 16);
}
INLINE Vec fill(float x) {
    const Four four = {x, x, x, x};
    return {{four, four, four, four}};
}
INLINE Vec fma(Vec a, Vec b, Vec c) {
    for (int j = 0; j < 4; ++j) {
#if defined(__aarch64__)
        c.v[j] = vfmaq_f32(c.v[j], a.v[j], b.v[j]);
#elif defined(__FMA__)
        for (int i = 0; i < 4; ++i) c.v[j][i] = __builtin_fmaf(a.v[j][i], b.v[j][i], c.v[j][i]);
#else
        c.v[j] += a.v[j] * b.v[j];
#endif
    }
    return c;
}
template <class Lane>
INLINE Vec each_lane(Lane&& lane) {
    Vec a;
    for (int t = 0; t < LANES; ++t) a.v[t / 4][t % 4] = lane(t);
    return a;
}
INLINE Vec times_power_of_two(Vec a, Vec n) {
    return each_lane([&](int t) {
        const float x = a.v[t / 4][t % 4], power = n.v[t / 4][t % 4];
        return power == power ? std::ldexp(x, int(power)) : power;
    });
}
INLINE Vec round_even(Vec a) {
    return each_lane([&](int t) { return std::nearbyintf(a.v[t / 4][t % 4]); });
}
INLINE Vec keep_lanes(Vec a, int begin, int end, float other) {
    for (int j = 0; j < 4; ++j) {
        const FourInts lane = FourInts{0, 1, 2, 3} + 4 * j;
        a.v[j] = (lane >= begin) & (lane < end) ? a.v[j] : fill(other).v[j];
    }
    return a;
}
INLINE Vec load_bf16(const uint16_t* p) {
    Vec a;
    for (int j = 0; j < 4; ++j) {
        FourHalves raw;
        std::memcpy(&raw, p + 4 * j, 8);
        a.v[j] = Four(__builtin_convertvector(raw, FourWords) << 16);
    }
    return a;
}
INLINE void store_bf16(uint16_t* p, Vec a) {
    for (int j = 0; j < 4; ++j) {
        const FourWords bits = FourWords(a.v[j]), upper = bits >> 16;
        const FourWords rounded = (bits + 0x7fffu + (upper & 1u)) >> 16;
        const FourWords kept = a.v[j] == a.v[j] ? rounded : upper | 0x40u;
        const FourHalves half = __builtin_convertvector(kept, FourHalves);
        std::memcpy(p + 4 * j, &half, 8);
    }
}
// Byte i of four words in memory, with its sign.
INLINE FourInts signed_byte(const int8_t* p, int i) {
    FourInts words;
    std::memcpy(&words, p, 16);
    return words << (24 - 8 * i) >> 24;
}
INLINE Vec int8_column(const int8_t* p, int i) {
    Vec a;
    for (int j = 0; j < 4; ++j) a.v[j] = __builtin_convertvector(signed_byte(p + 16 * j, i), Four);
    return a;
}
INLINE Vec bf16_column(const uint16_t* p, int i) {
    Vec a;
    for (int j = 0; j < 4; ++j) {
        FourWords pairs;
        std::memcpy(&pairs, p + 8 * j, 16);
        a.v[j] = Four(i ? pairs & 0xffff0000u : pairs << 16);
    }
    return a;
}

#endif

INLINE float sum_lanes(Vec a) {  // one order on every ISA: halves, halves of halves, ...
    float lanes[LANES];
    store(lanes, a);
    for (int width = LANES / 2; width; width /= 2)
        for (int t = 0; t < width; ++t) lanes[t] += lanes[t + width];
    return lanes[0];
}

INLINE float largest_lane(Vec a) {  // NaN where a lane is
#if defined(__AVX2__) && !defined(__AVX512F__)
    if (_mm256_movemask_ps(_mm256_cmp_ps(a.lo, a.hi, _CMP_UNORD_Q))) return NAN;
    const __m256 eight = _mm256_max_ps(a.lo, a.hi);
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_shuffle_ps(most, most, 1)));
#else
    float lanes[LANES];
    store(lanes, a);
    for (int width = LANES / 2; width; width /= 2)
        for (int t = 0; t < width; ++t)
            if (!(lanes[t] > lanes[t + width]) && lanes[t] == lanes[t])
                lanes[t] = lanes[t + width];
    return lanes[0];
#endif
}

// e^x to about 1 ulp: 2^n e^r with |r| <= ln 2 / 2 and a polynomial of degree 6 (Cephes expf).
INLINE Vec exponential(Vec x) {
    x = smallest(fill(130.0f), largest(fill(-104.0f), x));  // beyond: inf and 0; NaN passes
    const Vec n = round_even(x * fill(1.44269504f));
    const Vec r = fma(n, fill(2.12194440e-4f), fma(n, fill(-0.693359375f), x));
    Vec p = fill(1.9875691500e-4f);
    p = fma(p, r, fill(1.3981999507e-3f));
    p = fma(p, r, fill(8.3334519073e-3f));
    p = fma(p, r, fill(4.1665795894e-2f));
    p = fma(p, r, fill(1.6666665459e-1f));
    p = fma(p, r, fill(5.0000001201e-1f));
    return times_power_of_two(fma(p, r * r, r + fill(1.0f)), n);
}

// Activations of either type.
INLINE Vec load(const uint16_t* p) { return load_bf16(p); }
INLINE void store(uint16_t* p, Vec a) { store_bf16(p, a); }
INLINE void put(float* p, float x) { *p = x; }
INLINE void put(uint16_t* p, float x) { *p = float_to_bf16(x); }

}  // namespace RL_ISA
}  // namespace roofline
