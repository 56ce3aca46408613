// x [T, K] times a packed matrix: a block of rows at a time, their weights across SIMD lanes.
//
// An output is one lane: for each group of columns a sum over K in order, in float32, times the
// group's scale onto the total; with INT8 activations for each part of a group. Tiles of tokens and panels change what is loaded when, never that
// order, so a token's bits do not depend on how many others there are. Included once per ISA.
#pragma once

#include <type_traits>

#include "amx_linear.h"
#include "float_products.h"
#include "int8_products.h"
#include "int8_rounding.h"
#include "matrix.h"
#include "team.h"
#include "vec.h"

namespace roofline {
namespace RL_ISA {

// How a group's sums go onto totals: times the scales of its rows, [chunks][16]; as they are, where
// weights are floats.
struct FloatScale {
    const float* rows;

    INLINE FloatScale from(int, int chunk) const {
        return {rows ? rows + chunk * LANES : nullptr};
    }
    INLINE Vec add(Vec total, Vec sum, int, int c) const {
        return rows ? fma(sum, load(rows + c * LANES), total) : sum;
    }
};

// How a part's do: times a unit of each token, too, `parts` apart. Its pieces lie `pieces` apart.
struct Int8Scale {
    const float* rows;
    const float* units;
    const int32_t* starts;
    const float* multiples;
    int64_t parts, pieces;

    INLINE Int8Scale from(int token, int chunk) const {
        return {rows + chunk * LANES,     units + token * parts, starts + token * pieces,
                multiples + token * pieces, parts,               pieces};
    }
    INLINE Ints start(int m, int64_t piece) const { return fill_ints(starts[m * pieces + piece]); }
    INLINE Vec add_piece(Vec so_far, Ints sum, int m, int64_t piece) const {
        return fma(to_floats(sum), fill(multiples[m * pieces + piece]), so_far);
    }
    INLINE Vec add(Vec total, Vec sum, int m, int c) const {
        return fma(sum, load(rows + c * LANES) * fill(units[m * parts]), total);
    }
};

// Activations of some tokens, as they are multiplied.
template <class T>
struct Rows {
    const T* x;
    int64_t stride;
};

// One part of a block times a tile of tokens. `Products` says how four columns are multiplied.
template <class Products, class Scale, class Operand>
struct Tile {
    using Sum = typename Products::Sum;
    Products products;
    Scale scale;
    Rows<Operand> rows;
    int tokens, height;  // chunks of the block
    Vec* kept;           // [tokens][height], of a group that goes on, with float activations
    float* totals;       // [tokens][height][16]

    // Chunks [first, first + chunks), whose quads of columns lie `step` bytes apart.
    INLINE void run(const Part& part, const char* quads, int64_t step, int first, int chunks) const {
        constexpr int most = Products::most_tokens;
        for (int t = 0, left = (tokens + most - 1) / most; left; --left) {
            const int count = (tokens - t + left - 1) / left;  // tiles of about the same size
            as_constant<Products::least_tokens, Products::most_tokens>(count, [&](auto m) {
                as_constant<1, chunks_at_once(m)>(chunks, [&](auto c) {
                    micro<m, c>(part, quads, step, first, t);
                });
            });
            t += count;
        }
    }

    template <int M, int C>
    __attribute__((noinline)) void micro(const Part& part, const char* quads, int64_t step, int chunk, int token) const {
        const Operand* x = rows.x + token * rows.stride;
        const auto each = [&](auto&& visit) INLINED {
            unroll<M>([&](auto m) INLINED { unroll<C>([&](auto c) INLINED { visit(m, c); }); });
        };
        const Scale own = scale.from(token, chunk);
        const auto finish = [&](auto&& sum, bool first) INLINED {
            each([&](auto m, auto c) INLINED {
                float* total = totals + ((token + m) * height + chunk + c) * LANES;
                store(total, own.add(first ? fill(0.0f) : load(total), sum(m, c), m, c));
            });
        };
        Sum sums[M][C];
        if constexpr (std::is_same_v<Sum, Ints> && WIDE_OPERANDS) {
            each([&](auto m, auto c) INLINED { sums[m][c] = own.start(m, 0); });
            add_columns<M, C>(part.columns, quads, step, x, sums);
            finish([&](auto m, auto c) INLINED { return to_floats(sums[m][c]); }, !part.begin);
        } else if constexpr (std::is_same_v<Sum, Ints>) {
            Vec whole[M][C];  // of a part
            each([&](auto m, auto c) INLINED { whole[m][c] = fill(0.0f); });
            for (int64_t k = 0, i = 0; k < part.columns; k += PIECE_COLUMNS, ++i) {
                const int64_t left = part.columns - k;
                each([&](auto m, auto c) INLINED { sums[m][c] = own.start(m, i); });
                add_columns<M, C>(left < PIECE_COLUMNS ? left : PIECE_COLUMNS, quads + k / 4 * step, step, x + k, sums);
                each([&](auto m, auto c) INLINED { whole[m][c] = own.add_piece(whole[m][c], sums[m][c], m, i); });
            }
            finish([&](auto m, auto c) INLINED { return whole[m][c]; }, !part.begin);
        } else {
            Vec* const keep = kept + token * height + chunk;
            each([&](auto m, auto c) INLINED { sums[m][c] = fill(0.0f); });
            if (!part.starts)
                each([&](auto m, auto c) INLINED { sums[m][c] = keep[m * height + c]; });
            if constexpr (Products::in_halves) add_halves<M, C>(part.columns, quads, step, x, sums);
            else add_columns<M, C>(part.columns, quads, step, x, sums);
            if (part.ends)
                finish([&](auto m, auto c) INLINED { return sums[m][c]; }, !part.group);
            else
                each([&](auto m, auto c) INLINED { keep[m * height + c] = sums[m][c]; });
        }
    }

    // As AMX does: of 32 columns the even ones, and the odd ones, are summed apart.
    template <int M, int C>
    INLINE void add_halves(int64_t columns, const char* quads, int64_t step, const Operand* x, Sum (&sums)[M][C]) const {
        for (int64_t k = 0; k < columns; k += 32, quads += 8 * step) {
            const int64_t left = columns - k < 32 ? columns - k : 32;
            Sum halves[2][M][C];
            const auto each = [&](auto&& visit) INLINED {
                unroll<M>([&](auto m) INLINED { unroll<C>([&](auto c) INLINED { visit(m, c); }); });
            };
            each([&](auto m, auto c) INLINED { halves[0][m][c] = halves[1][m][c] = fill(0.0f); });
            const char* quad = quads;
            for (int64_t i = 0; i < left; i += 4, quad += step) {
                unroll<C>([&](auto c) INLINED { __builtin_prefetch(quad + AHEAD + 64 * c); });
                products.template add<M, C>(quad, x + k + i, rows.stride, halves);
            }
            each([&](auto m, auto c) INLINED { sums[m][c] = sums[m][c] + (halves[0][m][c] + halves[1][m][c]); });
        }
    }

    template <int M, int C>
    INLINE void add_columns(int64_t columns, const char* quads, int64_t step, const Operand* x, Sum (&sums)[M][C]) const {
        for (int64_t k = 0; k < columns; k += 4, quads += step) {
            if constexpr (Products::from_memory)
                unroll<C>([&](auto c) INLINED { __builtin_prefetch(quads + AHEAD + 64 * c); });
            products.template add<M, C>(quads, x + k, rows.stride, sums);
        }
    }
};

// Operands of a token in that room: eight bytes more than it needs, so that the tokens of a tile lie
// in different banks of L1.
template <class Operand>
constexpr int ROW_OPERANDS = PANEL_COLUMNS + int(8 / sizeof(Operand));

// Columns of some tokens as operands, in `room` where they are not so in memory.
template <class Operand, class X>
INLINE Rows<Operand> operand_rows(const X* x, int64_t stride, int tokens, int64_t columns,
                                  Operand* room) {
    if constexpr (std::is_same_v<Operand, X>) {
        return {x, stride};
    } else {
        for (int t = 0; t < tokens; ++t)
            to_operands(x + t * stride, columns, room + t * ROW_OPERANDS<Operand>);
        return {room, ROW_OPERANDS<Operand>};
    }
}

// A part of some chunks widened: [columns][chunks][16].
template <class X>
INLINE void widen_panel(const Weight& w, const Part& part, const char* quads, int height, int chunks,
                        typename Panel<X>::Item* panel) {
    using P = Panel<X>;
    const int64_t bytes = 64 * item_bytes(w.kind);
    for (int64_t k = 0; k < part.columns; k += 4, quads += height * bytes)
        for (int c = 0; c < chunks; ++c) {
            __builtin_prefetch(quads + c * bytes + AHEAD);
            P::widen(quads + c * bytes, w.kind, w.extremes != 0,
                     panel + (k * chunks + P::step * c) * LANES, chunks * LANES);
        }
}

// A part of some chunks as the parts of its quads: [columns / 4][parts][chunks][16].
INLINE void widen_bytes(const Part& part, const char* quads, int height, int chunks, char* panel) {
    for (int64_t k = 0; k < part.columns; k += 4, quads += height * 64)
        for (int c = 0; c < chunks; ++c) {
            __builtin_prefetch(quads + c * 64 + AHEAD);
            for (int i = 0; i < QUAD_PARTS; ++i)
                store_part(panel + ((k / 4 * QUAD_PARTS + i) * chunks + c) * 64,
                           byte_part(quads + c * 64, i));
        }
}

// Totals [tokens][chunks][16] of a block and at most TILE_TOKENS tokens with float activations.
template <class X>
static void multiply_floats(const Weight& w, const Block& block, int tokens, const X* x,
                            float* totals) {
    constexpr bool halves = sums_in_halves<X>;
    [[maybe_unused]] const WithoutDenormals<halves> as_tiles_do;
    using P = Panel<X>;
    using Operand = typename P::Operand;
    alignas(64) Operand room[std::is_same_v<Operand, X> ? 1 : TILE_TOKENS * ROW_OPERANDS<Operand>];
    alignas(64) typename P::Item panel[PANEL_COLUMNS * chunks_at_once(MICRO_TOKENS) * LANES];
    alignas(64) Vec kept[TILE_TOKENS * MAX_CHUNKS];
    const int height = int(block.chunks);
    const int few = tokens < MICRO_TOKENS ? tokens : MICRO_TOKENS;
    const int most = halves && few > 2 ? 2 : chunks_at_once(few);  // halves are twice as many sums
    const int64_t bytes = 64 * item_bytes(w.kind);  // of a quad
    const bool extremes = w.extremes != 0;
    each_part(w, [&](const Part& part) {
        const auto rows = operand_rows<Operand>(x + part.begin, w.columns, tokens, part.columns, room);
        const FloatScale scale{w.kind == INT8 ? block.scales + part.group * height * LANES : nullptr};
        const char* quads = block.values + part.begin / 4 * height * bytes;
        const auto run = [&](const auto& products, const char* from, int64_t step, int first, int chunks) {
            using Products = std::decay_t<decltype(products)>;
            const Tile<Products, FloatScale, Operand> tile{products, scale, rows, tokens, height, kept, totals};
            tile.run(part, from, step, first, chunks);
        };
        for (int c = 0; c < height; c += most, quads += most * bytes) {
            const int chunks = height - c < most ? height - c : most;
            if constexpr (halves) {
                if (w.kind == INT8) run(Halves<true>{INT8}, quads, height * bytes, c, chunks);
                else run(Halves<false>{w.kind}, quads, height * bytes, c, chunks);
            } else if (tokens <= DIRECT_TOKENS && w.kind == INT8 && !extremes) {
                run(DirectInt8<Operand>{}, quads, height * bytes, c, chunks);
            } else if (tokens <= DIRECT_TOKENS) {
                run(Direct<Operand>{w.kind, extremes}, quads, height * bytes, c, chunks);
            } else {
                widen_panel<X>(w, part, quads, height, chunks, panel);
                run(Widened<Operand>{}, reinterpret_cast<const char*>(panel),
                    int64_t(sizeof(typename P::Item)) * 4 * chunks * LANES, c, chunks);
            }
        }
    });
}

// The same with activations as INT8: those of `all` tokens, from `first` on.
INLINE void multiply_int8(const Weight& w, const Block& block, int tokens, const Rounded& x, int64_t first,
                          int64_t all, float* totals) {
    alignas(64) char panel[QUAD_PARTS > 1 ? PANEL_COLUMNS / 4 * QUAD_PARTS * chunks_at_once(MICRO_TOKENS) * 64 : 1];
    const int height = int(block.chunks);
    const int most = chunks_at_once(tokens < MICRO_TOKENS ? tokens : MICRO_TOKENS);
    each_part(w, [&](const Part& part) {
        const int64_t stride = part.columns + ROW_GAP;
        const Rows<ByteOperand> rows{x.values + all * (part.begin + part.index * ROW_GAP) + first * stride, stride};
        const int64_t piece = first * x.pieces + part.pieces;
        const Int8Scale scale{block.scales + part.group * height * LANES, x.units + first * x.parts + part.index,
                              x.starts + piece, x.multiples + piece, x.parts, x.pieces};
        const char* quads = block.values + part.begin / 4 * height * 64;
        const auto run = [&](const auto& products, const char* from, int64_t step, int c, int chunks) {
            using Products = std::decay_t<decltype(products)>;
            const Tile<Products, Int8Scale, ByteOperand> tile{products, scale, rows, tokens, height, nullptr, totals};
            tile.run(part, from, step, c, chunks);
        };
        for (int c = 0; c < height; c += most, quads += most * 64) {
            const int chunks = height - c < most ? height - c : most;
            if (Bytes::always || tokens <= DIRECT_TOKENS) {
                run(Bytes{}, quads, height * 64, c, chunks);
            } else if constexpr (QUAD_PARTS > 1) {
                widen_bytes(part, quads, height, chunks, panel);
                run(WidenedBytes{}, panel, QUAD_PARTS * chunks * 64, c, chunks);
            }
        }
    });
}

// What a matrix is multiplied by: activations [T, K] and, with OFFSET_INT8 weights, those as INT8; or
// either as AMX reads them.
template <class X>
struct Input {
    const X* x;
    int64_t tokens;
    Rounded rounded;
    Tiled tiled;
};

// Totals [tokens][chunks][16] of some tokens, from token `first` on, and one block.
template <class X>
static void multiply_block(const Weight& w, const Block& block, int tokens, const Input<X>& input,
                           int64_t first, float* totals) {
    if (input.tiled.values)
        multiply_tiles(w, block, tokens, input.tiled, first, totals);
    else if (w.kind == OFFSET_INT8)
        multiply_int8(w, block, tokens, input.rounded, first, input.tokens, totals);
    else
        multiply_floats(w, block, tokens, input.x + first * w.columns, totals);
}

INLINE Rounded rounded_at(void* room, int64_t tokens, const Weight& w) {
    Rounded r{};
    each_part(w, [&](const Part& part) {
        r.parts = part.index + 1, r.pieces = part.pieces + ceil_div(part.columns, PIECE_COLUMNS);
    });
    r.units = static_cast<float*>(room);
    r.multiples = r.units + tokens * r.parts;
    r.starts = reinterpret_cast<int32_t*>(r.multiples + (WIDE_OPERANDS ? 0 : tokens * r.pieces));
    r.values = reinterpret_cast<ByteOperand*>(r.starts + tokens * r.pieces);
    return r;
}

// Make the input of a matrix ready; `room` is for its INT8 form.
template <class X>
static Input<X> prepare(const Weight& w, int64_t tokens, const X* x, void* room, Team& team) {
    Input<X> input{x, tokens, {}, {}};
    if constexpr (sizeof(X) == 2)
        if (fits_tiles(w, tokens)) {
            input.tiled = tile_activations(w, tokens, x, room, team);
            return input;
        }
    if (w.kind != OFFSET_INT8) return input;
    const Rounded r = input.rounded = rounded_at(room, tokens, w);
    team.run(tokens, 1, [&](int64_t t) {
        each_part(w, [&](const Part& part) {
            const int64_t row = tokens * (part.begin + part.index * ROW_GAP) + t * (part.columns + ROW_GAP);
            const int64_t piece = t * r.pieces + part.pieces;
            round_part(x + t * w.columns + part.begin, part.columns, r.units + t * r.parts + part.index,
                       r.starts + piece, r.multiples + piece, [&](int64_t i, Ints operands) INLINED {
                           store_some(r.values + row + i, operands, part.columns - i);
                       });
        });
    });
    return input;
}

// For every block of rows and some tokens at a time: done(block, first token, tokens, totals).
template <class X, class Done>
static void multiply_each(const Weight& w, int64_t tokens, const Input<X>& input, Team& team,
                          Done&& done) {
    team.run(block_count(w), 1, [&](int64_t index) {
        alignas(64) float totals[(HAS_TILES ? TILED_TOKENS : TILE_TOKENS) * MAX_CHUNKS * LANES];
        const int most = input.tiled.values ? TILED_TOKENS : TILE_TOKENS;
        const Block block = block_at(w, index);
        for (int64_t first = 0; first < tokens; first += most) {
            const int count = int(tokens - first < most ? tokens - first : most);
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
                      for (int t = 0; t < count; ++t) {
                          float* to = out + (first + t) * stride + block.first_row;
                          const float* from = totals + t * height;
                          if (left < height)
                              std::memcpy(to, from, size_t(left) * sizeof(float));
                          else
                              for (int64_t i = 0; i < height; i += LANES) store(to + i, load(from + i));
                      }
                  });
}

}  // namespace RL_ISA
}  // namespace roofline
