// Linears by AMX, of five tokens and more.
//
// Activations are first put as tiles A read them, once an op. Bfloat16: a block of 64 rows is widened
// to tiles B, some groups of columns at a time, for all tokens; each group's C is scaled onto totals.
// INT8: weights are tiles B as they are packed, and activations, value times multiple, two planes of
// bytes: 256 high + low. For fewer tokens `Halves` (float_products.h) makes the same sums in the same
// order, and for INT8 any order is exact. Included once per ISA, of one alone.
#pragma once

#include "amx.h"
#include "int8_rounding.h"
#include "matrix.h"
#include "team.h"

namespace roofline {
namespace RL_ISA {

constexpr int TILED_TOKENS = 512;     // whose totals a block keeps at hand, at most

// Activations as tiles A read them. Bfloat16: [blocks of 32 columns][T][32]. INT8: [blocks of 64][T]
// [2 planes][64], then units [T, parts] and -128 times the sum of each part [T, parts].
struct Tiled {
    char* values;  // null: the op is for vectors
    float* units;
    int32_t* starts;
    int64_t tokens, parts;
};

#if !defined(RL_AMX)
INLINE bool fits_tiles(const Weight&, int64_t) { return false; }
INLINE Tiled tile_activations(const Weight&, int64_t, const void*, void*, Team&) { return {}; }
INLINE void multiply_tiles(const Weight&, const Block&, int, const Tiled&, int64_t, float*) {}
#else
constexpr int64_t DOT_COLUMNS = 32, DOT_BYTE_COLUMNS = 64;  // of a product of tiles
constexpr int SLAB_TOKENS = 96;       // whose totals stay in L1 beside a group of a slab
constexpr int64_t SLAB_COLUMNS = 1024, SHORT_SLAB_COLUMNS = 256;  // widened at a time

// Blocks of 32 columns, or of 64 with INT8 activations, each within one group or part, before `group`.
INLINE int64_t blocks_before(const Weight& w, int64_t group) {
    return group ? ceil_div(w.group - w.offset, DOT_COLUMNS) + (group - 1) * (w.group / DOT_COLUMNS) : 0;
}
INLINE int64_t tiled_bytes(const Weight& w) {  // of a token
    int64_t bytes = 0;
    if (w.kind == OFFSET_INT8) {
        each_part(w, [&](const Part& part) {
            bytes += ceil_div(part.columns, DOT_BYTE_COLUMNS) * 2 * DOT_BYTE_COLUMNS + 8;
        });
    } else {
        int64_t begin, end;
        const int64_t last = group_count(w) - 1;
        group_columns(w, last, begin, end);
        bytes = (blocks_before(w, last) + ceil_div(end - begin, DOT_COLUMNS)) * 2 * DOT_COLUMNS;
    }
    return bytes;
}

// Whether tiles can multiply a matrix by so many tokens. `quantized_values` of budget.py is the room.
INLINE bool fits_tiles(const Weight& w, int64_t tokens) {
    if (tokens <= DIRECT_TOKENS || w.kind == FLOAT32) return false;
    if (is_int8(w) && group_count(w) > 1 && w.group % DOT_COLUMNS) return false;
    return tiled_bytes(w) <= 4 * (ceil_div(w.columns, 2) + 5 * (ceil_div(w.columns, 32) + 1));
}

INLINE Tiled tile_activations(const Weight& w, int64_t tokens, const uint16_t* x, void* room, Team& team) {
    Tiled tiled{static_cast<char*>(room), nullptr, nullptr, tokens, 0};
    if (w.kind != OFFSET_INT8) {
        team.run(ceil_div(tokens, TILE_ROWS), 1, [&](int64_t task) {
            const int64_t first = task * TILE_ROWS, last = first + TILE_ROWS < tokens ? first + TILE_ROWS : tokens;
            char* to = tiled.values;
            for (int64_t g = 0; g < group_count(w); ++g) {
                int64_t begin, end;
                group_columns(w, g, begin, end);
                for (int64_t k = begin; k < end; k += DOT_COLUMNS, to += tokens * 2 * DOT_COLUMNS) {
                    const int64_t left = end - k;
                    const __mmask32 some = left < DOT_COLUMNS ? (1u << left) - 1 : 0xffffffffu;
                    for (int64_t t = first; t < last; ++t)
                        _mm512_storeu_si512(to + t * 2 * DOT_COLUMNS,
                                            _mm512_maskz_loadu_epi16(some, x + t * w.columns + k));
                }
            }
        });
        return tiled;
    }
    int64_t blocks = 0;
    each_part(w, [&](const Part& part) {
        blocks += ceil_div(part.columns, DOT_BYTE_COLUMNS), ++tiled.parts;
    });
    tiled.units = reinterpret_cast<float*>(tiled.values + blocks * tokens * 2 * DOT_BYTE_COLUMNS);
    tiled.starts = reinterpret_cast<int32_t*>(tiled.units + tokens * tiled.parts);
    team.run(tokens, 1, [&](int64_t t) {
        char* to = tiled.values + t * 2 * DOT_BYTE_COLUMNS;
        each_part(w, [&](const Part& part) {
            const int64_t block = tokens * 2 * DOT_BYTE_COLUMNS, place = t * tiled.parts + part.index;
            const auto put = [&](int64_t i, Ints operands) INLINED {
                char* at = to + i / DOT_BYTE_COLUMNS * block + i % DOT_BYTE_COLUMNS;
                const Ints high{_mm512_srai_epi32(operands.v, 8)};
                store_bytes(reinterpret_cast<int8_t*>(at), high);
                store_bytes(reinterpret_cast<int8_t*>(at) + DOT_BYTE_COLUMNS, operands);
            };
            float unused;
            round_part(x + t * w.columns + part.begin, part.columns, tiled.units + place,
                       tiled.starts + place, &unused, put);
            const int64_t whole = ceil_div(part.columns, DOT_BYTE_COLUMNS) * DOT_BYTE_COLUMNS;
            for (int64_t i = ceil_div(part.columns, LANES) * LANES; i < whole; i += LANES) put(i, fill_ints(0));
            to += whole / DOT_BYTE_COLUMNS * block;
        });
    });
    return tiled;
}

// The tile of tokens from `token` on: where it begins, and how many rows of it an earlier one has done.
struct TokenTile {
    int64_t first;
    int done, rows;
};
INLINE TokenTile token_tile(int64_t token, int64_t tokens) {
    if (tokens < TILE_ROWS) return {0, 0, int(tokens)};
    const int64_t first = token + TILE_ROWS <= tokens ? token : tokens - TILE_ROWS;
    return {first, int(token - first), TILE_ROWS};
}

// C of M tiles of tokens and C chunks: zero, or as kept.
template <int M, int C>
INLINE void begin_sums(bool zero, const float (*sums)[TILE_ROWS * LANES]) {
    if (zero) {
        RL_TILE_ZERO(0);
        if constexpr (M * C > 1) RL_TILE_ZERO(1);
        if constexpr (M * C > 1) RL_TILE_ZERO(2);
        if constexpr (M * C > 1) RL_TILE_ZERO(3);
        return;
    }
    RL_TILE_LOAD(0, sums[0], 64);
    if constexpr (M * C > 1) RL_TILE_LOAD(1, sums[1], 64);
    if constexpr (M * C > 1) RL_TILE_LOAD(2, sums[2], 64);
    if constexpr (M * C > 1) RL_TILE_LOAD(3, sums[3], 64);
}

template <int M, int C>
INLINE void store_sums(float (*sums)[TILE_ROWS * LANES]) {
    RL_TILE_STORE(0, sums[0], 64);
    if constexpr (C > 1) RL_TILE_STORE(1, sums[1], 64);
    if constexpr (M == 2 || C > 2) RL_TILE_STORE(2, sums[2], 64);
    if constexpr (M * C == 4) RL_TILE_STORE(3, sums[3], 64);
}

// C of tile m and chunk c is number 2 m + c, or with one tile c. `meanwhile` is done once a block: tiles
// are slower than what brings them.
template <int M, int C, class Meanwhile>
INLINE void add_products(const char* a, const char* a2, int64_t a_step, const char* b, int64_t b_step,
                         int64_t blocks, Meanwhile&& meanwhile) {
    for (; blocks; --blocks, a += a_step, a2 += a_step, b += b_step) {
        RL_TILE_LOAD(4, a, 64);
        if constexpr (M == 2) RL_TILE_LOAD(5, a2, 64);
        RL_TILE_LOAD(6, b, 64);
        RL_TILE_DOT(RL_BF16, 0, 4, 6);
        if constexpr (M == 2) RL_TILE_DOT(RL_BF16, 2, 5, 6);
        if constexpr (C > 1) {
            RL_TILE_LOAD(7, b + TILE_BYTES, 64);
            RL_TILE_DOT(RL_BF16, 1, 4, 7);
            if constexpr (M == 2) RL_TILE_DOT(RL_BF16, 3, 5, 7);
        }
        if constexpr (C > 2) {
            RL_TILE_LOAD(6, b + 2 * TILE_BYTES, 64);
            RL_TILE_DOT(RL_BF16, 2, 4, 6);
        }
        if constexpr (C > 3) {
            RL_TILE_LOAD(7, b + 3 * TILE_BYTES, 64);
            RL_TILE_DOT(RL_BF16, 3, 4, 7);
        }
        meanwhile();
    }
}

// How stored C go onto totals.
enum Finish { PUT, SCALE, ADD };

// A C that is stored, and the totals of its tokens, `stride` floats apart.
struct Stored {
    const float* sums;
    float* totals;
    const float* scales;
    int count;  // of tokens

    template <int FINISH>
    INLINE void finish(int64_t stride) const {
        const Vec scale = FINISH == PUT ? fill(1.0f) : load(scales);
        const auto row = [&](int i) INLINED {
            const Vec value = load(sums + i * LANES);
            float* to = totals + i * stride;
            if constexpr (FINISH == PUT) store(to, value);
            else store(to, fma(value, scale, FINISH == ADD ? load(to) : fill(0.0f)));
        };
        if (count == TILE_ROWS) return unroll<TILE_ROWS>([&](auto i) INLINED { row(i); });
        for (int i = 0; i < count; ++i) row(i);
    }
};

// C that were stored, and are added to their totals while tiles work on what comes next.
class Pending {
  public:
    explicit Pending(int64_t stride) : stride_(stride) {}

    // Where the next C are stored.
    float (*sums())[TILE_ROWS * LANES] { return sums_[turn_]; }
    void add(const Stored& stored) { stored_[count_++] = stored; }
    void stored(Finish how) { how_ = how, turn_ ^= 1; }

    // Add one of them.
    INLINE void finish_one() {
        if (!count_) return;
        const Stored& stored = stored_[--count_];
        if (how_ == ADD) stored.finish<ADD>(stride_);
        else if (how_ == SCALE) stored.finish<SCALE>(stride_);
        else stored.finish<PUT>(stride_);
    }
    void finish() {
        while (count_) finish_one();
    }

  private:
    alignas(64) float sums_[2][4][TILE_ROWS * LANES];
    Stored stored_[4];
    const int64_t stride_;
    Finish how_ = PUT;
    int count_ = 0, turn_ = 0;
};

// Columns that are widened at a time: some whole groups, or a part of a long one.
struct Slab {
    int64_t first_group, last_group;  // [first, last)
    int64_t begin, end;
    bool starts, ends;  // its groups

    // The columns of one of its groups.
    INLINE void columns_of(const Weight& w, int64_t group, int64_t& from, int64_t& to) const {
        group_columns(w, group, from, to);
        if (from < begin) from = begin;
        if (to > end) to = end;
    }
};

template <class Visit>
INLINE void each_slab(const Weight& w, int64_t columns, Visit&& visit) {
    for (int64_t g = 0, last; g < group_count(w); g = last) {
        int64_t begin, end, next_begin, next_end;
        group_columns(w, g, begin, end);
        last = g + 1;
        if (end - begin > columns) {
            for (int64_t k = begin; k < end; k += columns)
                visit(Slab{g, last, k, k + columns < end ? k + columns : end, k == begin, k + columns >= end});
            continue;
        }
        for (; last < group_count(w); ++last, end = next_end) {
            group_columns(w, last, next_begin, next_end);
            if (next_end - begin > columns) break;
        }
        visit(Slab{g, last, begin, end, true, true});
    }
}

// A slab of a block as tiles B: [blocks of 32 columns][chunks].
INLINE void widen_slab(const Weight& w, const Block& block, const Slab& slab, char* panel) {
    const int height = int(block.chunks);
    const int64_t bytes = 64 * item_bytes(w.kind);
    for (int64_t g = slab.first_group; g < slab.last_group; ++g) {
        int64_t begin, end;
        slab.columns_of(w, g, begin, end);
        for (int64_t k = begin; k < end; k += DOT_COLUMNS, panel += height * TILE_BYTES) {
            const char* quads = block.values + k / 4 * height * bytes;
            for (int c = 0; c < height; ++c)
                for (int i = 0; i < int(DOT_COLUMNS / 4); ++i) {
                    const char* quad = quads + (i * height + c) * bytes;
                    char* to = panel + c * TILE_BYTES + i * 128;
                    __builtin_prefetch(quad + AHEAD);
                    if (k + 4 * i >= end) {
                        std::memset(to, 0, 128);
                    } else if (w.kind == INT8) {
                        int8_pairs(quad, reinterpret_cast<uint16_t*>(to));
                    } else {
                        std::memcpy(to, quad, 128);
                    }
                }
        }
    }
}

// Totals [tokens][chunks][16] of a block and at most TILED_TOKENS tokens, from token `first` on.
INLINE void multiply_bf16_tiles(const Weight& w, const Block& block, int tokens, const Tiled& x,
                                int64_t first, float* totals) {
    alignas(64) char panel[SLAB_COLUMNS * MAX_CHUNKS * LANES * 2];
    const int height = int(block.chunks);
    Pending pending(height * LANES);
    const int64_t a_step = x.tokens * 2 * DOT_COLUMNS, b_step = height * TILE_BYTES;
    const WithoutDenormals<true> as_tiles_do;
    const TilesInUse tiles(int(x.tokens < TILE_ROWS ? x.tokens : TILE_ROWS));
    each_slab(w, tokens <= SLAB_TOKENS ? SHORT_SLAB_COLUMNS : SLAB_COLUMNS, [&](const Slab& slab) {
        widen_slab(w, block, slab, panel);
        for (int some = 0; some < tokens; some += SLAB_TOKENS) {
            const int until = tokens < some + SLAB_TOKENS ? tokens : some + SLAB_TOKENS;
            const char* b = panel;
            for (int64_t g = slab.first_group; g < slab.last_group; ++g) {
                int64_t begin, end, whole_begin, whole_end;
                group_columns(w, g, whole_begin, whole_end);
                slab.columns_of(w, g, begin, end);
                const int64_t blocks = ceil_div(end - begin, DOT_COLUMNS);
                const char* a = x.values + (blocks_before(w, g) + (begin - whole_begin) / DOT_COLUMNS) * a_step;
                const float* scales = w.kind == INT8 ? block.scales + g * height * LANES : nullptr;
                // One tile of tokens or two, and as many chunks as C's are left for.
                const auto products = [&](auto m, auto c, int token, int chunk) INLINED {
                    const TokenTile rows[2] = {token_tile(first + token, x.tokens),
                                               token_tile(first + token + (m - 1) * TILE_ROWS, x.tokens)};
                    float(*sums)[TILE_ROWS * LANES] = pending.sums();
                    const auto each = [&](auto&& visit) INLINED {  // first float, totals, tokens, chunk
                        unroll<m>([&](auto i) INLINED {
                            unroll<c>([&](auto j) INLINED {
                                visit(sums[m == 2 ? 2 * i + j : j] + rows[i].done * LANES,
                                      totals + ((token + i * TILE_ROWS) * height + chunk + j) * LANES,
                                      rows[i].rows - rows[i].done, chunk + j);
                            });
                        });
                    };
                    if (!slab.starts) {
                        pending.finish();
                        each([&](float* sum, const float* kept, int count, int) {
                            for (int row = 0; row < count; ++row)
                                store(sum + row * LANES, load(kept + row * height * LANES));
                        });
                    }
                    begin_sums<m, c>(slab.starts, sums);
                    add_products<m, c>(a + rows[0].first * 64, a + rows[m - 1].first * 64, a_step,
                                       b + chunk * TILE_BYTES, b_step, blocks, [&] { pending.finish_one(); });
                    pending.finish();
                    store_sums<m, c>(sums);
                    each([&](const float* sum, float* total, int count, int j) {
                        pending.add({sum, total, scales + j * LANES, count});
                    });
                    pending.stored(!slab.ends || !scales ? PUT : g ? ADD : SCALE);
                };
                using One = std::integral_constant<int, 1>;
                using Two = std::integral_constant<int, 2>;
                if (until - some <= TILE_ROWS) {
                    as_constant<1, MAX_CHUNKS>(height, [&](auto c) { products(One{}, c, some, 0); });
                } else {
                    const auto pair = [&](auto m, int token) {
                        for (int chunk = 0; chunk < height; chunk += 2)
                            as_constant<1, 2>(height - chunk, [&](auto c) { products(m, c, token, chunk); });
                    };
                    int token = some;
                    for (; token + TILE_ROWS < until; token += 2 * TILE_ROWS) pair(Two{}, token);
                    if (token < until) pair(One{}, token);
                }
                b += blocks * b_step;
            }
        }
    });
    pending.finish();
}

// Two planes of sums of up to sixteen tokens and two chunks, in one of two rooms.
struct ByteSums {
    alignas(64) int32_t high[2][2][TILE_ROWS * LANES], low[2][2][TILE_ROWS * LANES];
};

// Those that were stored, and are added to their totals while tiles work on what comes next.
struct PendingBytes {
    const int32_t *high, *low;  // [chunks][16][16], of the first token
    const float *scales, *units;
    const int32_t* starts;
    float* totals;
    int64_t parts, stride;  // from token to token
    int count, chunks, next;
    bool first;  // of the row's parts

    // Add some tokens.
    INLINE void finish(int tokens) {
        for (const int end = next + tokens < count ? next + tokens : count; next < end; ++next) {
            const __m512i start = _mm512_set1_epi32(starts[next * parts]);
            const Vec unit = fill(units[next * parts]);
            for (int j = 0; j < chunks; ++j) {
                const int64_t at = (j * TILE_ROWS + next) * LANES;
                const __m512i whole = _mm512_slli_epi32(_mm512_loadu_si512(high + at), 8);
                const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(whole, _mm512_loadu_si512(low + at)), start);
                float* total = totals + next * stride + j * LANES;
                const Vec so_far = first ? fill(0.0f) : load(total);
                store(total, fma(to_floats(Ints{sum}), load(scales + j * LANES) * unit, so_far));
            }
        }
    }
};

// The same with INT8 activations.
INLINE void multiply_byte_tiles(const Weight& w, const Block& block, int tokens, const Tiled& x, int64_t first,
                                float* totals) {
    alignas(64) char ends[2 * TILE_BYTES];  // of a part that is no whole block
    ByteSums sums;
    PendingBytes pending{};
    int turn = 0;
    const int height = int(block.chunks);
    const int64_t a_step = x.tokens * 2 * DOT_BYTE_COLUMNS, b_row = height * 64;
    const TilesInUse tiles(int(x.tokens < TILE_ROWS ? x.tokens : TILE_ROWS));
    const char* a = x.values;
    each_part(w, [&](const Part& part) {
        const int64_t blocks = ceil_div(part.columns, DOT_BYTE_COLUMNS);
        for (int chunk = 0; chunk < height; chunk += 2)
            as_constant<1, 2>(height - chunk, [&](auto c) {
                const char* quads = block.values + part.begin / 4 * b_row + chunk * 64;
                const char* last = quads + (blocks - 1) * TILE_ROWS * b_row;
                int64_t last_row = b_row;
                if (const int64_t left = part.columns % DOT_BYTE_COLUMNS) {
                    std::memset(ends, 0, sizeof ends);
                    for (int i = 0; 4 * i < left; ++i) std::memcpy(ends + i * c * 64, last + i * b_row, c * 64);
                    last = ends, last_row = c * 64;
                }
                for (int token = 0; token < tokens; token += TILE_ROWS) {
                    const TokenTile rows = token_tile(first + token, x.tokens);
                    const char* from = a + rows.first * 2 * DOT_BYTE_COLUMNS;
                    RL_TILE_ZERO(0);
                    RL_TILE_ZERO(1);
                    RL_TILE_ZERO(2);
                    RL_TILE_ZERO(3);
                    for (int64_t i = 0; i < blocks; ++i, from += a_step) {
                        const bool ends_here = i + 1 == blocks;
                        const char* b = ends_here ? last : quads + i * TILE_ROWS * b_row;
                        const int64_t b_stride = ends_here ? last_row : b_row;
                        if (token == 0)
                            for (int r = 0; r < TILE_ROWS; ++r)
                                __builtin_prefetch(quads + (i * TILE_ROWS + r) * b_row + AHEAD);
                        RL_TILE_LOAD(4, from, 128);
                        RL_TILE_LOAD(5, from + DOT_BYTE_COLUMNS, 128);
                        RL_TILE_LOAD(6, b, b_stride);
                        RL_TILE_DOT(RL_SIGNED, 0, 4, 6);
                        RL_TILE_DOT(RL_UNSIGNED, 1, 5, 6);
                        if constexpr (c == 2) {
                            RL_TILE_LOAD(7, b + 64, b_stride);
                            RL_TILE_DOT(RL_SIGNED, 2, 4, 7);
                            RL_TILE_DOT(RL_UNSIGNED, 3, 5, 7);
                        }
                        pending.finish(TILE_ROWS / 2);
                    }
                    pending.finish(TILE_ROWS);
                    RL_TILE_STORE(0, sums.high[turn][0], 64);
                    RL_TILE_STORE(1, sums.low[turn][0], 64);
                    if constexpr (c == 2) {
                        RL_TILE_STORE(2, sums.high[turn][1], 64);
                        RL_TILE_STORE(3, sums.low[turn][1], 64);
                    }
                    const int64_t place = (rows.first + rows.done) * x.parts + part.index;
                    pending = {sums.high[turn][0] + rows.done * LANES, sums.low[turn][0] + rows.done * LANES,
                               block.scales + (part.group * height + chunk) * LANES, x.units + place,
                               x.starts + place, totals + (token * height + chunk) * LANES, x.parts,
                               height * LANES, rows.rows - rows.done, c, 0, part.begin == 0};
                    turn ^= 1;
                }
            });
        a += blocks * a_step;
    });
    pending.finish(TILE_ROWS);
}

static void multiply_tiles(const Weight& w, const Block& block, int tokens, const Tiled& x, int64_t first,
                           float* totals) {
    if (w.kind == OFFSET_INT8) multiply_byte_tiles(w, block, tokens, x, first, totals);
    else multiply_bf16_tiles(w, block, tokens, x, first, totals);
}
#endif

}  // namespace RL_ISA
}  // namespace roofline
