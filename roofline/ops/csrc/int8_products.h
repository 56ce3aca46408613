// Activations as INT8, and their products with INT8 weights summed exactly in 32-bit integers.
//
// Weights are unsigned, 128 too large (OFFSET_INT8): 128 times the sum of the activations comes off
// at the end of a group. Integers have no order of sums to keep. Included once per ISA.
#pragma once

#include "abi.h"
#include "tiles.h"
#include "vec.h"

namespace roofline {
namespace RL_ISA {

// Sixteen 32-bit integers. `Operand` is an activation as it is multiplied, QUAD_PARTS how many
// products a quad of columns takes: byte_part(quad, i) of the weights by x[4 / QUAD_PARTS * i].
#if defined(__AVX512F__)
struct Ints {
    __m512i v;
};
INLINE Ints fill_ints(int32_t x) { return {_mm512_set1_epi32(x)}; }
INLINE Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
INLINE Ints largest(Ints a, Ints b) { return {_mm512_max_epi32(a.v, b.v)}; }
INLINE Vec to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
INLINE void store(int32_t* p, Ints a) { _mm512_storeu_si512(p, a.v); }
INLINE void store_bytes(int8_t* p, Ints a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
INLINE Ints size_bits(Vec a) {
    return {_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff))};
}
INLINE Ints round_to_ints(Vec a) {
    return {_mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q), a.v)};
}
#elif defined(__AVX2__)
struct Ints {
    __m256i lo, hi;
};
INLINE Ints fill_ints(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE Ints operator+(Ints a, Ints b) {
    return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
INLINE Ints largest(Ints a, Ints b) {
    return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)};
}
INLINE Vec to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
INLINE void store(int32_t* p, Ints a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), a.hi);
}
INLINE void store_bytes(int8_t* p, Ints a) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
INLINE Ints size_bits(Vec a) {
    const __m256i size = _mm256_set1_epi32(0x7fffffff);
    return {_mm256_and_si256(_mm256_castps_si256(a.lo), size),
            _mm256_and_si256(_mm256_castps_si256(a.hi), size)};
}
INLINE __m256i round_to_ints(__m256 a) {
    const __m256i number = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_ORD_Q));
    return _mm256_and_si256(_mm256_cvtps_epi32(a), number);
}
INLINE Ints round_to_ints(Vec a) { return {round_to_ints(a.lo), round_to_ints(a.hi)}; }
#else
struct Ints {
    FourInts v[4];
};
INLINE Ints fill_ints(int32_t x) {
    const FourInts four = {x, x, x, x};
    return {{four, four, four, four}};
}
INLINE Ints operator+(Ints a, Ints b) {
    for (int j = 0; j < 4; ++j) a.v[j] += b.v[j];
    return a;
}
INLINE Ints largest(Ints a, Ints b) {
    for (int j = 0; j < 4; ++j) a.v[j] = a.v[j] > b.v[j] ? a.v[j] : b.v[j];
    return a;
}
INLINE Vec to_floats(Ints a) {
    Vec b;
    for (int j = 0; j < 4; ++j) b.v[j] = __builtin_convertvector(a.v[j], Four);
    return b;
}
INLINE void store(int32_t* p, Ints a) {
    for (int j = 0; j < 4; ++j) std::memcpy(p + 4 * j, &a.v[j], 16);
}
INLINE void store_bytes(int8_t* p, Ints a) {
    for (int t = 0; t < LANES; ++t) p[t] = int8_t(a.v[t / 4][t % 4]);
}
INLINE Ints size_bits(Vec a) {
    Ints b;
    for (int j = 0; j < 4; ++j) b.v[j] = FourInts(a.v[j]) & 0x7fffffff;
    return b;
}
INLINE Ints round_to_ints(Vec a) {  // up to 2^22: in floats about 1.5 * 2^23 the last bit is 1
    Ints b;
    for (int j = 0; j < 4; ++j)
        b.v[j] = (FourInts(a.v[j] + 12582912.0f) - 0x4b400000) & (a.v[j] == a.v[j]);
    return b;
}
#endif

#if defined(__AVX512F__)
INLINE __m512i load_part(const char* p) { return _mm512_loadu_si512(p); }
INLINE void store_part(char* p, __m512i part) { _mm512_storeu_si512(p, part); }
#elif defined(__AVX2__)
INLINE Ints load_part(const char* p) {
    const __m256i* half = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(half), _mm256_loadu_si256(half + 1)};
}
INLINE void store_part(char* p, Ints part) { store(reinterpret_cast<int32_t*>(p), part); }
#else
INLINE Ints load_part(const char* p) {
    Ints a;
    for (int j = 0; j < 4; ++j) std::memcpy(&a.v[j], p + 16 * j, 16);
    return a;
}
INLINE void store_part(char* p, Ints part) { store(reinterpret_cast<int32_t*>(p), part); }
#endif

#if defined(__AVX512VNNI__)
using ByteOperand = int8_t;
constexpr int QUAD_PARTS = 1;
INLINE __m512i byte_part(const char* quad, int) { return _mm512_loadu_si512(quad); }
INLINE Ints dot_part(Ints sum, __m512i weights, const ByteOperand* x) {
    int quad;
    std::memcpy(&quad, x, 4);
    return {_mm512_dpbusd_epi32(sum.v, weights, _mm512_set1_epi32(quad))};
}
#elif defined(__AVX512F__)
using ByteOperand = int16_t;  // a quad as two pairs: its even columns, its odd ones
constexpr int QUAD_PARTS = 2;
INLINE __m512i byte_part(const char* quad, int i) {
    const __m512i raw = _mm512_loadu_si512(quad);
    return i ? _mm512_srli_epi16(raw, 8) : _mm512_and_si512(raw, _mm512_set1_epi16(0xff));
}
INLINE Ints dot_part(Ints sum, __m512i weights, const ByteOperand* x) {
    int pair;
    std::memcpy(&pair, x, 4);
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(weights, _mm512_set1_epi32(pair)))};
}
#elif defined(__AVX2__)
using ByteOperand = int16_t;  // as above
constexpr int QUAD_PARTS = 2;
INLINE __m256i byte_part(__m256i raw, int i) {
    return i ? _mm256_srli_epi16(raw, 8) : _mm256_and_si256(raw, _mm256_set1_epi16(0xff));
}
INLINE Ints byte_part(const char* quad, int i) {
    const __m256i* raw = reinterpret_cast<const __m256i*>(quad);
    return {byte_part(_mm256_loadu_si256(raw), i), byte_part(_mm256_loadu_si256(raw + 1), i)};
}
INLINE Ints dot_part(Ints sum, Ints weights, const ByteOperand* x) {
    int bits;
    std::memcpy(&bits, x, 4);
    const __m256i pair = _mm256_set1_epi32(bits);
    sum = sum + Ints{_mm256_madd_epi16(weights.lo, pair), _mm256_madd_epi16(weights.hi, pair)};
    asm("" : "+x"(sum.lo), "+x"(sum.hi));  // in this order: any other needs more registers
    return sum;
}
#else
using ByteOperand = int16_t;  // as above
constexpr int QUAD_PARTS = 2;
INLINE Ints byte_part(const char* quad, int i) {  // two columns of a row in one lane
    Ints a = load_part(quad);
    for (int j = 0; j < 4; ++j) a.v[j] = (a.v[j] >> 8 * i) & 0xff00ff;
    return a;
}
INLINE Ints dot_part(Ints sum, Ints weights, const ByteOperand* x) {
    for (int j = 0; j < 4; ++j)
        sum.v[j] += (weights.v[j] & 0xff) * x[0] + (weights.v[j] >> 16) * x[1];
    return sum;
}
#endif

// Weights from the packed matrix.
struct Bytes {
    using Sum = Ints;
    static constexpr bool from_memory = true;
    static constexpr bool always = QUAD_PARTS == 1;  // no panel is better than the matrix itself
    static constexpr int least_tokens = 1, most_tokens = always ? MICRO_TOKENS : DIRECT_TOKENS;

    template <int M, int C>
    INLINE void add(const char* quads, const ByteOperand* x, int64_t stride,
                    Ints (&sums)[M][C]) const {
        unroll<C>([&](auto c) INLINED {
            unroll<QUAD_PARTS>([&](auto i) INLINED {
                const auto weights = byte_part(quads + 64 * c, i);
                unroll<M>([&](auto m) INLINED {
                    sums[m][c] = dot_part(sums[m][c], weights, x + m * stride + 4 / QUAD_PARTS * i);
                });
            });
        });
    }
};

// Weights from a panel of the parts of C chunks.
struct WidenedBytes {
    using Sum = Ints;
    static constexpr bool from_memory = false;
    static constexpr int least_tokens = 3, most_tokens = MICRO_TOKENS;

    template <int M, int C>
    INLINE void add(const char* quads, const ByteOperand* x, int64_t stride,
                    Ints (&sums)[M][C]) const {
        unroll<QUAD_PARTS>([&](auto i) INLINED {
            unroll<M>([&](auto m) INLINED {
                unroll<C>([&](auto c) INLINED {
                    sums[m][c] = dot_part(sums[m][c], load_part(quads + (i * C + c) * 64),
                                          x + m * stride + 4 / QUAD_PARTS * i);
                });
            });
        });
    }
};

// Tokens as INT8: for each group of columns a scale, max |x| / 127, and the sum of its values.
struct Quantized {
    int8_t* values;  // [T, K]
    float* scales;   // [T, groups]
    int32_t* sums;   // [T, groups]
};

// Sixteen activations; zeros past the first `count`.
template <class X>
INLINE Vec load_some(const X* x, int64_t count) {
    if (count >= LANES) return load(x);
    X some[LANES] = {};
    std::memcpy(some, x, size_t(count) * sizeof(X));
    return load(some);
}

constexpr float SMALLEST_NORMAL = 1.17549435e-38f;

// The largest |x|; NaN where one is, for the bits of |x| are in order as integers, NaN above all.
template <class X>
INLINE float largest_size(const X* x, int64_t count) {
    Ints largest_bits = fill_ints(0);
    for (int64_t k = 0; k < count; k += LANES)
        largest_bits = largest(largest_bits, size_bits(load_some(x + k, count - k)));
    int32_t lanes[LANES], most_bits = 0;
    store(lanes, largest_bits);
    for (const int32_t bits : lanes) most_bits = bits > most_bits ? bits : most_bits;
    float most;
    std::memcpy(&most, &most_bits, 4);
    return most;
}

// x / scale to the nearest integers, ties to even; 0 where x is NaN. Their sums, by lane.
template <class X>
INLINE Ints to_int8(const X* x, int64_t count, float scale, int8_t* values) {
    Ints total = fill_ints(0);
    for (int64_t k = 0; k < count; k += LANES) {
        const Ints q = round_to_ints(load_some(x + k, count - k) / fill(scale));
        total = total + q;
        if (count - k >= LANES) {
            store_bytes(values + k, q);
            continue;
        }
        int8_t some[LANES];
        store_bytes(some, q);
        std::memcpy(values + k, some, size_t(count - k));
    }
    return total;
}

// One group: `count` activations to INT8 values, their scale and their sum.
template <class X>
INLINE void quantize_group(const X* x, int64_t count, int8_t* values, float* scale, int32_t* sum) {
    const float most = largest_size(x, count);
    *scale = most < SMALLEST_NORMAL ? 1.0f : most / 127.0f;
    int32_t lanes[LANES];
    store(lanes, to_int8(x, count, *scale, values));  // a NaN is in the scale
    *sum = 0;
    for (const int32_t lane : lanes) *sum += lane;
}

// Columns of one token, each quad in the order of its parts.
INLINE void to_operands(const int8_t* x, int64_t columns, int16_t* out) {
    int64_t k = 0;
#if defined(__AVX2__)
    for (; k + 32 <= columns; k += 32, out += 32) {
        const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + k));
        const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(raw, 8), 8);
        const __m256i odd = _mm256_srai_epi16(raw, 8);
        const __m256i low = _mm256_unpacklo_epi32(even, odd), high = _mm256_unpackhi_epi32(even, odd);
        __m256i* to = reinterpret_cast<__m256i*>(out);
        _mm256_storeu_si256(to, _mm256_permute2x128_si256(low, high, 0x20));
        _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(low, high, 0x31));
    }
#endif
    for (; k < columns; k += 4, out += 4)
        for (int i = 0; i < 4; ++i) out[i] = x[k + (2 * i) % 4 + i / 2];
}

}  // namespace RL_ISA
}  // namespace roofline
