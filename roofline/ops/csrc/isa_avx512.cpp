#define RL_ISA avx512
#include "backend.h"

namespace roofline {
const Backend& backend_avx512() {
    static const Backend backend = avx512::make_backend("avx512");
    return backend;
}
}  // namespace roofline
