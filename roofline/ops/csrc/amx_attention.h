// Attention by AMX: what the queries of a tile gather from a span, 128 positions at a time.
//
// Scores are products of tiles in bfloat16. The weights of values are float32; tiles multiply them as
// two bfloat16 numbers, high + low, which is 16 bits of them. Sixteen queries are rows of a tile, and a
// row's bits do not depend on the others. Included by attention.h, of one ISA alone.
#pragma once

#include "amx_linear.h"

#if defined(RL_AMX)
namespace roofline {
namespace RL_ISA {

constexpr int STEP_POSITIONS = 128;  // between which sums are scaled: many, as every stage waits for the one before
constexpr int STEP_TILES = STEP_POSITIONS / TILE_ROWS;
constexpr int CHUNKS_MIXED = 4;  // sixteen channels each, whose tiles are stored before they are added

// Tiles of a step.
struct TileRoom {
    alignas(64) char query[MAX_QUERIES / TILE_ROWS][MAX_HEAD_DIM / 32][TILE_BYTES];
    alignas(64) char keys[MAX_HEAD_DIM / 32][STEP_TILES][TILE_BYTES];  // of sixteen positions, in pairs of channels
    alignas(64) char values[STEP_TILES / 2][MAX_HEAD_DIM / LANES][TILE_BYTES];  // in pairs of positions
    alignas(64) float scores[STEP_TILES / 2][4][TILE_ROWS * LANES];  // of 32 positions: [tiles of queries][2]
    alignas(64) char weights[MAX_QUERIES / TILE_ROWS][STEP_TILES / 2][2][TILE_BYTES];  // high, low
    alignas(64) float mixed[CHUNKS_MIXED][2][TILE_ROWS * LANES];
    float keep[MAX_QUERIES];  // by what earlier sums are multiplied
};

// 32 channels, or the last sixteen and zeros.
INLINE __m512i load_channels(const uint16_t* from, int64_t left) {
    return _mm512_maskz_loadu_epi16(left >= 32 ? 0xffffffffu : 0xffffu, from);
}

// Keys of sixteen positions, of which `count` are there, as tiles B of each 32 channels.
INLINE void key_tiles(const uint16_t* keys, int64_t dim, int count, int index, TileRoom& room) {
    for (int64_t d = 0; d < dim; d += 32) {
        char* tile = room.keys[d / 32][index];
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

INLINE void value_tiles(const uint16_t* values, int64_t dim, int count, int index, TileRoom& room) {
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
            char* to = room.values[index / 2][d / 16] + (index % 2 * LANES + t) / 2 * 64;
            _mm512_store_si512(to, _mm512_permutex2var_epi64(low, first, high));
            if (d + 16 < dim)
                _mm512_store_si512(to + TILE_BYTES, _mm512_permutex2var_epi64(low, second, high));
        }
}

// The largest of sixteen rows' lanes each; what of rows with a NaN is left open.
INLINE Vec largest_of_rows(const Vec (&rows)[LANES]) {
    __m512 a[8], b[4], c[2];
    for (int i = 0; i < 8; ++i) {
        const __m512 x = rows[2 * i].v, y = rows[2 * i + 1].v;
        a[i] = _mm512_max_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
    }
    for (int i = 0; i < 4; ++i) {  // four rows in each 128-bit lane
        const __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
        b[i] = _mm512_max_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    for (int i = 0; i < 2; ++i)
        c[i] = _mm512_max_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
    return {_mm512_max_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd))};
}

// A weight in two bfloat16 numbers, high + low; the low one is never 0 unless the weight is: that times
// an infinite value would not be infinite.
INLINE void store_parts(Vec first, Vec second, char* high, char* low) {
    __m512 upper[2], rest[2];
    const Vec p[2] = {first, second};
    for (int i = 0; i < 2; ++i) {
        const __mmask16 seen = _mm512_cmp_ps_mask(p[i].v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        upper[i] = _mm512_castsi512_ps(
            _mm512_and_si512(_mm512_castps_si512(p[i].v), _mm512_set1_epi32(int(0xffff0000u))));
        rest[i] = _mm512_maskz_max_ps(seen, _mm512_sub_ps(p[i].v, upper[i]), _mm512_set1_ps(1.17549435e-38f));
    }
    _mm512_storeu_si512(high, __m512i(_mm512_cvtne2ps_pbh(upper[1], upper[0])));
    _mm512_storeu_si512(low, __m512i(_mm512_cvtne2ps_pbh(rest[1], rest[0])));
}

// Scores of one tile of queries, `count` of them, at a step's positions become weights: in two parts,
// and in their sums. query(row) sees positions [begin, end). NaN reaches a query's sums by its weight.
template <class Sees>
INLINE void weigh(TileRoom& room, int m, int count, int tiles, Vec scale, Sees&& sees, Gathering& g) {
    const auto scores = [&](int tile, int row) { return room.scores[tile / 2][2 * m + tile % 2] + row * LANES; };
    Vec tops[TILE_ROWS];
    for (int row = 0; row < TILE_ROWS; ++row) tops[row] = fill(-INFINITY);
    for (int row = 0; row < count; ++row) {
        int64_t begin, end;
        sees(row, begin, end);
        for (int tile = 0; tile < tiles; ++tile, begin -= LANES, end -= LANES) {
            Vec score = load(scores(tile, row)) * scale;
            if (begin > 0 || end < LANES)
                score = keep_lanes(score, int(begin > 0 ? begin : 0), int(end < 0 ? 0 : end), -INFINITY);
            store(scores(tile, row), score);
            tops[row] = largest(tops[row], score);
        }
    }
    float* highest = g.highest + m * TILE_ROWS;
    const Vec before = load(highest), higher = largest(before, largest_of_rows(tops));
    const __mmask16 some = _mm512_cmp_ps_mask(higher.v, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
    const Vec base{_mm512_maskz_mov_ps(some, higher.v)};  // 0 where all is masked, so that weights are
    alignas(64) float bases[LANES];
    store(bases, base);
    store(highest, higher);
    store(room.keep + m * TILE_ROWS, exponential(before - base));
    for (int row = 0; row < count; ++row) {
        float* weight = g.weight + (m * TILE_ROWS + row) * LANES;
        const Vec lowered = fill(bases[row]);
        Vec sum = load(weight) * fill(room.keep[m * TILE_ROWS + row]);
        for (int tile = 0; tile < tiles; tile += 2) {
            const Vec p = exponential(load(scores(tile, row)) - lowered);
            const Vec q = exponential(load(scores(tile + 1, row)) - lowered);
            sum = sum + (p + q);
            store_parts(p, q, room.weights[m][tile / 2][0] + row * 64, room.weights[m][tile / 2][1] + row * 64);
        }
        store(weight, sum);
    }
}

// Scores of M tiles of queries.
template <int M>
INLINE void score_tiles(TileRoom& room, int64_t blocks, int tiles) {
    for (int tile = 0; tile < tiles; tile += 2) {
        auto* scores = room.scores[tile / 2];
        begin_sums<M, 2>(true, scores);
        add_products<M, 2>(room.query[0][0], room.query[M - 1][0], TILE_BYTES, room.keys[0][tile],
                           STEP_TILES * TILE_BYTES, blocks, [] {});
        store_sums<M, 2>(scores);
    }
}

// Weights times values, `chunks` times sixteen channels from `first` on.
template <int M>
INLINE void mix_tiles(TileRoom& room, int first, int chunks, int tiles) {
    for (int c = 0; c < chunks; ++c) {
        RL_TILE_ZERO(0);
        if constexpr (M == 2) RL_TILE_ZERO(1);
        for (int i = 0; i < tiles / 2; ++i) {
            RL_TILE_LOAD(6, room.values[i][first + c], 64);
            RL_TILE_LOAD(4, room.weights[0][i][0], 64);
            RL_TILE_DOT(RL_BF16, 0, 4, 6);
            if constexpr (M == 2) {
                RL_TILE_LOAD(5, room.weights[1][i][0], 64);
                RL_TILE_DOT(RL_BF16, 1, 5, 6);
            }
            RL_TILE_LOAD(4, room.weights[0][i][1], 64);
            RL_TILE_DOT(RL_BF16, 0, 4, 6);
            if constexpr (M == 2) {
                RL_TILE_LOAD(5, room.weights[1][i][1], 64);
                RL_TILE_DOT(RL_BF16, 1, 5, 6);
            }
        }
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
    for (int64_t q = queries; q < MAX_QUERIES; ++q) g.highest[q] = -INFINITY;
    TileRoom room;
    for (int64_t q = 0; q < ceil_div(queries, TILE_ROWS) * TILE_ROWS; ++q) {
        const uint16_t* own = static_cast<const uint16_t*>(a.query) +
                              ((tile.token + q / shared) * a.heads + kv_head * shared + q % shared) * dim;
        for (int64_t d = 0; d < dim; d += 32)
            _mm512_store_si512(room.query[q / TILE_ROWS][d / 32] + q % TILE_ROWS * 64,
                               q < queries ? load_channels(own + d, dim - d) : _mm512_setzero_si512());
    }
    if (queries % TILE_ROWS) std::memset(room.weights[queries / TILE_ROWS], 0, sizeof room.weights[0]);  // nobody's
    const auto page = [&](int64_t place) {  // where sixteen positions lie in keys and values
        const int64_t block = a.block_table[tile.row * a.table_width + place / a.block_tokens];
        return ((block * a.kv_heads + kv_head) * a.block_tokens + place % a.block_tokens) * dim;
    };
    const auto* keys = static_cast<const uint16_t*>(a.keys);
    const auto* values = static_cast<const uint16_t*>(a.values);
    const TilesInUse tiles(TILE_ROWS);
    for (int64_t place = begins; place < ends; place += STEP_POSITIONS) {
        const int64_t left = ends - place < STEP_POSITIONS ? ends - place : STEP_POSITIONS;
        const int used = int(ceil_div(left, 2 * LANES)) * 2;  // tiles, in pairs
        for (int i = 0; i < used; ++i) {
            const int64_t from = place + i * LANES, there = context - from;
            const int count = int(there < 0 ? 0 : there < LANES ? there : LANES);
            const int64_t at = count ? page(from) : 0;
            key_tiles(keys + at, dim, count, i, room);
            value_tiles(values + at, dim, count, i, room);
            if (queries <= TILE_ROWS && from + 2 * LANES < ends) {  // pages are too short for the machine to see what comes next
                const int64_t next = page(from + 2 * LANES);
                for (int64_t k = 0; k < LANES * dim; k += 32) {
                    __builtin_prefetch(keys + next + k);
                    __builtin_prefetch(values + next + k);
                }
            }
        }
        const bool two = queries > TILE_ROWS;
        if (two) score_tiles<2>(room, blocks, used);
        else score_tiles<1>(room, blocks, used);
        for (int m = 0; m * TILE_ROWS < queries; ++m) {
            const int64_t query = m * TILE_ROWS, count = queries - query < TILE_ROWS ? queries - query : TILE_ROWS;
            const auto sees = [&](int row, int64_t& begin, int64_t& end) {
                const int64_t own = tile.position + (query + row) / shared;
                begin = a.window ? own - a.window + 1 - place : 0, end = own + 1 - place;
            };
            weigh(room, m, int(count), used, scale, sees, g);
        }
        for (int first = 0; first < dim / LANES; first += CHUNKS_MIXED) {
            const int left = int(dim / LANES) - first, chunks = left < CHUNKS_MIXED ? left : CHUNKS_MIXED;
            if (two) mix_tiles<2>(room, first, chunks, used);
            else mix_tiles<1>(room, first, chunks, used);
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
