// x [T, K] times a packed matrix: a block of rows at a time, their weights across SIMD lanes.
//
// An output is one lane: for each group of columns a sum over K in order, in float32, times the
// group's scale onto the total. Tiles of tokens and panels change what is loaded when, never that
// order, so a token's bits do not depend on how many others there are. Included once per ISA.
#pragma once

#include "abi.h"
#include "team.h"
#include "vec.h"

namespace roofline {
namespace RL_ISA {

constexpr int MAX_CHUNKS = 4;      // of 16 rows in a block
constexpr int PANEL_COLUMNS = 128; // columns widened at a time, so that a panel stays in L1
constexpr int TILE_TOKENS = 96;    // tokens whose totals a block keeps at hand
constexpr int DIRECT_TOKENS = 4;   // up to here weights go from memory through registers only
constexpr int MICRO_TOKENS = 6;

// A block of a matrix: where it begins and how tall it is.
struct Block {
    const char* values;
    const float* scales;
    int64_t chunks;     // of 16 rows
    int64_t first_row;
};

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t padded_columns(const Weight& w) { return ceil_div(w.columns, 4) * 4; }
INLINE bool is_int8(const Weight& w) { return w.kind == INT8 || w.kind == OFFSET_INT8; }
INLINE int64_t item_bytes(int64_t kind) { return kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1; }
INLINE int64_t group_count(const Weight& w) {
    return is_int8(w) ? ceil_div(w.columns + w.offset, w.group) : 1;
}
INLINE int64_t block_count(const Weight& w) {
    return ceil_div(ceil_div(w.rows, LANES), w.chunks);
}
INLINE Block block_at(const Weight& w, int64_t index) {
    const int64_t first = index * w.chunks, chunks = ceil_div(w.rows, LANES);
    return {static_cast<const char*>(w.values) + first * LANES * padded_columns(w) * item_bytes(w.kind),
            w.scales + first * LANES * group_count(w),
            chunks - first < w.chunks ? chunks - first : w.chunks, first * LANES};
}

// The columns of one group: [begin, end), end padded to whole quads at the end of the matrix.
INLINE void group_columns(const Weight& w, int64_t group, int64_t& begin, int64_t& end) {
    const int64_t columns = padded_columns(w);
    begin = 0, end = columns;
    if (!is_int8(w)) return;
    if (group) begin = group * w.group - w.offset;
    const int64_t next = (group + 1) * w.group - w.offset;
    if (next < w.columns) end = next;
}

// How weights meet activations. A panel is [columns][chunks][16] (bfloat16: [columns / 2][chunks]
// [16][2]); `step` columns of it are multiplied by one `Multiplier`.
#if defined(__AVX512BF16__)
#define RL_BF16_DOT 1
#endif

template <class X>
struct Panel {  // float32 arithmetic
    using Item = float;
    static constexpr int step = 1;
    static INLINE Vec multiplier(const float* x) { return fill(*x); }
    static INLINE Vec multiplier(const uint16_t* x) { return fill(bf16_to_float(*x)); }
    static INLINE Vec multiply(const Item* weights, Vec x, Vec sum) {
        return fma(load(weights), x, sum);
    }
    // Four columns of one chunk: out is [4], `stride` items apart.
    static INLINE void widen(const void* quad, int64_t kind, bool, Item* out, int64_t stride) {
        Vec columns[4];
        widen_columns(quad, kind, columns);
        for (int i = 0; i < 4; ++i) store(out + i * stride, columns[i]);
    }
    static INLINE void widen_columns(const void* quad, int64_t kind, Vec columns[4]) {
        if (kind == INT8) {
            quad_to_floats(static_cast<const int8_t*>(quad), columns);
        } else if (kind == BFLOAT16) {
            pair_to_floats(static_cast<const uint16_t*>(quad), columns);
            pair_to_floats(static_cast<const uint16_t*>(quad) + 32, columns + 2);
        } else {
            for (int i = 0; i < 4; ++i)
                columns[i] = load(static_cast<const float*>(quad) + LANES * i);
        }
    }
    template <int M, int C>
    static INLINE void direct(const void* quads, int64_t kind, bool, const X* x, int64_t stride,
                              Vec (&sums)[M][C]) {
        const int64_t bytes = 64 * item_bytes(kind);
        for (int c = 0; c < C; ++c) {
            Vec columns[4];
            widen_columns(static_cast<const char*>(quads) + c * bytes, kind, columns);
            for (int i = 0; i < 4; ++i)
                for (int m = 0; m < M; ++m)
                    sums[m][c] = fma(columns[i], multiplier(x + m * stride + i), sums[m][c]);
        }
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

template <>
struct Panel<uint16_t> {  // pairs of bfloat16 products, summed in float32 by VDPBF16PS
    using Item = uint16_t;
    static constexpr int step = 2;
    using Pair = __m512bh;
    static INLINE Pair multiplier(const uint16_t* x) {
        int pair;
        std::memcpy(&pair, x, 4);
        return Pair(_mm512_set1_epi32(pair));
    }
    static INLINE Vec multiply(const Item* weights, Pair x, Vec sum) {
        return {_mm512_dpbf16_ps(sum.v, Pair(_mm512_loadu_si512(weights)), x)};
    }
    static INLINE void widen_pairs(const void* quad, int64_t kind, bool extremes, __m512i pairs[2]) {
        if (kind == BFLOAT16) {
            pairs[0] = _mm512_loadu_si512(quad);
            pairs[1] = _mm512_loadu_si512(static_cast<const char*>(quad) + 64);
            return;
        }
        const __m512i raw = _mm512_loadu_si512(quad);
        if (extremes) {  // -128 has no place in the tables
            const __m512i upper = _mm512_set1_epi32(int(0xffff0000u));
            Vec f[4];
            quad_to_floats(static_cast<const int8_t*>(quad), f);
            for (int i = 0; i < 2; ++i) {
                const __m512i even = _mm512_castps_si512(f[2 * i].v);
                const __m512i odd = _mm512_castps_si512(f[2 * i + 1].v);
                pairs[i] = _mm512_or_si512(_mm512_srli_epi32(even, 16), _mm512_and_si512(odd, upper));
            }
            return;
        }
        const __m512i size = _mm512_abs_epi8(raw);
        const __m512i low = _mm512_permutex2var_epi8(table(TABLES.low), size, table(TABLES.low + 64));
        __m512i high = _mm512_permutex2var_epi8(table(TABLES.high), size, table(TABLES.high + 64));
        const __m512i sign = _mm512_set1_epi8(char(0x80));
        high = _mm512_ternarylogic_epi32(high, raw, sign, 0xf8);  // high | (raw & sign)
        pairs[0] = _mm512_permutex2var_epi8(low, table(TABLES.pairs[0]), high);
        pairs[1] = _mm512_permutex2var_epi8(low, table(TABLES.pairs[1]), high);
    }
    static INLINE __m512i table(const uint8_t* bytes) { return _mm512_load_si512(bytes); }
    static INLINE void widen(const void* quad, int64_t kind, bool extremes, Item* out,
                             int64_t stride) {
        __m512i pairs[2];
        widen_pairs(quad, kind, extremes, pairs);
        _mm512_storeu_si512(out, pairs[0]);
        _mm512_storeu_si512(out + 2 * stride, pairs[1]);
    }
    template <int M, int C>
    static INLINE void direct(const void* quads, int64_t kind, bool extremes, const uint16_t* x,
                              int64_t stride, Vec (&sums)[M][C]) {
        const int64_t bytes = 64 * item_bytes(kind);
        for (int c = 0; c < C; ++c) {
            __m512i pairs[2];
            widen_pairs(static_cast<const char*>(quads) + c * bytes, kind, extremes, pairs);
            for (int i = 0; i < 2; ++i)
                for (int m = 0; m < M; ++m)
                    sums[m][c].v = _mm512_dpbf16_ps(sums[m][c].v, Pair(pairs[i]),
                                                    multiplier(x + m * stride + 2 * i));
        }
    }
};
#endif

// Totals of M tokens and C chunks straight from the packed matrix.
template <class X, int M, int C>
static void multiply_direct(const Weight& w, const Block& block, const X* x, int64_t stride,
                            float* totals) {
    Vec total[M][C];
    for (int m = 0; m < M; ++m)
        for (int c = 0; c < C; ++c) total[m][c] = fill(0.0f);
    const int64_t groups = group_count(w), quad = C * 64 * item_bytes(w.kind);
    const bool extremes = w.extremes != 0;
    for (int64_t g = 0; g < groups; ++g) {
        int64_t begin, end;
        group_columns(w, g, begin, end);
        Vec sums[M][C];
        for (int m = 0; m < M; ++m)
            for (int c = 0; c < C; ++c) sums[m][c] = fill(0.0f);
        const char* weights = block.values + begin / 4 * quad;
        if (w.kind == INT8 && !extremes) {
            for (int64_t k = begin; k < end; k += 4, weights += quad) {
                __builtin_prefetch(weights + 2048);
                if (C > 1) __builtin_prefetch(weights + 2048 + 64);
                if (C > 2) __builtin_prefetch(weights + 2048 + 128);
                if (C > 3) __builtin_prefetch(weights + 2048 + 192);
                Panel<X>::template direct<M, C>(weights, INT8, false, x + k, stride, sums);
            }
        } else {
            for (int64_t k = begin; k < end; k += 4, weights += quad)
                Panel<X>::template direct<M, C>(weights, w.kind, extremes, x + k, stride, sums);
        }
        for (int c = 0; c < C; ++c) {
            if (w.kind != INT8) {
                for (int m = 0; m < M; ++m) total[m][c] = sums[m][c];
                continue;
            }
            const Vec scale = load(block.scales + (g * C + c) * LANES);
            for (int m = 0; m < M; ++m) total[m][c] = fma(sums[m][c], scale, total[m][c]);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int c = 0; c < C; ++c) store(totals + m * C * LANES + c * LANES, total[m][c]);
}

// Add the columns of a panel to the sums of M tokens; `sums` is [M][C][16].
template <class X, int M, int C>
static void multiply_panel(const typename Panel<X>::Item* panel, int64_t columns, const X* x,
                           int64_t stride, bool fresh, float* sums) {
    using P = Panel<X>;
    Vec sum[M][C];
    for (int m = 0; m < M; ++m)
        for (int c = 0; c < C; ++c)
            sum[m][c] = fresh ? fill(0.0f) : load(sums + (m * C + c) * LANES);
    for (int64_t k = 0; k < columns; k += P::step, panel += P::step * C * LANES)
        for (int m = 0; m < M; ++m) {
            const auto multiplier = P::multiplier(x + m * stride + k);
            for (int c = 0; c < C; ++c)
                sum[m][c] = P::multiply(panel + P::step * c * LANES, multiplier, sum[m][c]);
        }
    for (int m = 0; m < M; ++m)
        for (int c = 0; c < C; ++c) store(sums + (m * C + c) * LANES, sum[m][c]);
}

template <class X, int C>
static void multiply_panel_tokens(int tokens, const typename Panel<X>::Item* panel, int64_t columns,
                                  const X* x, int64_t stride, bool fresh, float* sums) {
    switch (tokens) {
        case 1: return multiply_panel<X, 1, C>(panel, columns, x, stride, fresh, sums);
        case 2: return multiply_panel<X, 2, C>(panel, columns, x, stride, fresh, sums);
        case 3: return multiply_panel<X, 3, C>(panel, columns, x, stride, fresh, sums);
        case 4: return multiply_panel<X, 4, C>(panel, columns, x, stride, fresh, sums);
        case 5: return multiply_panel<X, 5, C>(panel, columns, x, stride, fresh, sums);
        default: return multiply_panel<X, 6, C>(panel, columns, x, stride, fresh, sums);
    }
}

// Totals of up to TILE_TOKENS tokens, through panels of widened weights.
template <class X, int C>
static void multiply_tile(const Weight& w, const Block& block, int tokens, const X* x,
                          int64_t stride, float* totals) {
    using P = Panel<X>;
    alignas(64) typename P::Item panel[PANEL_COLUMNS * C * LANES];
    alignas(64) float sums[TILE_TOKENS * C * LANES];
    for (int i = 0; i < tokens * C * LANES; i += LANES) store(totals + i, fill(0.0f));
    const int64_t groups = group_count(w), quad = 64 * item_bytes(w.kind);
    for (int64_t g = 0; g < groups; ++g) {
        int64_t begin, end;
        group_columns(w, g, begin, end);
        for (int64_t k = begin; k < end; k += PANEL_COLUMNS) {
            const int64_t columns = end - k < PANEL_COLUMNS ? end - k : PANEL_COLUMNS;
            const char* weights = block.values + k / 4 * C * quad;
            for (int64_t q = 0; q < columns; q += 4)
                for (int c = 0; c < C; ++c, weights += quad)
                    P::widen(weights, w.kind, w.extremes != 0,
                             panel + q * C * LANES + P::step * c * LANES, C * LANES);
            for (int t = 0; t < tokens; t += MICRO_TOKENS)
                multiply_panel_tokens<X, C>(tokens - t, panel, columns, x + t * stride + k, stride,
                                            k == begin, sums + t * C * LANES);
        }
        for (int t = 0; t < tokens; ++t)
            for (int c = 0; c < C; ++c) {
                float* total = totals + (t * C + c) * LANES;
                const Vec sum = load(sums + (t * C + c) * LANES);
                if (w.kind != INT8) {
                    store(total, sum);
                    continue;
                }
                const Vec scale = load(block.scales + (g * C + c) * LANES);
                store(total, fma(sum, scale, load(total)));
            }
    }
}

template <class X, int C>
static void multiply_chunks(const Weight& w, const Block& block, int tokens, const X* x,
                            int64_t stride, float* totals) {
    switch (tokens) {
        case 1: return multiply_direct<X, 1, C>(w, block, x, stride, totals);
        case 2: return multiply_direct<X, 2, C>(w, block, x, stride, totals);
        case 3: return multiply_direct<X, 3, C>(w, block, x, stride, totals);
        case 4: return multiply_direct<X, 4, C>(w, block, x, stride, totals);
        default: return multiply_tile<X, C>(w, block, tokens, x, stride, totals);
    }
}

// Tokens as INT8: for each group of columns a scale, max |x| / 127, and the sum of its values.
struct Quantized {
    int8_t* values;  // [T, K]
    float* scales;   // [T, groups]
    int32_t* sums;   // [T, groups]
};

INLINE Quantized quantized_at(void* room, int64_t tokens, const Weight& w) {
    const int64_t groups = group_count(w);
    float* scales = static_cast<float*>(room);
    int32_t* sums = reinterpret_cast<int32_t*>(scales + tokens * groups);
    return {reinterpret_cast<int8_t*>(sums + tokens * groups), scales, sums};
}

template <class X>
static void quantize(const Weight& w, const X* x, int8_t* values, float* scales, int32_t* sums) {
    const auto at = [&](int64_t k) {
        if constexpr (sizeof(X) == 2) return bf16_to_float(x[k]);
        else return x[k];
    };
    for (int64_t g = 0; g < group_count(w); ++g) {
        int64_t begin, end;
        group_columns(w, g, begin, end);
        float most = 0.0f;
        for (int64_t k = begin; k < end; ++k) {
            const float size = std::fabs(at(k));
            most = size > most || size != size ? size : most;
        }
        const float scale = most < 1.17549435e-38f ? 1.0f : most / 127.0f;
        int32_t sum = 0;
        for (int64_t k = begin; k < end; ++k) {
            const float q = std::nearbyintf(at(k) / scale);
            values[k] = q == q ? int8_t(q) : int8_t(0);  // a NaN is in the scale
            sum += values[k];
        }
        scales[g] = scale;
        sums[g] = sum;
    }
}

template <int M, int C>
static void multiply_int8(const Weight& w, const Block& block, int64_t group, const Quantized& x,
                          int64_t first, float* totals) {
    const int64_t groups = group_count(w);
    int64_t begin, end;
    group_columns(w, group, begin, end);
    Ints sums[M][C];
    for (int m = 0; m < M; ++m)  // 128 too much in every weight
        for (int c = 0; c < C; ++c)
            sums[m][c] = fill_ints(-128 * x.sums[(first + m) * groups + group]);
    const uint8_t* weights =
        reinterpret_cast<const uint8_t*>(block.values) + begin / 4 * C * 64;
    for (int64_t k = begin; k < end; k += 4, weights += C * 64) {
        __builtin_prefetch(weights + 2048);
        if (C > 1) __builtin_prefetch(weights + 2048 + 64);
        if (C > 2) __builtin_prefetch(weights + 2048 + 128);
        if (C > 3) __builtin_prefetch(weights + 2048 + 192);
        for (int m = 0; m < M; ++m)
            for (int c = 0; c < C; ++c)
                sums[m][c] = dot_quads(sums[m][c], weights + c * 64,
                                       x.values + (first + m) * w.columns + k);
    }
    for (int c = 0; c < C; ++c) {
        const Vec scale = load(block.scales + (group * C + c) * LANES);
        for (int m = 0; m < M; ++m) {
            float* total = totals + (m * C + c) * LANES;
            const Vec both = scale * fill(x.scales[(first + m) * groups + group]);
            const Vec so_far = group ? load(total) : fill(0.0f);
            store(total, fma(to_floats(sums[m][c]), both, so_far));
        }
    }
}

template <int C>
static void multiply_int8_tile(const Weight& w, const Block& block, int tokens, const Quantized& x,
                               int64_t first, float* totals) {
    for (int64_t g = 0; g < group_count(w); ++g)
        for (int t = 0; t < tokens; t += MICRO_TOKENS) {
            float* out = totals + t * C * LANES;
            switch (tokens - t) {
                case 1: multiply_int8<1, C>(w, block, g, x, first + t, out); break;
                case 2: multiply_int8<2, C>(w, block, g, x, first + t, out); break;
                case 3: multiply_int8<3, C>(w, block, g, x, first + t, out); break;
                case 4: multiply_int8<4, C>(w, block, g, x, first + t, out); break;
                case 5: multiply_int8<5, C>(w, block, g, x, first + t, out); break;
                default: multiply_int8<6, C>(w, block, g, x, first + t, out);
            }
        }
}

// What a matrix is multiplied by: activations [T, K] and, with OFFSET_INT8 weights, those as INT8.
template <class X>
struct Input {
    const X* x;
    Quantized quantized;
};

// Totals [tokens][chunks][16] of at most TILE_TOKENS tokens, from token `first` on, and one block.
template <class X>
static void multiply_block(const Weight& w, const Block& block, int tokens, const Input<X>& input,
                           int64_t first, float* totals) {
    if (w.kind == OFFSET_INT8) {
        const Quantized& x = input.quantized;
        switch (block.chunks) {
            case 1: return multiply_int8_tile<1>(w, block, tokens, x, first, totals);
            case 2: return multiply_int8_tile<2>(w, block, tokens, x, first, totals);
            case 3: return multiply_int8_tile<3>(w, block, tokens, x, first, totals);
            default: return multiply_int8_tile<4>(w, block, tokens, x, first, totals);
        }
    }
    const X* x = input.x + first * w.columns;
    switch (block.chunks) {
        case 1: return multiply_chunks<X, 1>(w, block, tokens, x, w.columns, totals);
        case 2: return multiply_chunks<X, 2>(w, block, tokens, x, w.columns, totals);
        case 3: return multiply_chunks<X, 3>(w, block, tokens, x, w.columns, totals);
        default: return multiply_chunks<X, 4>(w, block, tokens, x, w.columns, totals);
    }
}

// Make the input of a matrix ready; `room` is for its INT8 form.
template <class X>
static Input<X> prepare(const Weight& w, int64_t tokens, const X* x, void* room, Team& team) {
    Input<X> input{x, {}};
    if (w.kind != OFFSET_INT8) return input;
    const Quantized q = input.quantized = quantized_at(room, tokens, w);
    const int64_t groups = group_count(w);
    team.run(tokens, 1, [&](int64_t t) {
        quantize(w, x + t * w.columns, q.values + t * w.columns, q.scales + t * groups,
                 q.sums + t * groups);
    });
    return input;
}

// For every block of rows and every TILE_TOKENS tokens: done(block, first token, tokens, totals).
template <class X, class Done>
static void multiply_each(const Weight& w, int64_t tokens, const Input<X>& input, Team& team,
                          Done&& done) {
    team.run(block_count(w), 1, [&](int64_t index) {
        alignas(64) float totals[TILE_TOKENS * MAX_CHUNKS * LANES];
        const Block block = block_at(w, index);
        for (int64_t first = 0; first < tokens; first += TILE_TOKENS) {
            const int count = int(tokens - first < TILE_TOKENS ? tokens - first : TILE_TOKENS);
            multiply_block(w, block, count, input, first, totals);
            done(block, first, count, totals);
        }
    });
}

INLINE bool all_finite(const float* x, int64_t count) {
    Vec sum = fill(0.0f);
    for (int64_t i = 0; i < count; i += LANES) sum = sum + (load(x + i) - load(x + i));
    return sum_lanes(sum) == 0.0f;  // NaN where an item is infinite or NaN
}

// out [T, stride] = x [T, K] times the transposed matrix; a task is a block of rows.
template <class X>
static void multiply(const Weight& w, int64_t tokens, const X* x, void* room, float* out,
                     int64_t stride, Team& team, int64_t* broken = nullptr) {
    const Input<X> input = prepare(w, tokens, x, room, team);
    multiply_each(w, tokens, input, team,
                  [&](const Block& block, int64_t first, int count, const float* totals) {
                      if (broken && !all_finite(totals, count * block.chunks * LANES))
                          std::atomic_ref(*broken).store(1, std::memory_order_relaxed);
                      const int64_t left = w.rows - block.first_row, height = block.chunks * LANES;
                      const size_t bytes = size_t(left < height ? left : height) * sizeof(float);
                      for (int t = 0; t < count; ++t)
                          std::memcpy(out + (first + t) * stride + block.first_row,
                                      totals + t * height, bytes);
                  });
}

}  // namespace RL_ISA
}  // namespace roofline
