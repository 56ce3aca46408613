// The ops of the contract in roofline/ops/__init__.py, run by a team. Included once per ISA.
//
// X is the type of activations and KV: uint16_t (bfloat16) or float. Inside all is float32.
#pragma once

#include "attention.h"
#include "linear.h"

namespace roofline {
namespace RL_ISA {

// out[i] = (x[i] + delta[i]) / sqrt(mean of their squares + eps) * weight[i]; delta may be null.
template <class X>
static void rms_norm(const float* x, const float* delta, const float* weight, float eps,
                     int64_t columns, X* out) {
    const auto lanes = [&](int64_t i) { return delta ? load(x + i) + load(delta + i) : load(x + i); };
    const auto lane = [&](int64_t i) { return delta ? x[i] + delta[i] : x[i]; };
    Vec squares = fill(0.0f);
    const int64_t whole = columns / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) squares = fma(lanes(i), lanes(i), squares);
    float sum = sum_lanes(squares);
    for (int64_t i = whole; i < columns; ++i) sum += lane(i) * lane(i);
    const float root = std::sqrt(sum / float(columns) + eps);
    for (int64_t i = 0; i < whole; i += LANES) store(out + i, lanes(i) / fill(root) * load(weight + i));
    for (int64_t i = whole; i < columns; ++i) put(out + i, lane(i) / root * weight[i]);
}

static void add(float* residual, const float* delta, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(residual + i, load(residual + i) + load(delta + i));
    for (; i < count; ++i) residual[i] += delta[i];
}

// residual += delta, then its norm, for every token.
template <class X>
static void add_and_norm(int64_t tokens, int64_t columns, float* residual, const float* delta,
                         const float* norm, float eps, X* out, Team& team) {
    team.run(tokens, 1, [&](int64_t t) {
        float* row = residual + t * columns;
        if (delta) add(row, delta + t * columns, columns);
        rms_norm(row, nullptr, norm, eps, columns, out + t * columns);
    });
}

static void embed(const void* arguments, Team& team) {
    const Embed& a = *static_cast<const Embed*>(arguments);
    const Weight& w = a.table;
    const int64_t columns = w.columns, bytes = item_bytes(w.kind);
    team.run(a.step->tokens, 1, [&](int64_t t) {
        float* out = a.out + t * columns;
        const int64_t row = a.token_ids[t] - a.first_id;
        if (row < 0 || row >= w.rows) {
            std::memset(out, 0, size_t(columns) * sizeof(float));
            return;
        }
        const Block block = block_at(w, row / LANES / w.chunks);
        const int64_t chunk = (row - block.first_row) / LANES, lane = row % LANES;
        for (int64_t k = 0; k < columns; ++k) {
            const char* quad = block.values + (k / 4 * block.chunks + chunk) * 64 * bytes;
            if (is_int8(w)) {
                const int64_t g = (k + w.offset) / w.group;
                const float scale = block.scales[(g * block.chunks + chunk) * LANES + lane];
                const char item = quad[4 * lane + k % 4];
                out[k] = float(w.kind == INT8 ? int8_t(item) : int(uint8_t(item)) - 128) * scale;
            } else if (w.kind == BFLOAT16) {
                const int64_t place = k % 4 / 2 * 32 + 2 * lane + k % 2;
                out[k] = bf16_to_float(reinterpret_cast<const uint16_t*>(quad)[place]);
            } else {
                out[k] = reinterpret_cast<const float*>(quad)[k % 4 * LANES + lane];
            }
        }
    });
}

// x [D] turned by the angles of its position, halves paired.
template <class X>
static void rotate(const float* x, const float* cosines, const float* sines, int64_t dim, X* out) {
    const int64_t half = dim / 2;
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const Vec a = load(x + i), b = load(x + half + i), c = load(cosines + i), s = load(sines + i);
        store(out + i, a * c - b * s);
        store(out + half + i, b * c + a * s);
    }
    for (; i < half; ++i) {
        const float a = x[i] * cosines[i] - x[half + i] * sines[i];
        const float b = x[half + i] * cosines[i] + x[i] * sines[i];
        put(out + i, a);
        put(out + half + i, b);
    }
}

template <class X>
static void norm_qkv_rope_store(const void* arguments, Team& team) {
    const NormQkvRopeStore& a = *static_cast<const NormQkvRopeStore*>(arguments);
    const int64_t tokens = a.step->tokens, hidden = a.qkv.columns, dim = a.head_dim;
    X* normed = static_cast<X*>(a.normed);
    add_and_norm(tokens, hidden, a.residual, a.delta, a.norm, float(a.eps), normed, team);
    multiply(a.qkv, tokens, normed, a.quantized, a.mixed, a.qkv.rows, team);
    const int64_t heads = a.heads + 2 * a.kv_heads;
    team.run(tokens * heads, 4, [&](int64_t task) {
        const int64_t t = task / heads, head = task % heads, position = a.positions[t];
        float* x = a.mixed + t * a.qkv.rows + head * dim;
        if (a.bias) add(x, a.bias + head * dim, dim);
        const float* cosines = a.rope + position * (dim / 2);
        const float* sines = a.rope + (a.rope_length + position) * (dim / 2);
        if (head < a.heads) {
            if (a.q_norm) rms_norm(x, nullptr, a.q_norm, float(a.eps), dim, x);
            rotate(x, cosines, sines, dim, static_cast<X*>(a.out) + (t * a.heads + head) * dim);
            return;
        }
        if (a.slots[t] < 0) return;
        const bool is_key = head < a.heads + a.kv_heads;
        const int64_t kv_head = head - a.heads - (is_key ? 0 : a.kv_heads);
        const int64_t block = a.slots[t] / a.block_tokens, place = a.slots[t] % a.block_tokens;
        const int64_t at = ((block * a.kv_heads + kv_head) * a.block_tokens + place) * dim;
        if (is_key) {
            if (a.k_norm) rms_norm(x, nullptr, a.k_norm, float(a.eps), dim, x);
            rotate(x, cosines, sines, dim, static_cast<X*>(a.keys) + at);
            return;
        }
        X* value = static_cast<X*>(a.values) + at;
        for (int64_t i = 0; i < dim; i += LANES) store(value + i, load(x + i));
    });
}

template <class X>
static void linear(const void* arguments, Team& team) {
    const Linear& a = *static_cast<const Linear*>(arguments);
    multiply(a.weight, a.step->tokens, static_cast<const X*>(a.x), a.quantized, a.out,
             a.weight.rows, team);
}

// silu(gate) * up, 16 channels
INLINE Vec swiglu(Vec gate, Vec up) {
    return gate / (fill(1.0f) + exponential(fill(0.0f) - gate)) * up;
}

template <class X>
static void norm_gate_up_swiglu(const void* arguments, Team& team) {
    const NormGateUpSwiglu& a = *static_cast<const NormGateUpSwiglu*>(arguments);
    const Weight& w = a.gate_up;
    const int64_t tokens = a.step->tokens, channels = w.rows / 2;
    X* normed = static_cast<X*>(a.normed);
    X* activated = static_cast<X*>(a.out);
    add_and_norm(tokens, w.columns, a.residual, a.delta, a.norm, float(a.eps), normed, team);
    const Input<X> input = prepare(w, tokens, normed, a.quantized, team);
    multiply_each(w, tokens, input, team,
                  [&](const Block& block, int64_t first, int count, const float* totals) {
                      for (int t = 0; t < count; ++t)
                          for (int64_t c = 0; c < block.chunks; c += 2) {
                              const float* gate = totals + (t * block.chunks + c) * LANES;
                              const int64_t channel = (block.first_row + c * LANES) / 2;
                              store(activated + (first + t) * channels + channel,
                                    swiglu(load(gate), load(gate + LANES)));
                          }
                  });
}

template <class X>
static void norm_head(const void* arguments, Team& team) {
    const NormHead& a = *static_cast<const NormHead*>(arguments);
    const int64_t hidden = a.head.columns, sampled = a.step->sampled;
    X* normed = static_cast<X*>(a.normed);
    team.run(sampled, 1, [&](int64_t s) {
        const int64_t t = a.sampled[s];
        rms_norm(a.residual + t * hidden, a.delta + t * hidden, a.norm, float(a.eps), hidden,
                 normed + s * hidden);
    });
    multiply(a.head, sampled, normed, a.quantized, a.out, a.out_stride, team,
             &a.step->broken);
}

}  // namespace RL_ISA
}  // namespace roofline
