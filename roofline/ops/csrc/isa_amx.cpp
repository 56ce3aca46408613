#define RL_ISA amx
#define RL_AMX
#include "backend.h"

namespace roofline {
const Backend& backend_amx() {
    static const Backend backend = amx::make_backend("amx");
    return backend;
}
}  // namespace roofline
