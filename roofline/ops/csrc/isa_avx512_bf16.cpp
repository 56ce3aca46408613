#define RL_ISA avx512_bf16
#include "backend.h"

namespace roofline {
const Backend& backend_avx512_bf16() {
    static const Backend backend = avx512_bf16::make_backend("avx512_bf16");
    return backend;
}
}  // namespace roofline
