// Causal attention over the paged KV pool, for any mix of prompt and decode rows.
//
// A tile is a few tokens of one row with the query heads of one KV head. Sixteen positions are the
// SIMD lanes of scores, the head's channels those of the result. The context is cut into spans at
// fixed positions; in a span positions are walked in order with an online softmax (Dao et al. 2022),
// and what spans bring is merged in their order, whoever worked on them. So a query's bits depend on
// its own context only, and a long context keeps all threads busy.
#pragma once

#include "linear.h"

namespace roofline {
namespace RL_ISA {

constexpr int MAX_QUERIES = 32;  // query heads times tokens of a task
constexpr int MAX_HEAD_DIM = 256;
constexpr int64_t SPAN = 256;  // positions

// Keys of sixteen positions as a panel whose lanes are positions; beyond `count` zeros.
template <class X>
static void key_panel(const X* keys, int64_t dim, int count, typename Panel<X>::Item* panel) {
    using P = Panel<X>;
    for (int t = 0; t < LANES; ++t)
        for (int64_t d = 0; d < dim; d += P::step)
            for (int i = 0; i < P::step; ++i) {
                typename P::Item* to = panel + d * LANES + P::step * t + i;
                if constexpr (sizeof(typename P::Item) == sizeof(X)) {
                    *to = t < count ? keys[t * dim + d + i] : X(0);
                } else {
                    *to = t < count ? bf16_to_float(keys[t * dim + d + i]) : 0.0f;
                }
            }
}

#if defined(__AVX512F__)
// The transpose of sixteen rows of sixteen 32-bit items: rows `from` items of `stride` bytes apart.
INLINE void transpose(const char* from, int64_t stride, char* to) {
    __m512i r[16], s[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * stride);
    for (int i = 0; i < 16; i += 2) {
        s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(s[i + j], s[i + 2 + j]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(s[i + j], s[i + 2 + j]);
        }
    for (int i = 0; i < 4; ++i) {  // r[4 q + i]: column i of each 128-bit lane, rows 4 q to 4 q + 3
        s[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        s[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        s[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        s[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        _mm512_storeu_si512(to + 64 * i, _mm512_shuffle_i32x4(s[i], s[8 + i], 0x88));
        _mm512_storeu_si512(to + 64 * (8 + i), _mm512_shuffle_i32x4(s[i], s[8 + i], 0xdd));
        _mm512_storeu_si512(to + 64 * (4 + i), _mm512_shuffle_i32x4(s[4 + i], s[12 + i], 0x88));
        _mm512_storeu_si512(to + 64 * (12 + i), _mm512_shuffle_i32x4(s[4 + i], s[12 + i], 0xdd));
    }
}
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
// The transpose of eight rows of eight 32-bit items, rows `stride` bytes apart.
INLINE void transpose(const char* from, int64_t stride, __m256i columns[8]) {
    __m256i r[8], s[8];
    for (int i = 0; i < 8; ++i)
        r[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i * stride));
    for (int i = 0; i < 8; i += 2) {
        s[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        s[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = _mm256_unpacklo_epi64(s[i + j], s[i + 2 + j]);
            r[i + 2 * j + 1] = _mm256_unpackhi_epi64(s[i + j], s[i + 2 + j]);
        }
    for (int i = 0; i < 4; ++i) {  // r[4 q + i]: column i of each 128-bit lane, rows 4 q to 4 q + 3
        columns[i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x20);
        columns[4 + i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x31);
    }
}

// The panel of float lanes from sixteen rows of keys; eight items of 32 bits at a time.
template <class X>
INLINE void float_panel(const X* keys, int64_t dim, float* panel) {
    const int64_t stride = dim * int64_t(sizeof(X));
    const __m256i upper = _mm256_set1_epi32(int(0xffff0000u));
    __m256i columns[8];
    for (int half = 0; half < 2; ++half)
        for (int64_t d = 0; d < dim; d += 32 / int64_t(sizeof(X))) {
            float* to = panel + d * LANES + 8 * half;
            const auto put = [&](int64_t column, __m256i bits) {
                _mm256_storeu_ps(to + column * LANES, _mm256_castsi256_ps(bits));
            };
            transpose(reinterpret_cast<const char*>(keys + 8 * half * dim + d), stride, columns);
            for (int i = 0; i < 8; ++i) {
                if constexpr (sizeof(X) == 4) {
                    put(i, columns[i]);
                } else {  // two bfloat16 columns
                    put(2 * i, _mm256_slli_epi32(columns[i], 16));
                    put(2 * i + 1, _mm256_and_si256(columns[i], upper));
                }
            }
        }
}
#endif

template <class X>
static void whole_key_panel(const X* keys, int64_t dim, typename Panel<X>::Item* panel) {
#if defined(__AVX512F__)
    constexpr int64_t items = 4 / sizeof(X);  // of a 32-bit item
    if constexpr (sizeof(typename Panel<X>::Item) == sizeof(X)) {
        int64_t d = 0;
        for (; d + 16 * items <= dim; d += 16 * items)
            transpose(reinterpret_cast<const char*>(keys + d), dim * int64_t(sizeof(X)),
                      reinterpret_cast<char*>(panel + d * LANES));
        if (d == dim) return;
    } else {
        alignas(64) uint32_t pairs[LANES * LANES];
        const __m512i upper = _mm512_set1_epi32(int(0xffff0000u));
        int64_t d = 0;
        for (; d + 32 <= dim; d += 32) {  // two bfloat16 channels an item
            transpose(reinterpret_cast<const char*>(keys + d), dim * 2, reinterpret_cast<char*>(pairs));
            for (int i = 0; i < LANES; ++i) {
                const __m512i pair = _mm512_load_si512(pairs + i * LANES);
                float* to = panel + (d + 2 * i) * LANES;
                _mm512_storeu_si512(to, _mm512_slli_epi32(pair, 16));
                _mm512_storeu_si512(to + LANES, _mm512_and_si512(pair, upper));
            }
        }
        if (d == dim) return;
    }
#elif defined(__AVX2__)
    float_panel(keys, dim, panel);
    return;
#endif
    key_panel(keys, dim, LANES, panel);
}

// What the queries of a tile have gathered from some of their context.
struct Gathering {
    float highest[MAX_QUERIES];                           // of the scores
    alignas(64) float weight[MAX_QUERIES * LANES];        // sum of exp(score - highest), by lane
    alignas(64) float mixed[MAX_QUERIES * MAX_HEAD_DIM];  // the same times the values

    void clear(int64_t queries, int64_t dim) {
        for (int64_t q = 0; q < queries; ++q) {
            highest[q] = -INFINITY;
            store(weight + q * LANES, fill(0.0f));
            std::memset(mixed + q * MAX_HEAD_DIM, 0, size_t(dim) * sizeof(float));
        }
    }
};

// Scores of N queries at sixteen positions.
template <class X, int N>
INLINE void score(const typename Panel<X>::Item* panel, int64_t dim,
                  const typename Panel<X>::Item* const* queries, Vec scale, float* scores) {
    using P = Panel<X>;
    Vec sum[N];
    for (int n = 0; n < N; ++n) sum[n] = fill(0.0f);
    for (int64_t d = 0; d < dim; d += P::step)
        for (int n = 0; n < N; ++n)
            sum[n] = P::multiply(panel + d * LANES, P::multiplier(queries[n] + d), sum[n]);
    for (int n = 0; n < N; ++n) store(scores + n * LANES, sum[n] * scale);
}

// Take sixteen positions into one query's sums. `values` is [16, dim] float32.
static INLINE void gather(const float* scores, const float* values, int64_t dim, float& highest,
                          float* weight, float* mixed) {
    const Vec s = load(scores);
    const float top = largest_lane(s);
    if (top == -INFINITY) return;  // all masked
    const float higher = top > highest || top != top ? top : highest;
    const Vec p = exponential(s - fill(higher));
    Vec keep = fill(0.0f);
    if (highest != -INFINITY) keep = exponential(fill(highest - higher));
    highest = higher;
    store(weight, fma(load(weight), keep, p));
    alignas(64) float each[LANES];
    store(each, p);
    for (int64_t d = 0; d < dim; d += LANES) {
        Vec sum = load(mixed + d) * keep;
        for (int t = 0; t < LANES; ++t) sum = fma(fill(each[t]), load(values + t * dim + d), sum);
        store(mixed + d, sum);
    }
}

// Merge what a later span brought one query into its sums.
static INLINE void merge(float later, const float* later_weight, const float* later_mixed, int64_t dim,
                         float& highest, float* weight, float* mixed) {
    if (later == -INFINITY) return;  // it saw nothing there
    const float higher = later > highest || later != later ? later : highest;
    const Vec take = exponential(fill(later - higher));
    Vec keep = fill(0.0f);
    if (highest != -INFINITY) keep = exponential(fill(highest - higher));
    highest = higher;
    store(weight, fma(load(weight), keep, load(later_weight) * take));
    for (int64_t d = 0; d < dim; d += LANES)
        store(mixed + d, fma(load(mixed + d), keep, load(later_mixed + d) * take));
}

// Tokens of one row whose context is walked together, and the spans that any of them sees.
struct QueryTile {
    int64_t row, token;  // the first, in the step
    int64_t tokens, position, first_span, spans;
};

// The tiles of a step in their order.
class Tiles {
  public:
    explicit Tiles(const Attention& a) : a_(a), size_(MAX_QUERIES / (a.heads / a.kv_heads)) {}

    bool next(QueryTile& tile) {
        first_ += size_;
        while (first_ >= count_) {
            if (++row_ == a_.step->rows) return false;
            first_ = 0;
            count_ = a_.query_start[row_ + 1] - a_.query_start[row_];
        }
        tile.row = row_;
        tile.token = a_.query_start[row_] + first_;
        tile.tokens = count_ - first_ < size_ ? count_ - first_ : size_;
        tile.position = a_.context_len[row_] - count_ + first_;
        const int64_t seen = a_.window ? tile.position - a_.window + 1 : 0;
        tile.first_span = (seen > 0 ? seen : 0) / SPAN;
        tile.spans = (tile.position + tile.tokens - 1) / SPAN - tile.first_span + 1;
        return true;
    }

  private:
    const Attention& a_;
    const int64_t size_;
    int64_t row_ = -1, first_ = 0, count_ = 0;
};

}  // namespace RL_ISA
}  // namespace roofline

#include "amx_attention.h"

namespace roofline {
namespace RL_ISA {

// What a tile's queries gather from one span.
template <class X>
static void attend(const Attention& a, const QueryTile& tile, int64_t kv_head, int64_t span, Gathering& g) {
#if defined(RL_AMX)
    if constexpr (sizeof(X) == 2) return attend_tiles(a, tile, kv_head, span, g);
#endif
    using P = Panel<X>;
    const int64_t dim = a.head_dim, shared = a.heads / a.kv_heads, queries = tile.tokens * shared;
    const int64_t context = a.context_len[tile.row], last = tile.position + tile.tokens - 1;
    const int64_t seen = a.window ? tile.position - a.window + 1 : 0;  // the first position anyone sees
    const int64_t begins = seen > span * SPAN ? seen / LANES * LANES : span * SPAN;
    const int64_t ends = last + 1 < (span + 1) * SPAN ? last + 1 : (span + 1) * SPAN;
    const Vec scale = fill(float(a.scale));
    g.clear(queries, dim);
    using Item = typename P::Item;
    const Item* query[MAX_QUERIES];
    alignas(64) float widened[sizeof(Item) == sizeof(X) ? 1 : MAX_QUERIES * MAX_HEAD_DIM];
    for (int64_t q = 0; q < queries; ++q) {
        const X* own = static_cast<const X*>(a.query) +
                       ((tile.token + q / shared) * a.heads + kv_head * shared + q % shared) * dim;
        if constexpr (sizeof(Item) == sizeof(X)) {
            query[q] = own;
        } else {
            query[q] = widened + q * MAX_HEAD_DIM;
            for (int64_t d = 0; d < dim; d += LANES) store(widened + q * MAX_HEAD_DIM + d, load(own + d));
        }
    }
    const auto page = [&](int64_t place) {  // where sixteen positions lie in keys and values
        const int64_t block = a.block_table[tile.row * a.table_width + place / a.block_tokens];
        return ((block * a.kv_heads + kv_head) * a.block_tokens + place % a.block_tokens) * dim;
    };
    alignas(64) typename P::Item panel[MAX_HEAD_DIM * LANES];
    alignas(64) float values[LANES * MAX_HEAD_DIM], scores[MAX_QUERIES * LANES];
    int64_t at = page(begins);
    for (int64_t place = begins; place < ends; place += LANES) {
        const int count = int(context - place < LANES ? context - place : LANES);
        const X* keys = static_cast<const X*>(a.keys) + at;
        const X* paged = static_cast<const X*>(a.values) + at;
        if (place + LANES < ends) {  // pages are too short for the machine to see what comes next
            at = page(place + LANES);
            for (int64_t i = 0; i < LANES * dim; i += 64 / int64_t(sizeof(X))) {
                __builtin_prefetch(static_cast<const X*>(a.keys) + at + i);
                __builtin_prefetch(static_cast<const X*>(a.values) + at + i);
            }
        }
        if (count == LANES) whole_key_panel(keys, dim, panel);
        else key_panel(keys, dim, count, panel);
        for (int64_t i = 0; i < count * dim; i += LANES) store(values + i, load(paged + i));
        if (count < LANES)
            std::memset(values + count * dim, 0, size_t(LANES - count) * size_t(dim) * sizeof(float));
        int64_t q = 0;
        for (; q + 4 <= queries; q += 4) score<X, 4>(panel, dim, query + q, scale, scores + q * LANES);
        if (q + 3 == queries) score<X, 3>(panel, dim, query + q, scale, scores + q * LANES), q += 3;
        for (; q < queries; ++q) score<X, 1>(panel, dim, query + q, scale, scores + q * LANES);
        for (q = 0; q < queries; ++q) {
            const int64_t own = tile.position + q / shared;
            const int64_t begin = a.window ? own - a.window + 1 - place : 0, end = own + 1 - place;
            float* s = scores + q * LANES;
            if (begin > 0 || end < LANES)
                store(s, keep_lanes(load(s), int(begin > 0 ? begin : 0), int(end < 0 ? 0 : end),
                                    -INFINITY));
            gather(s, values, dim, g.highest[q], g.weight + q * LANES, g.mixed + q * MAX_HEAD_DIM);
        }
    }
}

// The result of a tile's queries.
template <class X>
static void finish(const Attention& a, const QueryTile& tile, int64_t kv_head, const Gathering& g) {
    const int64_t dim = a.head_dim, shared = a.heads / a.kv_heads;
    for (int64_t q = 0; q < tile.tokens * shared; ++q) {
        const int64_t token = tile.token + q / shared, head = kv_head * shared + q % shared;
        X* out = static_cast<X*>(a.out) + (token * a.heads + head) * dim;
        const Vec total = fill(sum_lanes(load(g.weight + q * LANES)));
        for (int64_t d = 0; d < dim; d += LANES)
            store(out + d, load(g.mixed + q * MAX_HEAD_DIM + d) / total);
    }
}

// What one query gathers from one span, in memory: values, weights, and the highest score.
static int64_t partial_size(const Attention& a) { return a.head_dim + 2 * LANES; }

static void keep_partial(const Attention& a, int64_t queries, const Gathering& g, float* partial) {
    for (int64_t q = 0; q < queries; ++q, partial += partial_size(a)) {
        std::memcpy(partial, g.mixed + q * MAX_HEAD_DIM, size_t(a.head_dim) * sizeof(float));
        std::memcpy(partial + a.head_dim, g.weight + q * LANES, LANES * sizeof(float));
        partial[a.head_dim + LANES] = g.highest[q];
    }
}

static void merge_partial(const Attention& a, int64_t queries, const float* partial, Gathering& g) {
    for (int64_t q = 0; q < queries; ++q, partial += partial_size(a))
        merge(partial[a.head_dim + LANES], partial + a.head_dim, partial, a.head_dim, g.highest[q],
              g.weight + q * LANES, g.mixed + q * MAX_HEAD_DIM);
}

template <class X>
static void attention(const void* arguments, Team& team) {
    const Attention& a = *static_cast<const Attention*>(arguments);
    const int64_t shared = a.heads / a.kv_heads;
    // Floats that a tile's spans take where they are tasks of their own.
    const auto room = [&](const QueryTile& tile) {
        return tile.spans > 1 ? tile.spans * tile.tokens * a.heads * partial_size(a) : 0;
    };
    QueryTile tile{};
    int64_t tiles = 0, spans = 0, values = 0;
    for (Tiles each(a); each.next(tile); ++tiles) spans += tile.spans, values += room(tile);
    const bool apart = spans > tiles && values <= a.partial_values;

    Tiles each(a);
    int64_t before = 0, here = 0;  // tasks of earlier tiles, and of this one
    float* partial = a.partial;    // of this tile
    team.run((apart ? spans : tiles) * a.kv_heads, 1, [&](int64_t task) {  // a thread's tasks rise
        while (task >= before + here) {
            if (here) partial += room(tile);
            before += here;
            each.next(tile);
            here = (apart ? tile.spans : 1) * a.kv_heads;
        }
        const int64_t span = (task - before) / a.kv_heads, kv_head = (task - before) % a.kv_heads;
        const int64_t queries = tile.tokens * shared;
        Gathering g, sum;
        attend<X>(a, tile, kv_head, tile.first_span + span, g);
        if (apart && tile.spans > 1) {
            keep_partial(a, queries, g, partial + (task - before) * queries * partial_size(a));
            return;
        }
        if (tile.spans == 1) {
            finish<X>(a, tile, kv_head, g);
            return;
        }
        sum.clear(queries, a.head_dim);
        for (int64_t next = 1;; ++next) {
            for (int64_t q = 0; q < queries; ++q)
                merge(g.highest[q], g.weight + q * LANES, g.mixed + q * MAX_HEAD_DIM, a.head_dim,
                      sum.highest[q], sum.weight + q * LANES, sum.mixed + q * MAX_HEAD_DIM);
            if (next == tile.spans) break;
            attend<X>(a, tile, kv_head, tile.first_span + next, g);
        }
        finish<X>(a, tile, kv_head, sum);
    });
    if (!apart) return;

    Tiles again(a);
    partial = a.partial;
    before = here = 0;
    team.run(tiles * a.kv_heads, 1, [&](int64_t task) {
        while (task >= before + here) {
            if (here) partial += room(tile);
            before += here;
            again.next(tile);
            here = a.kv_heads;
        }
        if (tile.spans == 1) return;  // it is finished
        const int64_t queries = tile.tokens * shared, kv_head = task - before;
        Gathering sum;
        sum.clear(queries, a.head_dim);
        for (int64_t span = 0; span < tile.spans; ++span) {
            const int64_t place = (span * a.kv_heads + kv_head) * queries * partial_size(a);
            merge_partial(a, queries, partial + place, sum);
        }
        finish<X>(a, tile, kv_head, sum);
    });
}

}  // namespace RL_ISA
}  // namespace roofline
