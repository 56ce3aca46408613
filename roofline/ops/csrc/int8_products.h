// Products of INT8 weights with activations that are INT8 too, summed exactly in 32-bit integers.
//
// Weights are unsigned, 128 too large (OFFSET_INT8): sums begin at -128 times that of the
// activations. Integers have no order of sums to keep. Included once per ISA.
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
INLINE int32_t largest_lane(Ints a) { return _mm512_reduce_max_epi32(a.v); }
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
INLINE int32_t largest_lane(Ints a) {
    const __m256i eight = _mm256_max_epi32(a.lo, a.hi);
    __m128i most = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1)));
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
INLINE int32_t largest_lane(Ints a) {
    int32_t most = a.v[0][0];
    for (int t = 1; t < LANES; ++t) most = most > a.v[t / 4][t % 4] ? most : a.v[t / 4][t % 4];
    return most;
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

#if defined(__AVX512VNNI__) && !defined(RL_AMX)  // beside tiles operands have 16 bits
using ByteOperand = int8_t;
constexpr int QUAD_PARTS = 1;
INLINE void store_operands(ByteOperand* p, Ints a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
INLINE __m512i byte_part(const char* quad, int) { return _mm512_loadu_si512(quad); }
INLINE Ints dot_part(Ints sum, __m512i weights, const ByteOperand* x) {
    int quad;
    std::memcpy(&quad, x, 4);
    sum.v = _mm512_dpbusd_epi32(sum.v, weights, _mm512_set1_epi32(quad));
    asm("" : "+v"(sum.v));  // in its register: a copy for what comes after the loop would spill
    return sum;
}
#elif defined(__AVX512F__)
using ByteOperand = int16_t;  // a quad as two pairs: its even columns, its odd ones
constexpr int QUAD_PARTS = 2;
INLINE void store_operands(ByteOperand* p, Ints a) {
    const __m256i words = _mm256_shufflelo_epi16(_mm512_cvtepi32_epi16(a.v), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_shufflehi_epi16(words, 0xd8));
}
INLINE __m512i byte_part(const char* quad, int i) {
    const __m512i raw = _mm512_loadu_si512(quad);
    return i ? _mm512_srli_epi16(raw, 8) : _mm512_and_si512(raw, _mm512_set1_epi16(0xff));
}
INLINE Ints dot_part(Ints sum, __m512i weights, const ByteOperand* x) {
    int pair;
    std::memcpy(&pair, x, 4);
#if defined(__AVX512VNNI__)
    return {_mm512_dpwssd_epi32(sum.v, weights, _mm512_set1_epi32(pair))};
#else
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(weights, _mm512_set1_epi32(pair)))};
#endif
}
#elif defined(__AVX2__)
using ByteOperand = int16_t;  // as above
constexpr int QUAD_PARTS = 2;
INLINE void store_operands(ByteOperand* p, Ints a) {
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
    words = _mm256_shufflelo_epi16(words, 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_shufflehi_epi16(words, 0xd8));
}
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
INLINE void store_operands(ByteOperand* p, Ints a) {
    for (int t = 0; t < LANES; ++t) p[t] = int16_t(a.v[t / 4][t % 2 * 2 + t % 4 / 2]);
}
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

}  // namespace RL_ISA
}  // namespace roofline
