#define RL_ISA avx2
#include "backend.h"

namespace roofline {
const Backend& backend_avx2() {
    static const Backend backend = avx2::make_backend("avx2");
    return backend;
}
}  // namespace roofline
