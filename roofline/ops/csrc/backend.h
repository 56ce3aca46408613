// The table of one ISA's kernels; each isa_*.cpp sets RL_ISA, includes this and is compiled for it.
#pragma once

#include "ops.h"
#include "peaks.h"
#include "quantize.h"
#include "sampling.h"
#include "truncation.h"

namespace roofline {
namespace RL_ISA {

template <class X>
static void fill_table(Kernel* table) {
    table[EMBED] = embed;
    table[NORM_QKV_ROPE_STORE] = norm_qkv_rope_store<X>;
    table[ATTENTION] = attention<X>;
    table[LINEAR] = linear<X>;
    table[NORM_GATE_UP_SWIGLU] = norm_gate_up_swiglu<X>;
    table[NORM_HEAD] = norm_head<X>;
    table[TRUNCATE] = truncate;
    table[CHOOSE] = choose;
    table[READ_MEMORY] = read_memory;
    table[DOT_ACTIVATIONS] = dot_floats<X>;
    table[DOT_INT8] = dot_int8;
    table[QUANTIZE] = quantize<X>;
}

static Backend make_backend(const char* name) {
    Backend backend{};
    backend.name = name;
    fill_table<uint16_t>(backend.bfloat16);
    fill_table<float>(backend.float32);
    return backend;
}

}  // namespace RL_ISA
}  // namespace roofline
