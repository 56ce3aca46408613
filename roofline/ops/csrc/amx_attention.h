// Attention by AMX: what the queries of a tile gather from a span, 32 positions at a time.
//
// Scores are products of tiles in bfloat16. The weights of values are float32; tiles multiply them as
// two bfloat16 numbers, high + low, which is 16 bits of them. Sixteen queries are rows of a tile, and a
// row's bits do not depend on the others. Included by attention.h, of one ISA alone.
#pragma once

#include "amx_linear.h"

#if defined(RL_AMX)
namespace roofline {
namespace RL_ISA {

constexpr int STEP_POSITIONS = 32;
constexpr int CHUNKS_MIXED = 4;  // sixteen channels each, whose tiles are stored before they are added

// Tiles of a step.
struct TileRoom {
    alignas(64) char query[MAX_QUERIES / TILE_ROWS][MAX_HEAD_DIM / 32][TILE_BYTES];
    alignas(64) char keys[MAX_HEAD_DIM / 32][2][TILE_BYTES];  // of sixteen positions, in pairs of channels
    alignas(64) char values[MAX_HEAD_DIM / LANES][TILE_BYTES];  // of sixteen channels, in pairs of positions
    alignas(64) float scores[4][TILE_ROWS * LANES];             // [tiles of queries][16 positions]
    alignas(64) char weights[MAX_QUERIES / TILE_ROWS][2][TILE_BYTES];  // high, low
    alignas(64) float mixed[CHUNKS_MIXED][2][TILE_ROWS * LANES];
    float keep[MAX_QUERIES];  // by what earlier sums are multiplied
};

// 32 channels, or the last sixteen and zeros.
INLINE __m512i load_channels(const uint16_t* from, int64_t left) {
    return _mm512_maskz_loadu_epi16(left >= 32 ? 0xffffffffu : 0xffffu, from);
}

// Keys of sixteen positions, of which `count` are there, as tiles B: [blocks of 32 channels][half].
INLINE void key_tiles(const uint16_t* keys, int64_t dim, int count, int half, TileRoom& room) {
    for (int64_t d = 0; d < dim; d += 32) {
        char* tile = room.keys[d / 32][half];
        if (count == LANES && d + 32 <= dim) {
            transpose(reinterpret_cast<const char*>(keys + d), dim * 2, tile);
            continue;
        }
        alignas(64) char rows[TILE_BYTES];
        for (int t = 0; t < LANES; ++t)
            _mm512_store_si512(rows + 64 * t, t < count ? load_channels(keys + t * dim + d, dim - d)
                                                        : _mm512_setzero_si512());
        transpose(rows, 64, tile);
    }
}

INLINE void value_tiles(const uint16_t* values, int64_t dim, int count, int half, TileRoom& room) {
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int t = 0; t < LANES; t += 2)
        for (int64_t d = 0; d < dim; d += 32) {
            const auto row = [&](int position) INLINED {
                return position < count ? load_channels(values + position * dim + d, dim - d)
                                        : _mm512_setzero_si512();
            };
            const __m512i even = row(t), odd = row(t + 1);
            const __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
            const int64_t place = (half * LANES + t) / 2 * 64;
            _mm512_store_si512(room.values[d / 16] + place, _mm512_permutex2var_epi64(low, first, high));
            if (d + 16 < dim)
                _mm512_store_si512(room.values[d / 16 + 1] + place, _mm512_permutex2var_epi64(low, second, high));
        }
}

// The scores of one query at 32 positions, of which it sees [begin, end), become weights: in two
// parts, and in sums. By what its earlier sums are to be multiplied.
INLINE float weigh(const float* low_scores, const float* high_scores, Vec scale, int64_t begin, int64_t end,
                   float& highest, float* weight, char* high_part, char* low_part) {
    Vec low = load(low_scores) * scale, high = load(high_scores) * scale;
    if (begin > 0 || end < STEP_POSITIONS) {
        const int from = int(begin > 0 ? begin : 0), to = int(end < 0 ? 0 : end);
        low = keep_lanes(low, from, to, -INFINITY);
        high = keep_lanes(high, from - LANES, to - LANES, -INFINITY);
    }
    const bool broken = _mm512_cmp_ps_mask(low.v, high.v, _CMP_UNORD_Q) != 0;
    const float top = broken ? NAN : _mm512_reduce_max_ps(_mm512_max_ps(low.v, high.v));
    if (top == -INFINITY) {  // all masked
        _mm512_storeu_si512(high_part, _mm512_setzero_si512());
        _mm512_storeu_si512(low_part, _mm512_setzero_si512());
        return 1.0f;
    }
    const float higher = top > highest || top != top ? top : highest;
    const Vec p[2] = {exponential(low - fill(higher)), exponential(high - fill(higher))};
    float keep = 0.0f;
    if (highest == higher) keep = 1.0f;
    else if (highest != -INFINITY) keep = _mm512_cvtss_f32(exponential(fill(highest - higher)).v);
    highest = higher;
    store(weight, fma(load(weight), fill(keep), p[0] + p[1]));
    __m512 upper[2], rest[2];
    for (int i = 0; i < 2; ++i) {
        const __mmask16 seen = _mm512_cmp_ps_mask(p[i].v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        upper[i] = _mm512_castsi512_ps(
            _mm512_and_si512(_mm512_castps_si512(p[i].v), _mm512_set1_epi32(int(0xffff0000u))));
        // A weight's low part is never 0: that times an infinite value would not be infinite.
        rest[i] = _mm512_mask_max_ps(_mm512_setzero_ps(), seen, _mm512_sub_ps(p[i].v, upper[i]),
                                     _mm512_set1_ps(1.17549435e-38f));
    }
    _mm512_storeu_si512(high_part, __m512i(_mm512_cvtne2ps_pbh(upper[1], upper[0])));
    _mm512_storeu_si512(low_part, __m512i(_mm512_cvtne2ps_pbh(rest[1], rest[0])));
    return keep;
}

// Scores of M tiles of queries: a step's 32 positions.
template <int M>
INLINE void score_tiles(TileRoom& room, int64_t blocks) {
    begin_sums<M, 2>(true, room.scores);
    add_products<M, 2>(room.query[0][0], room.query[M - 1][0], TILE_BYTES, room.keys[0][0], 2 * TILE_BYTES, blocks);
    store_sums<M, 2>(room.scores);
}

// Weights times values, `chunks` times sixteen channels from `first` on.
template <int M>
INLINE void mix_tiles(TileRoom& room, int first, int chunks) {
    for (int c = 0; c < chunks; ++c) {
        RL_TILE_ZERO(0);
        if constexpr (M == 2) RL_TILE_ZERO(1);
        RL_TILE_LOAD(6, room.values[first + c], 64);
        RL_TILE_DOT(RL_BF16, 0, 2, 6);
        if constexpr (M == 2) RL_TILE_DOT(RL_BF16, 1, 4, 6);
        RL_TILE_DOT(RL_BF16, 0, 3, 6);
        if constexpr (M == 2) RL_TILE_DOT(RL_BF16, 1, 5, 6);
        RL_TILE_STORE(0, room.mixed[c][0], 64);
        if constexpr (M == 2) RL_TILE_STORE(1, room.mixed[c][1], 64);
    }
}

// What a tile's queries gather from one span.
static void attend_tiles(const Attention& a, const QueryTile& tile, int64_t kv_head, int64_t span, Gathering& g) {
    const int64_t dim = a.head_dim, shared = a.heads / a.kv_heads, queries = tile.tokens * shared;
    const int64_t context = a.context_len[tile.row], last = tile.position + tile.tokens - 1;
    const int64_t seen = a.window ? tile.position - a.window + 1 : 0;  // the first position anyone sees
    const int64_t begins = seen > span * SPAN ? seen / STEP_POSITIONS * STEP_POSITIONS : span * SPAN;
    const int64_t ends = last + 1 < (span + 1) * SPAN ? last + 1 : (span + 1) * SPAN;
    const int64_t blocks = ceil_div(dim, 32);
    const Vec scale = fill(float(a.scale));
    g.clear(queries, dim);
    TileRoom room;
    for (int64_t q = 0; q < ceil_div(queries, TILE_ROWS) * TILE_ROWS; ++q) {
        const uint16_t* own = static_cast<const uint16_t*>(a.query) +
                              ((tile.token + q / shared) * a.heads + kv_head * shared + q % shared) * dim;
        for (int64_t d = 0; d < dim; d += 32)
            _mm512_store_si512(room.query[q / TILE_ROWS][d / 32] + q % TILE_ROWS * 64,
                               q < queries ? load_channels(own + d, dim - d) : _mm512_setzero_si512());
        if (q >= queries) {  // nobody's weights
            _mm512_store_si512(room.weights[q / TILE_ROWS][0] + q % TILE_ROWS * 64, _mm512_setzero_si512());
            _mm512_store_si512(room.weights[q / TILE_ROWS][1] + q % TILE_ROWS * 64, _mm512_setzero_si512());
        }
    }
    const auto page = [&](int64_t place) {  // where sixteen positions lie in keys and values
        const int64_t block = a.block_table[tile.row * a.table_width + place / a.block_tokens];
        return ((block * a.kv_heads + kv_head) * a.block_tokens + place % a.block_tokens) * dim;
    };
    const auto* keys = static_cast<const uint16_t*>(a.keys);
    const auto* values = static_cast<const uint16_t*>(a.values);
    const TilesInUse tiles(TILE_ROWS);
    for (int64_t place = begins; place < ends; place += STEP_POSITIONS) {
        for (int half = 0; half < 2; ++half) {
            const int64_t from = place + half * LANES, left = context - from;
            const int count = int(left < 0 ? 0 : left < LANES ? left : LANES);
            const int64_t at = count ? page(from) : 0;
            key_tiles(keys + at, dim, count, half, room);
            value_tiles(values + at, dim, count, half, room);
            if (from + STEP_POSITIONS < ends) {  // pages are too short for the machine to see what comes next
                const int64_t next = page(from + STEP_POSITIONS);
                for (int64_t i = 0; i < LANES * dim; i += 32) {
                    __builtin_prefetch(keys + next + i);
                    __builtin_prefetch(values + next + i);
                }
            }
        }
        const bool two = queries > TILE_ROWS;
        if (two) score_tiles<2>(room, blocks);
        else score_tiles<1>(room, blocks);
        for (int64_t q = 0; q < queries; ++q) {
            const int64_t own = tile.position + q / shared, m = q / TILE_ROWS, row = q % TILE_ROWS;
            room.keep[q] = weigh(room.scores[2 * m] + row * LANES, room.scores[2 * m + 1] + row * LANES, scale,
                                 a.window ? own - a.window + 1 - place : 0, own + 1 - place, g.highest[q],
                                 g.weight + q * LANES, room.weights[m][0] + row * 64, room.weights[m][1] + row * 64);
        }
        RL_TILE_LOAD(2, room.weights[0][0], 64);
        RL_TILE_LOAD(3, room.weights[0][1], 64);
        if (two) RL_TILE_LOAD(4, room.weights[1][0], 64);
        if (two) RL_TILE_LOAD(5, room.weights[1][1], 64);
        for (int first = 0; first < dim / LANES; first += CHUNKS_MIXED) {
            const int left = int(dim / LANES) - first, chunks = left < CHUNKS_MIXED ? left : CHUNKS_MIXED;
            if (two) mix_tiles<2>(room, first, chunks);
            else mix_tiles<1>(room, first, chunks);
            for (int64_t q = 0; q < queries; ++q) {
                const Vec keep = fill(room.keep[q]);
                float* mixed = g.mixed + q * MAX_HEAD_DIM + first * LANES;
                for (int c = 0; c < chunks; ++c)
                    store(mixed + c * LANES, fma(load(mixed + c * LANES), keep,
                                                 load(room.mixed[c][q / TILE_ROWS] + q % TILE_ROWS * LANES)));
            }
        }
    }
}

}  // namespace RL_ISA
}  // namespace roofline
#endif
