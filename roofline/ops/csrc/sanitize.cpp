// Every kernel of every ISA at random sizes on random threads, for the compiler's sanitizers to watch
// (`make sanitize`). Buffers are exactly as large as the contract says; results are the tests' part.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "backend_list.h"
#include "pack.h"
#include "pool.h"

using namespace roofline;

namespace {

std::mt19937 random_bits(1);

int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_bits);
}
template <class T>
T one_of(std::initializer_list<T> choices) {
    return choices.begin()[between(0, int64_t(choices.size()) - 1)];
}

// Random floats, or their upper halves where they are bfloat16.
template <class X>
std::vector<X> noise(int64_t count) {
    std::vector<X> values(static_cast<size_t>(count));
    for (X& value : values) {
        const float x = std::normal_distribution<float>()(random_bits);
        if constexpr (sizeof(X) == 4) {
            value = x;
        } else {
            uint32_t bits;
            std::memcpy(&bits, &x, 4);
            value = X(bits >> 16);
        }
    }
    return values;
}

// A packed matrix of INT8 groups, or of floats of the activations' type; and room for its input.
template <class X>
struct Matrix {
    std::vector<int8_t> bytes;
    std::vector<X> floats;
    std::vector<float> scales, room;
    Weight weight{};

    Matrix(int64_t rows, int64_t columns, bool paired, int64_t tokens) {
        const int64_t padded = (rows + 15) / 16 * 16;
        const int64_t chunks = paired ? one_of({2, 4}) : between(1, 4);
        weight.rows = rows, weight.columns = columns, weight.chunks = chunks;
        room.resize(size_t(tokens * (columns / 2 + 5 * ((columns + 31) / 32 + 1))));
        if (between(0, 3) == 0) {
            const std::vector<X> source = noise<X>(rows * columns);
            floats.resize(size_t(padded * columns));
            pack_values(source.data(), rows, columns, sizeof(X), chunks, paired, false, floats.data());
            weight.values = floats.data();
            weight.kind = sizeof(X) == 2 ? BFLOAT16 : FLOAT32;
            return;
        }
        weight.extremes = between(0, 1);
        weight.group = one_of<int64_t>({32, 64, 128, 256, columns});
        weight.offset = between(0, weight.group / 4 - 1) * 4;
        const int64_t groups = (columns + weight.offset + weight.group - 1) / weight.group;
        std::vector<int8_t> source(size_t(rows * columns));
        for (int8_t& value : source) value = int8_t(between(weight.extremes ? -128 : -127, 127));
        const std::vector<float> source_scales = noise<float>(rows * groups);
        bytes.resize(size_t(padded * columns));
        scales.resize(size_t(padded * groups));
        weight.kind = one_of({INT8, OFFSET_INT8});
        const bool offset = weight.kind == OFFSET_INT8;
        pack_values(source.data(), rows, columns, 1, chunks, paired, offset, bytes.data());
        pack_scales(source_scales.data(), rows, groups, chunks, paired, scales.data());
        weight.values = bytes.data();
        weight.scales = scales.data();
    }
};

// A layer and its ends at random sizes, with the buffers of its largest step.
template <class X>
struct Layer {
    static constexpr int64_t rows = 5, blocks_a_row = 20;
    const int64_t hidden = 4 * between(1, 60), channels = 16 * between(1, 12);
    const int64_t kv_heads = between(1, 3), heads = kv_heads * one_of({1, 2, 3, 32});
    const int64_t dim = one_of<int64_t>({16, 64, 80, 128, 256}), vocabulary = between(1, 150);
    const int64_t block_tokens = one_of<int64_t>({16, 32, 64}), tokens = rows * between(1, 26);
    const int64_t length = blocks_a_row * block_tokens, blocks = rows * blocks_a_row;
    const int64_t qkv_rows = (heads + 2 * kv_heads) * dim, pool = blocks * kv_heads * block_tokens * dim;

    Step step{};
    Matrix<X> table{vocabulary, hidden, false, tokens}, qkv{qkv_rows, hidden, false, tokens};
    Matrix<X> output{hidden, heads * dim, false, tokens}, gate_up{2 * channels, hidden, true, tokens};
    std::vector<int64_t> ids = std::vector<int64_t>(size_t(tokens)), positions = ids, slots = ids, sampled = ids, seeds = ids, chosen = ids;
    std::vector<double> temperature = std::vector<double>(size_t(tokens)), top_p = temperature;
    std::vector<int64_t> top_k = std::vector<int64_t>(size_t(tokens));
    std::vector<float> min_p = std::vector<float>(size_t(tokens));
    std::vector<int32_t> query_start = std::vector<int32_t>(rows + 1), context_len = std::vector<int32_t>(rows);
    std::vector<int32_t> block_table = std::vector<int32_t>(size_t(blocks));
    std::vector<float> residual = noise<float>(tokens * hidden), delta = residual, norm = noise<float>(hidden);
    std::vector<float> bias = noise<float>(qkv_rows), head_norm = noise<float>(dim);
    std::vector<float> rope = noise<float>(length * dim), mixed = noise<float>(tokens * qkv_rows);
    std::vector<float> partial = noise<float>(one_of<int64_t>({1, 10000, 200000}));
    std::vector<float> logits = noise<float>(tokens * vocabulary);
    std::vector<X> keys = noise<X>(pool), values = keys, query = noise<X>(tokens * heads * dim), attended = query;
    std::vector<X> normed = noise<X>(tokens * hidden), activated = noise<X>(tokens * channels);
    const int64_t group = one_of<int64_t>({1, 32, 128, 1000});
    std::vector<int8_t> quantized = std::vector<int8_t>(size_t(tokens * hidden));
    std::vector<float> quantized_scales = std::vector<float>(size_t(tokens * ((hidden + group - 1) / group)));
    int64_t broken = 0;

    // Some tokens for some rows, the others empty, or as many as there may be; a row's blocks lie one
    // after the other.
    void fill(bool all) {
        for (size_t i = 0; i < block_table.size(); ++i) block_table[i] = int32_t(i);
        int64_t total = 0;
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t most = tokens / rows, some = between(0, 2) ? between(0, most) : 0;
            const int64_t count = all ? most : some;
            const int64_t first = between(0, length - count);
            context_len[size_t(row)] = int32_t(count ? first + count : 0);
            for (int64_t i = 0; i < count; ++i, ++total) {
                positions[size_t(total)] = first + i;
                slots[size_t(total)] = row * length + first + i;
                ids[size_t(total)] = between(0, vocabulary + 3);
            }
            query_start[size_t(row + 1)] = int32_t(total);
        }
        step = {total, all ? total : between(0, total), rows, 0};
        for (size_t i = 0; i < size_t(step.sampled); ++i) {
            sampled[i] = between(0, total - 1);
            temperature[i] = double(between(0, 3)) / 2;
            min_p[i] = float(between(0, 4)) / 4;
            top_k[i] = between(0, vocabulary + 1);
            top_p[i] = double(between(1, 4)) / 4;
            seeds[i] = int64_t(random_bits()) << 32 | random_bits();
        }
    }

    void record(Tape& tape, int isa) {
        const auto add = [&](int64_t op, const auto& arguments) {
            tape.add(kernel(isa, sizeof(X) == 2, op), &arguments, sizeof arguments);
        };
        const bool flagged = between(0, 1), first = between(0, 1);
        const auto only = [&](std::vector<float>& x) { return flagged ? x.data() : nullptr; };
        add(EMBED, Embed{&step, ids.data(), table.weight, 2, residual.data()});
        add(NORM_QKV_ROPE_STORE,
            NormQkvRopeStore{&step, residual.data(), first ? nullptr : delta.data(), norm.data(), 1e-5,
                             qkv.weight, only(bias), only(head_norm), only(head_norm), rope.data(),
                             length, positions.data(), slots.data(), keys.data(), values.data(), heads,
                             kv_heads, dim, block_tokens, normed.data(), qkv.room.data(), mixed.data(),
                             query.data()});
        add(ATTENTION, Attention{&step, query.data(), keys.data(), values.data(), block_table.data(),
                                 blocks_a_row, query_start.data(), context_len.data(), heads, kv_heads,
                                 dim, block_tokens, 0.1, one_of<int64_t>({0, 1, 20, 1000}),
                                 partial.data(), int64_t(partial.size()), attended.data()});
        add(LINEAR, Linear{&step, attended.data(), output.weight, output.room.data(), delta.data()});
        add(NORM_GATE_UP_SWIGLU, NormGateUpSwiglu{&step, residual.data(), delta.data(), norm.data(), 1e-5,
                                                  gate_up.weight, normed.data(), gate_up.room.data(),
                                                  activated.data()});
        add(NORM_HEAD, NormHead{&step, residual.data(), delta.data(), sampled.data(), norm.data(), 1e-5,
                                table.weight, normed.data(), table.room.data(), logits.data(), vocabulary});
        add(TRUNCATE, Truncate{&step, logits.data(), vocabulary, vocabulary, min_p.data(), top_k.data(),
                               top_p.data()});
        add(QUANTIZE, Quantize{normed.data(), quantized.data(), quantized_scales.data(), &broken, tokens,
                               hidden, hidden, group});
        add(CHOOSE, Choose{&step, logits.data(), vocabulary, vocabulary, temperature.data(), seeds.data(),
                           positions.data(), chosen.data()});
    }
};

template <class X>
void check(int isa) {
    Layer<X> layer;
    Tape tape;
    layer.record(tape, isa);
    Pool pool(int(between(1, 5)));
    for (int i = 0; i < 4; ++i) {
        layer.fill(i == 0);
        pool.play(tape);
        if (between(0, 5) == 0) std::this_thread::sleep_for(std::chrono::milliseconds(3));  // they sleep
    }
}

// The yardsticks of benchmarks/kernels.py.
void measure(int isa) {
    std::vector<float> buffer(1 << 17), sink(64);
    for (const int64_t op : {READ_MEMORY, DOT_ACTIVATIONS, DOT_INT8})
        for (const int bfloat16 : {0, 1}) {
            const int64_t count = op == READ_MEMORY ? int64_t(sizeof(float) * buffer.size()) : 1000;
            const Measure arguments{buffer.data(), count, sink.data()};
            Tape tape;
            tape.add(kernel(isa, bfloat16, op), &arguments, sizeof arguments);
            Pool pool(int(between(1, 5)));
            pool.play(tape);
        }
}

}  // namespace

int main(int count, char** arguments) {
    const int rounds = count > 1 ? std::atoi(arguments[1]) : 8;
    for (int isa = 0; supported_backend(isa); ++isa) {
        measure(isa);
        for (int i = 0; i < rounds; ++i) {
            check<uint16_t>(isa);
            check<float>(isa);
        }
        std::printf("%s: %d layers\n", supported_backend(isa)->name, 2 * rounds);
    }
}
