// How weights meet float activations: four columns of some chunks at a time, for some tokens.
//
// `Direct` reads the packed matrix, `Panel` a copy of it that was widened once for many tokens:
// [columns][chunks][16], bfloat16 in pairs of columns. Both make the same sums in the same order.
// Included once per ISA.
#pragma once

#include "amx.h"
#include "matrix.h"
#include "tiles.h"
#include "vec.h"

namespace roofline {
namespace RL_ISA {

#if defined(__AVX512BF16__) && !defined(RL_AMX)
#define RL_BF16_DOT 1
#endif

// Float32 arithmetic, for activations of either type.
template <class X>
struct Panel {
    using Item = float;     // of a panel
    using Operand = float;  // activations as they are multiplied
    static constexpr int step = 1;  // columns of a product
    static INLINE Vec multiplier(const float* x) { return fill(*x); }
    static INLINE Vec multiplier(const uint16_t* x) { return fill(bf16_to_float(*x)); }
    static INLINE Vec multiply(const Item* weights, Vec x, Vec sum) {
        return fma(load(weights), x, sum);
    }
    // Four columns of one chunk into a panel whose columns are `stride` items apart.
    static INLINE void widen(const char* quad, int64_t kind, bool, Item* out, int64_t stride) {
        for (int i = 0; i < 4; ++i) store(out + i * stride, column(quad, kind, i));
    }
    template <int M, int C>
    static INLINE void add(const char* quads, int64_t kind, bool, const Operand* x, int64_t stride,
                           Vec (&sums)[M][C]) {
        unroll<C>([&](auto c) INLINED {
            unroll<4>([&](auto i) INLINED {
                const Vec weights = column(quads + c * 64 * item_bytes(kind), kind, i);
                unroll<M>([&](auto m) INLINED {
                    sums[m][c] = fma(weights, fill(x[m * stride + i]), sums[m][c]);
                });
            });
        });
    }
    static INLINE Vec column(const char* quad, int64_t kind, int i) {
        if (kind == INT8) return int8_column(reinterpret_cast<const int8_t*>(quad), i);
        if (kind == FLOAT32) return load(reinterpret_cast<const float*>(quad) + LANES * i);
        return bf16_column(reinterpret_cast<const uint16_t*>(quad) + i / 2 * 32, i % 2);
    }
};

#ifdef RL_BF16_DOT
// The two bytes of |q| as bfloat16, and how to lay the bytes of [16 rows][4 columns] out as pairs.
struct Bf16Tables {
    alignas(64) uint8_t low[128]{}, high[128]{}, pairs[2][64]{};
    constexpr Bf16Tables() {
        for (int q = 1; q < 128; ++q) {
            int exponent = 0;
            while (q >> (exponent + 1)) ++exponent;
            const int bits = (127 + exponent) << 7 | ((q << (7 - exponent)) & 0x7f);
            low[q] = uint8_t(bits);
            high[q] = uint8_t(bits >> 8);
        }
        for (int half = 0; half < 2; ++half)
            for (int row = 0; row < LANES; ++row)
                for (int i = 0; i < 2; ++i) {  // 64 and up: from the high bytes
                    pairs[half][4 * row + 2 * i] = uint8_t(4 * row + 2 * half + i);
                    pairs[half][4 * row + 2 * i + 1] = uint8_t(64 + 4 * row + 2 * half + i);
                }
    }
};
static constexpr Bf16Tables TABLES;

// Pairs of bfloat16 products, summed in float32 by VDPBF16PS.
template <>
struct Panel<uint16_t> {
    using Item = uint16_t;
    using Operand = uint16_t;
    using Pair = __m512bh;
    static constexpr int step = 2;
    static INLINE Pair multiplier(const Operand* x) {
        int pair;
        std::memcpy(&pair, x, 4);
        return Pair(_mm512_set1_epi32(pair));
    }
    static INLINE Vec multiply(const Item* weights, Pair x, Vec sum) {
        return {_mm512_dpbf16_ps(sum.v, Pair(_mm512_loadu_si512(weights)), x)};
    }
    static INLINE void widen(const char* quad, int64_t kind, bool extremes, Item* out,
                             int64_t stride) {
        __m512i pairs[2];
        widen_pairs(quad, kind, extremes, pairs);
        _mm512_storeu_si512(out, pairs[0]);
        _mm512_storeu_si512(out + 2 * stride, pairs[1]);
    }
    template <int M, int C>
    static INLINE void add(const char* quads, int64_t kind, bool extremes, const Operand* x,
                           int64_t stride, Vec (&sums)[M][C]) {
        unroll<C>([&](auto c) INLINED {
            __m512i pairs[2];
            widen_pairs(quads + c * 64 * item_bytes(kind), kind, extremes, pairs);
            unroll<2>([&](auto i) INLINED {
                unroll<M>([&](auto m) INLINED {
                    const Pair by = multiplier(x + m * stride + 2 * i);
                    sums[m][c].v = _mm512_dpbf16_ps(sums[m][c].v, Pair(pairs[i]), by);
                });
            });
        });
    }

  private:
    static INLINE __m512i table(const uint8_t* bytes) { return _mm512_load_si512(bytes); }
    static INLINE void widen_pairs(const char* quad, int64_t kind, bool extremes,
                                   __m512i pairs[2]) {
        if (kind == BFLOAT16) {
            pairs[0] = _mm512_loadu_si512(quad);
            pairs[1] = _mm512_loadu_si512(quad + 64);
            return;
        }
        if (extremes) {  // -128 has no place in the tables
            const __m512i upper = _mm512_set1_epi32(int(0xffff0000u));
            for (int i = 0; i < 2; ++i) {
                const int8_t* q = reinterpret_cast<const int8_t*>(quad);
                const __m512i even = _mm512_castps_si512(int8_column(q, 2 * i).v);
                const __m512i odd = _mm512_castps_si512(int8_column(q, 2 * i + 1).v);
                pairs[i] = _mm512_or_si512(_mm512_srli_epi32(even, 16), _mm512_and_si512(odd, upper));
            }
            return;
        }
        const __m512i raw = _mm512_loadu_si512(quad), size = _mm512_abs_epi8(raw);
        const __m512i low = _mm512_permutex2var_epi8(table(TABLES.low), size, table(TABLES.low + 64));
        __m512i high = _mm512_permutex2var_epi8(table(TABLES.high), size, table(TABLES.high + 64));
        const __m512i sign = _mm512_set1_epi8(char(0x80));
        high = _mm512_ternarylogic_epi32(high, raw, sign, 0xf8);  // high | (raw & sign)
        pairs[0] = _mm512_permutex2var_epi8(low, table(TABLES.pairs[0]), high);
        pairs[1] = _mm512_permutex2var_epi8(low, table(TABLES.pairs[1]), high);
    }
};
#endif

// Columns of one token, widened.
INLINE void to_operands(const uint16_t* x, int64_t columns, float* out) {
    int64_t k = 0;
    for (; k + LANES <= columns; k += LANES) store(out + k, load_bf16(x + k));
    for (; k < columns; ++k) out[k] = bf16_to_float(x[k]);
}

// Weights from the packed matrix, a quad of columns of each chunk after the other.
template <class X>
struct Direct {
    using P = Panel<X>;
    using Sum = Vec;
    static constexpr bool from_memory = false;  // the processor finds out what comes next
    static constexpr bool in_halves = false;
    static constexpr int least_tokens = 1, most_tokens = DIRECT_TOKENS;
    int64_t kind;
    bool extremes;

    template <int M, int C>
    INLINE void add(const char* quads, const typename P::Operand* x, int64_t stride,
                    Vec (&sums)[M][C]) const {
        P::template add<M, C>(quads, kind, extremes, x, stride, sums);
    }
};

// The same for what nearly all matrices are: INT8 without -128.
template <class X>
struct DirectInt8 {
    using P = Panel<X>;
    using Sum = Vec;
    static constexpr bool from_memory = true;
    static constexpr bool in_halves = false;
    static constexpr int least_tokens = 1, most_tokens = DIRECT_TOKENS;

    template <int M, int C>
    INLINE void add(const char* quads, const typename P::Operand* x, int64_t stride,
                    Vec (&sums)[M][C]) const {
        P::template add<M, C>(quads, INT8, false, x, stride, sums);
    }
};

// Whether activations of a type are summed as AMX does it, so that tiles may multiply more of them.
template <class X>
constexpr bool sums_in_halves = HAS_TILES && sizeof(X) == 2;

// Weights from the packed matrix, for such sums.
template <bool IS_INT8>
struct Halves {
    using Sum = Vec;
    static constexpr bool from_memory = true, in_halves = true;
    static constexpr int least_tokens = 1, most_tokens = DIRECT_TOKENS;
    int64_t kind;

    template <int M, int C>
    INLINE void add(const char* quads, const float* x, int64_t stride, Vec (&halves)[2][M][C]) const {
        const int64_t weights = IS_INT8 ? INT8 : kind;
        unroll<C>([&](auto c) INLINED {
            unroll<4>([&](auto i) INLINED {
                const Vec column = Panel<float>::column(quads + c * 64 * item_bytes(weights), weights, i);
                unroll<M>([&](auto m) INLINED {
                    halves[i % 2][m][c] = fma(column, fill(x[m * stride + i]), halves[i % 2][m][c]);
                });
            });
        });
    }
};

// Weights from a panel of C chunks.
template <class X>
struct Widened {
    using P = Panel<X>;
    using Sum = Vec;
    static constexpr bool from_memory = false;
    static constexpr bool in_halves = false;
    static constexpr int least_tokens = 3, most_tokens = MICRO_TOKENS;  // more than DIRECT_TOKENS halved

    template <int M, int C>
    INLINE void add(const char* quads, const typename P::Operand* x, int64_t stride,
                    Vec (&sums)[M][C]) const {
        const typename P::Item* weights = reinterpret_cast<const typename P::Item*>(quads);
        unroll<4 / P::step>([&](auto i) INLINED {
            unroll<M>([&](auto m) INLINED {
                const auto multiplier = P::multiplier(x + m * stride + i * P::step);
                unroll<C>([&](auto c) INLINED {
                    const typename P::Item* column = weights + P::step * (i * C + c) * LANES;
                    sums[m][c] = P::multiply(column, multiplier, sums[m][c]);
                });
            });
        });
    }
};

}  // namespace RL_ISA
}  // namespace roofline
