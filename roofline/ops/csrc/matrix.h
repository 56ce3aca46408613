// How a packed matrix is walked: its blocks of rows, its groups of columns. Included once per ISA.
#pragma once

#include "abi.h"
#include "int8_rounding.h"
#include "tiles.h"
#include "vec.h"

namespace roofline {
namespace RL_ISA {

INLINE int64_t item_bytes(int64_t kind) { return kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1; }

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

// Columns of one group, as many as are taken at a time.
struct Part {
    int64_t group, begin, columns;
    bool starts, ends;      // its group
    int64_t index, pieces;  // parts and pieces before it
};

template <class Visit>
INLINE void each_part(const Weight& w, Visit&& visit) {
    int64_t index = 0, pieces = 0;
    for (int64_t g = 0; g < group_count(w); ++g) {
        int64_t begin, end;
        group_columns(w, g, begin, end);
        for (int64_t k = begin; k < end; k += PANEL_COLUMNS) {
            const int64_t columns = end - k < PANEL_COLUMNS ? end - k : PANEL_COLUMNS;
            visit(Part{g, k, columns, k == begin, k + columns == end, index, pieces});
            ++index, pieces += ceil_div(columns, PIECE_COLUMNS);
        }
    }
}

}  // namespace RL_ISA
}  // namespace roofline
