#define RL_ISA portable
#include "backend.h"

namespace roofline {
const Backend& backend_portable() {
    static const Backend backend = portable::make_backend("portable");
    return backend;
}
}  // namespace roofline
