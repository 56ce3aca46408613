// The C ABI that Python opens with ctypes (ops/cpu/library.py). Its version is raised with every
// change of a signature or struct, so that a stale library is refused instead of called wrongly.

#include <cstdlib>
#include <new>

#include "backend_list.h"
#include "pack.h"
#include "pool.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

using namespace roofline;

EXPORT int roofline_abi_version() { return 8; }

// Names of the ISAs this library has and this CPU can run, best first; null past the last.
EXPORT const char* roofline_isa(int index) {
    const Backend* backend = supported_backend(index);
    return backend ? backend->name : nullptr;
}

EXPORT void* roofline_pool_new(int threads) {
    try {
        return new Pool(threads);
    } catch (...) {  // no threads or no memory: Python says so
        return nullptr;
    }
}
EXPORT void roofline_pool_free(void* pool) { delete static_cast<Pool*>(pool); }

EXPORT void roofline_run(void* pool, int isa, int bfloat16, int64_t op, const void* arguments) {
    static_cast<Pool*>(pool)->run(kernel(isa, bfloat16, op), arguments);
}

EXPORT void* roofline_tape_new() { return new (std::nothrow) Tape; }
EXPORT void roofline_tape_free(void* tape) { delete static_cast<Tape*>(tape); }
EXPORT void roofline_tape_add(void* tape, int isa, int bfloat16, int64_t op, const void* arguments,
                              int64_t bytes) {
    static_cast<Tape*>(tape)->add(kernel(isa, bfloat16, op), arguments, bytes);
}
EXPORT void roofline_tape_play(void* pool, const void* tape) {
    static_cast<Pool*>(pool)->play(*static_cast<const Tape*>(tape));
}

// Whether INT8 values hold a -128.
EXPORT int roofline_pack(const void* values, const float* scales, int64_t rows, int64_t columns,
                         int64_t groups, int64_t item_bytes, int64_t chunks, int paired, int offset,
                         void* packed_values, float* packed_scales) {
    if (scales) pack_scales(scales, rows, groups, chunks, paired != 0, packed_scales);
    return pack_values(values, rows, columns, item_bytes, chunks, paired != 0, offset != 0, packed_values);
}
