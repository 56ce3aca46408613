#include "backend_list.h"

#if defined(ROOFLINE_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace roofline {

const Backend& backend_portable();
#if defined(__x86_64__) || defined(_M_X64)
const Backend& backend_avx2();
const Backend& backend_avx512();
const Backend& backend_avx512_bf16();
#endif
#if defined(ROOFLINE_HAS_AMX)
const Backend& backend_amx();

// Whether the CPU has AMX, and Linux lets this process use it: tiles are state that it must keep.
static bool amx_is_ours() {
    constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24, INT8 = 1u << 25;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // of arch_prctl
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (BF16 | TILE | INT8)) != (BF16 | TILE | INT8))
        return false;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
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
#if defined(ROOFLINE_HAS_AMX)
    static const bool amx = avx512_bf16 && amx_is_ours();
    if (amx && index-- == 0) return &backend_amx();
#endif
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
