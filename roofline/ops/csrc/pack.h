// From rows as a checkpoint has them to the blocks that SIMD lanes read (`Weight` in abi.h).
#pragma once

#include <cstdint>

namespace roofline {

// Whether values of INT8 hold a -128. `offset`: INT8 with 128 added. `paired`: the rows' first and second half in turn, 16 by 16 (gate and up of a SwiGLU).
bool pack_values(const void* values, int64_t rows, int64_t columns, int64_t item_bytes,
                 int64_t chunks, bool paired, bool offset, void* packed);
void pack_scales(const float* scales, int64_t rows, int64_t groups, int64_t chunks, bool paired,
                 float* packed);

}  // namespace roofline
