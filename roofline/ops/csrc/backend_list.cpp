#include "backend_list.h"

namespace roofline {

const Backend& backend_portable();
#if defined(__x86_64__) || defined(_M_X64)
const Backend& backend_avx2();
const Backend& backend_avx512();
const Backend& backend_avx512_bf16();
#endif

const Backend* supported_backend(int index) {
#if defined(__x86_64__) || defined(_M_X64)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
    const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16") &&
                             __builtin_cpu_supports("avx512vnni") &&
                             __builtin_cpu_supports("avx512vbmi");
    if (avx512_bf16 && index-- == 0) return &backend_avx512_bf16();
    if (avx512 && index-- == 0) return &backend_avx512();
    if (avx2 && index-- == 0) return &backend_avx2();
#endif
    return index == 0 ? &backend_portable() : nullptr;
}

Kernel kernel(int isa, int bfloat16, int64_t op) {
    const Backend* backend = supported_backend(isa);
    return bfloat16 ? backend->bfloat16[op] : backend->float32[op];
}

}  // namespace roofline
