// AMX: eight tiles of sixteen rows of 64 bytes, and products of tiles (Intel, Sapphire Rapids on).
//
// C [16, 16] += A [16, 32] B [32, 16] in bfloat16, B in pairs of columns: [16][16][2]. An item is
// C += even + odd, the sums of the products of even and of odd columns, each from 0 on in order, by
// fused float32 operations; numbers too small to be normal count as 0 (Intel's manual, TDPBF16PS).
// With 64 columns of bytes sums are exact integers. Tiles 0 to 3 are C, 4 and 5 A, 6 and 7 B.
// Included once per ISA, of one alone.
#pragma once

#include "vec.h"

namespace roofline {
namespace RL_ISA {

#if !defined(RL_AMX)
constexpr bool HAS_TILES = false;
template <bool APPLIES>
struct WithoutDenormals {};
#else
constexpr bool HAS_TILES = true;
constexpr int TILE_ROWS = 16;
constexpr int64_t TILE_BYTES = 1024;

#define RL_TILE_LOAD(tile, from, stride) \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"(int64_t(stride)) : "memory")
#define RL_TILE_STORE(tile, to, stride) \
    asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(int64_t(stride)) : "memory")
#define RL_TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile ::)
#define RL_TILE_DOT(kind, c, a, b) \
    asm volatile(kind " %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)
#define RL_BF16 "tdpbf16ps"
#define RL_SIGNED "tdpbsud"    // A signed, B unsigned
#define RL_UNSIGNED "tdpbuud"  // both unsigned

// The tiles of this thread while it lives: A and C have `rows` rows.
class TilesInUse {
  public:
    explicit TilesInUse(int rows) {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, unused[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } shapes;
        for (int tile = 0; tile < 8; ++tile) {
            shapes.row_bytes[tile] = 64;
            shapes.rows[tile] = uint8_t(tile < 6 ? rows : TILE_ROWS);
        }
        asm volatile("ldtilecfg %0" ::"m"(shapes));
    }
    ~TilesInUse() { asm volatile("tilerelease"); }
    TilesInUse(const TilesInUse&) = delete;
    TilesInUse& operator=(const TilesInUse&) = delete;
};

// Arithmetic as the tiles do it, where vectors stand in for them: no number is too small to be normal.
template <bool APPLIES>
class WithoutDenormals {
  public:
    WithoutDenormals() : before_(_mm_getcsr()) {
        if (APPLIES) _mm_setcsr(before_ | 0x8040);
    }
    ~WithoutDenormals() {
        if (APPLIES) _mm_setcsr(before_);
    }
    WithoutDenormals(const WithoutDenormals&) = delete;
    WithoutDenormals& operator=(const WithoutDenormals&) = delete;

  private:
    const unsigned before_;
};

// The two bytes of |q| as bfloat16 below 64; from there on the low one is 2 q and the high one 0x42.
struct Bf16Bytes {
    alignas(64) uint8_t low[64]{}, high[64]{};
    constexpr Bf16Bytes() {
        for (int q = 1; q < 64; ++q) {
            int exponent = 0;
            while (q >> (exponent + 1)) ++exponent;
            const int bits = (127 + exponent) << 7 | ((q << (7 - exponent)) & 0x7f);
            low[q] = uint8_t(bits);
            high[q] = uint8_t(bits >> 8);
        }
    }
};
static constexpr Bf16Bytes BF16_BYTES;

// [16 rows][4 columns] of INT8 as two rows of a tile B.
INLINE void int8_pairs(const char* quad, uint16_t* out) {
    const __m512i raw = _mm512_loadu_si512(quad), size = _mm512_abs_epi8(raw);
    const __mmask64 small = _mm512_cmplt_epu8_mask(size, _mm512_set1_epi8(64));
    const __mmask64 least = _mm512_movepi8_mask(size);  // -128: 0x4300
    const __m512i top = _mm512_mask_blend_epi8(least, _mm512_set1_epi8(0x42), _mm512_set1_epi8(0x43));
    const __m512i low = _mm512_mask_permutexvar_epi8(_mm512_add_epi8(size, size), small, size,
                                                     _mm512_load_si512(BF16_BYTES.low));
    __m512i high = _mm512_mask_permutexvar_epi8(top, small, size, _mm512_load_si512(BF16_BYTES.high));
    const __m512i sign = _mm512_set1_epi8(char(0x80));
    high = _mm512_ternarylogic_epi32(high, raw, sign, 0xf8);  // high | (raw & sign)
    const __m512 a = _mm512_castsi512_ps(_mm512_unpacklo_epi8(low, high));
    const __m512 b = _mm512_castsi512_ps(_mm512_unpackhi_epi8(low, high));
    _mm512_storeu_ps(out, _mm512_shuffle_ps(a, b, 0x88));
    _mm512_storeu_ps(out + 2 * LANES, _mm512_shuffle_ps(a, b, 0xdd));
}
#endif

}  // namespace RL_ISA
}  // namespace roofline
