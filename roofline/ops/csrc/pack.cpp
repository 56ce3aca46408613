#include "pack.h"

#include <cstdint>
#include <cstring>

namespace roofline {

namespace {

constexpr int64_t LANES = 16;

// The row of the matrix that is lane `lane` of packed chunk `chunk`.
int64_t source_row(int64_t chunk, int64_t lane, int64_t rows, bool paired) {
    return paired ? chunk % 2 * (rows / 2) + chunk / 2 * LANES + lane : chunk * LANES + lane;
}

// Call visit(chunk, its block's chunks, its place in the block, the block's first chunk).
template <class Visit>
void each_chunk(int64_t rows, int64_t chunks, Visit visit) {
    const int64_t count = (rows + LANES - 1) / LANES;
    for (int64_t chunk = 0; chunk < count; ++chunk) {
        const int64_t first = chunk / chunks * chunks;
        visit(chunk, count - first < chunks ? count - first : chunks, chunk - first, first);
    }
}

template <class Item>
void pack_items(const Item* values, int64_t rows, int64_t columns, int64_t chunks, bool paired,
                Item* packed) {
    const int64_t padded = (columns + 3) / 4 * 4;
    each_chunk(rows, chunks, [&](int64_t chunk, int64_t height, int64_t place, int64_t first) {
        Item* block = packed + first * LANES * padded;
        for (int64_t lane = 0; lane < LANES; ++lane) {
            const int64_t row = source_row(chunk, lane, rows, paired);
            const Item* from = values + row * columns;
            for (int64_t k = 0; k < padded; ++k) {
                Item* quad = block + (k / 4 * height + place) * 4 * LANES;
                const int64_t i = k % 4;
                // [2][16][2] for bfloat16, [4][16] for float32
                const int64_t at = sizeof(Item) == 2 ? i / 2 * 32 + 2 * lane + i % 2 : i * LANES + lane;
                quad[at] = row < rows && k < columns ? from[k] : Item(0);
            }
        }
    });
}

// INT8, [16][4]: four columns are a word. A cache line of a row at a time, so that rows which lie a
// power of two apart do not push each other out of the cache. Whether -128 is among them.
bool pack_bytes(const int8_t* values, int64_t rows, int64_t columns, int64_t chunks, bool paired,
                bool offset, int8_t* packed) {
    constexpr int64_t LINE = 64;
    constexpr uint32_t TOPS = 0x80808080u, ONES = 0x01010101u;
    const int64_t padded = (columns + 3) / 4 * 4;
    const uint32_t flip = offset ? TOPS : 0;
    uint32_t extremes = 0;
    each_chunk(rows, chunks, [&](int64_t chunk, int64_t height, int64_t place, int64_t first) {
        int8_t* to = packed + first * LANES * padded + place * 4 * LANES;
        for (int64_t begin = 0; begin < columns; begin += LINE)
            for (int64_t lane = 0; lane < LANES; ++lane) {
                const int64_t row = source_row(chunk, lane, rows, paired);
                for (int64_t k = begin; k < begin + LINE && k < columns; k += 4) {
                    uint32_t quad = 0;
                    const int64_t left = columns - k;
                    if (row < rows && left >= 4) std::memcpy(&quad, values + row * columns + k, 4);
                    else if (row < rows) std::memcpy(&quad, values + row * columns + k, size_t(left));
                    const uint32_t raised = quad ^ TOPS;  // a byte is 0 where it was -128
                    extremes |= (raised - ONES) & ~raised & TOPS;
                    quad ^= flip;
                    std::memcpy(to + k * height * LANES + 4 * lane, &quad, 4);
                }
            }
    });
    return extremes != 0;
}

}  // namespace

bool pack_values(const void* values, int64_t rows, int64_t columns, int64_t item_bytes,
                 int64_t chunks, bool paired, bool offset, void* packed) {
    if (item_bytes == 1)
        return pack_bytes(static_cast<const int8_t*>(values), rows, columns, chunks, paired, offset,
                          static_cast<int8_t*>(packed));
    if (item_bytes == 2)
        pack_items(static_cast<const uint16_t*>(values), rows, columns, chunks, paired,
                   static_cast<uint16_t*>(packed));
    else
        pack_items(static_cast<const float*>(values), rows, columns, chunks, paired,
                   static_cast<float*>(packed));
    return false;
}

void pack_scales(const float* scales, int64_t rows, int64_t groups, int64_t chunks, bool paired,
                 float* packed) {
    each_chunk(rows, chunks, [&](int64_t chunk, int64_t height, int64_t place, int64_t first) {
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t lane = 0; lane < LANES; ++lane) {
                const int64_t row = source_row(chunk, lane, rows, paired);
                packed[first * LANES * groups + (g * height + place) * LANES + lane] =
                    row < rows ? scales[row * groups + g] : 0.0f;
            }
    });
}

}  // namespace roofline
