// The ISAs this library was built for, and which of them the CPU at hand can run.
#pragma once

#include "abi.h"

namespace roofline {

const Backend* supported_backend(int index);  // best first; null past the last
Kernel kernel(int isa, int bfloat16, int64_t op);

}  // namespace roofline
