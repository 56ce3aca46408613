// Causal attention over the paged KV pool, for any mix of prompt and decode rows.
//
// A task is a few tokens of one row with the query heads of one KV head. Sixteen positions are the
// SIMD lanes of scores, the head's channels those of the result; positions are walked in order with
// an online softmax (Dao et al. 2022), so that a query's bits depend on its own context only.
#pragma once

#include "linear.h"

namespace roofline {
namespace RL_ISA {

constexpr int MAX_QUERIES = 32;  // query heads times tokens of a task
constexpr int MAX_HEAD_DIM = 256;

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
    }
#endif
    key_panel(keys, dim, LANES, panel);
}

// The queries of a task and what they have gathered so far.
struct Gathering {
    float highest[MAX_QUERIES];                       // of the scores so far
    alignas(64) float weight[MAX_QUERIES * LANES];    // sum of exp(score - highest), by lane
    alignas(64) float mixed[MAX_QUERIES * MAX_HEAD_DIM];  // the same times the values
};

// Scores of N queries at sixteen positions.
template <class X, int N>
INLINE void score(const typename Panel<X>::Item* panel, int64_t dim, const X* const* queries,
                  Vec scale, float* scores) {
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

template <class X>
static void attend(const Attention& a, int64_t row, int64_t first, int tokens, int64_t kv_head) {
    using P = Panel<X>;
    const int64_t dim = a.head_dim, shared = a.heads / a.kv_heads, queries = tokens * shared;
    const int64_t start = a.query_start[row], context = a.context_len[row];
    const int64_t position = context - (a.query_start[row + 1] - start) + first;  // of token `first`
    const int64_t last = position + tokens - 1;
    const int64_t seen = a.window ? position - a.window + 1 : 0;  // the first position anyone sees
    const Vec scale = fill(float(a.scale));

    const X* query[MAX_QUERIES];
    Gathering g;
    for (int64_t q = 0; q < queries; ++q) {
        const int64_t token = start + first + q / shared, head = kv_head * shared + q % shared;
        query[q] = static_cast<const X*>(a.query) + (token * a.heads + head) * dim;
        g.highest[q] = -INFINITY;
        store(g.weight + q * LANES, fill(0.0f));
        std::memset(g.mixed + q * MAX_HEAD_DIM, 0, size_t(dim) * sizeof(float));
    }
    alignas(64) typename P::Item panel[MAX_HEAD_DIM * LANES];
    alignas(64) float values[LANES * MAX_HEAD_DIM], scores[MAX_QUERIES * LANES];
    for (int64_t place = (seen > 0 ? seen : 0) / LANES * LANES; place <= last; place += LANES) {
        const int64_t block = a.block_table[row * a.table_width + place / a.block_tokens];
        const int64_t at =
            ((block * a.kv_heads + kv_head) * a.block_tokens + place % a.block_tokens) * dim;
        const int count = int(context - place < LANES ? context - place : LANES);
        const X* keys = static_cast<const X*>(a.keys) + at;
        const X* paged = static_cast<const X*>(a.values) + at;
        if (count == LANES) whole_key_panel(keys, dim, panel);
        else key_panel(keys, dim, count, panel);
        for (int64_t i = 0; i < count * dim; i += LANES) store(values + i, load(paged + i));
        if (count < LANES)
            std::memset(values + count * dim, 0, size_t(LANES - count) * size_t(dim) * sizeof(float));
        int64_t q = 0;
        for (; q + 4 <= queries; q += 4) score<X, 4>(panel, dim, query + q, scale, scores + q * LANES);
        for (; q < queries; ++q) score<X, 1>(panel, dim, query + q, scale, scores + q * LANES);
        for (q = 0; q < queries; ++q) {
            const int64_t own = position + q / shared;
            const int64_t begin = a.window ? own - a.window + 1 - place : 0, end = own + 1 - place;
            float* s = scores + q * LANES;
            if (begin > 0 || end < LANES)
                store(s, keep_lanes(load(s), int(begin > 0 ? begin : 0), int(end < 0 ? 0 : end),
                                    -INFINITY));
            gather(s, values, dim, g.highest[q], g.weight + q * LANES, g.mixed + q * MAX_HEAD_DIM);
        }
    }
    for (int64_t q = 0; q < queries; ++q) {
        const int64_t token = start + first + q / shared, head = kv_head * shared + q % shared;
        X* out = static_cast<X*>(a.out) + (token * a.heads + head) * dim;
        const Vec total = fill(sum_lanes(load(g.weight + q * LANES)));
        for (int64_t d = 0; d < dim; d += LANES)
            store(out + d, load(g.mixed + q * MAX_HEAD_DIM + d) / total);
    }
}

template <class X>
static void attention(const void* arguments, Team& team) {
    const Attention& a = *static_cast<const Attention*>(arguments);
    const int64_t shared = a.heads / a.kv_heads;
    const int64_t tile = MAX_QUERIES / shared > 1 ? MAX_QUERIES / shared : 1;
    int64_t tasks = 0;
    for (int64_t row = 0; row < a.step->rows; ++row)
        tasks += ceil_div(a.query_start[row + 1] - a.query_start[row], tile) * a.kv_heads;
    int64_t row = -1, before = 0, here = 0;  // tasks of earlier rows, and of this one
    team.run(tasks, 1, [&](int64_t task) {      // a thread's tasks come in rising order
        while (task >= before + here) {
            before += here;
            ++row;
            here = ceil_div(a.query_start[row + 1] - a.query_start[row], tile) * a.kv_heads;
        }
        const int64_t first = (task - before) / a.kv_heads * tile;
        const int64_t left = a.query_start[row + 1] - a.query_start[row] - first;
        attend<X>(a, row, first, int(left < tile ? left : tile), (task - before) % a.kv_heads);
    });
}

}  // namespace RL_ISA
}  // namespace roofline
