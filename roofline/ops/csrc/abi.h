// What Python hands over: one flat struct per op (ops/cpu/abi.py mirrors them field by field).
// Pointers and 64-bit numbers only, so that a struct can be copied into a tape as it is.
#pragma once

#include <cstdint>

namespace roofline {

// The live sizes of a step. Ops point here, so that a tape replayed later reads the new ones.
struct Step {
    int64_t tokens;   // T
    int64_t sampled;  // S
    int64_t rows;     // R, rows of the tables that may hold a request
    int64_t broken;   // set to 1 by a head that wrote NaN or infinity
};

// OFFSET_INT8 is INT8 with 128 added, for activations that are INT8 too.
enum WeightKind : int64_t { INT8, BFLOAT16, FLOAT32, OFFSET_INT8 };

// A matrix [rows, columns] packed for SIMD lanes: blocks of `chunks` times 16 rows; in a block
// [columns / 4][chunks][16 rows][4 columns] (bfloat16: [2][16][2], float32: [4][16] inside), rows
// padded to 16, columns to 4, with zeros. INT8 scales: in a block [groups][chunks][16].
struct Weight {
    const void* values;
    const float* scales;
    int64_t rows, columns;
    int64_t group, offset;  // column k has scale (k + offset) / group
    int64_t kind;
    int64_t chunks;    // of a whole block; the last may have fewer
    int64_t extremes;  // whether -128 occurs
};

struct Embed {
    const Step* step;
    const int64_t* token_ids;
    Weight table;
    int64_t first_id;
    float* out;  // [T, H]
};

struct NormQkvRopeStore {
    const Step* step;
    float* residual;     // [T, H]
    const float* delta;  // [T, H], or null
    const float* norm;   // [H]
    double eps;
    Weight qkv;
    const float* bias;    // or null
    const float* q_norm;  // or null
    const float* k_norm;  // or null
    const float* rope;    // [2, length, D / 2]
    int64_t rope_length;
    const int64_t* positions;
    const int64_t* slots;
    void* keys;    // of this layer: [blocks, Hkv, block_tokens, D]
    void* values;  // the same
    int64_t heads, kv_heads, head_dim, block_tokens;
    void* normed;     // [T, H] activations
    void* quantized;  // room for them as INT8, with OFFSET_INT8 weights, or as AMX reads them
    float* mixed;     // [T, (Hq + 2 Hkv) D]
    void* out;        // [T, Hq, D]
};

struct Attention {
    const Step* step;
    const void* query;   // [T, Hq, D]
    const void* keys;    // of this layer
    const void* values;  // of this layer
    const int32_t* block_table;
    int64_t table_width;
    const int32_t* query_start;
    const int32_t* context_len;
    int64_t heads, kv_heads, head_dim, block_tokens;
    double scale;
    int64_t window;  // 0: none
    float* partial;  // room for what spans of long contexts bring
    int64_t partial_values;
    void* out;  // [T, Hq, D]
};

struct Linear {
    const Step* step;
    const void* x;  // [T, K]
    Weight weight;
    void* quantized;
    float* out;  // [T, N]
};

struct NormGateUpSwiglu {
    const Step* step;
    float* residual;
    const float* delta;
    const float* norm;
    double eps;
    Weight gate_up;  // gate and up rows in turn, 16 by 16
    void* normed;    // [T, H]
    void* quantized;
    void* out;       // [T, F]
};

struct NormHead {
    Step* step;
    const float* residual;
    const float* delta;
    const int64_t* sampled;  // [S]
    const float* norm;
    double eps;
    Weight head;
    void* normed;  // [S, H]
    void* quantized;
    float* out;  // [S, V]
    int64_t out_stride;
};

struct Truncate {
    const Step* step;
    float* logits;  // [S, stride]
    int64_t stride, vocab;
    const float* min_p;
    const int64_t* top_k;
    const double* top_p;
};

struct Choose {
    const Step* step;
    const float* logits;  // [S, stride]
    int64_t stride, vocab;
    const double* temperature;
    const int64_t* seed;
    const int64_t* position;
    int64_t* out;
};

// For benchmarks: `count` bytes of a buffer to read, or steps to repeat.
struct Measure {
    const void* buffer;
    int64_t count;
    float* sink;  // [64]
};

// Weights [rows, columns], rows `stride` items apart, to INT8 groups.
struct Quantize {
    const void* weights;
    int8_t* values;   // [rows, columns]
    float* scales;    // [rows, ceil(columns / group)]
    int64_t* broken;  // set to 1 where a weight is NaN or infinite
    int64_t rows, columns, stride, group;
};

enum Op : int64_t {
    EMBED,
    NORM_QKV_ROPE_STORE,
    ATTENTION,
    LINEAR,
    NORM_GATE_UP_SWIGLU,
    NORM_HEAD,
    TRUNCATE,
    CHOOSE,
    READ_MEMORY,
    DOT_ACTIVATIONS,  // of the activation dtype
    DOT_INT8,
    QUANTIZE,  // weights of the activation dtype, at load
    OPS
};

class Team;
// Every thread of the team calls an op with the same arguments.
using Kernel = void (*)(const void* arguments, Team& team);

struct Backend {
    const char* name;
    Kernel bfloat16[OPS];
    Kernel float32[OPS];
};

}  // namespace roofline
