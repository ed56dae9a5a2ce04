// The operations on each row between the matrix products: gather, norm, activation.
#pragma once

#include "activations.h"

namespace {

struct GatherParameters {
    const RowCounts* num_rows;
    const int64_t* row_index;
    const float* table;
    int64_t table_stride;  // floats
    int64_t size;
    float* output;
    int64_t output_stride;
};

void gather(const void* parameters, const Worker& worker) {
    const GatherParameters& p = *(const GatherParameters*)parameters;
    const int64_t num_rows = p.num_rows->all;
    for (Tasks tasks(worker, num_rows, grain_of(worker, num_rows)); tasks.next();)
        for (int64_t row = tasks.first; row < tasks.last; row++)
            memcpy(p.output + row * p.output_stride, p.table + p.row_index[row] * p.table_stride, size_t(p.size) * 4);
}

struct RmsNormParameters {
    const RowCounts* num_rows;
    const float* input;
    int64_t input_stride;
    int64_t size;
    const float* weight;
    double epsilon;
    float* output;  // or null
    int64_t output_stride;
    PreparedRows prepared;  // the same rows in the input form of the next product
};

constexpr int64_t MAX_ROW_PIECE = 1024;  // floats of a row in a buffer on the stack, a multiple of ACTIVATION_GROUP

// Root mean square norm (Zhang and Sennrich 2019).
inline void rms_norm_row(const RmsNormParameters& p, int64_t row) {
    const float* x = p.input + row * p.input_stride;
    Floats squares = zero();
    for (int64_t k = 0; k < p.size; k += LANES) {
        Floats v = load_some(x + k, p.size - k);
        squares = multiply_add(v, v, squares);
    }
    const float mean = sum_of_lanes(squares) / float(p.size) + float(p.epsilon);
    float root;
    _mm_store_ss(&root, _mm_sqrt_ss(_mm_set_ss(mean)));
    const Floats scale = fill(1.0f / root);
    float piece[MAX_ROW_PIECE];
    for (int64_t start = 0; start < p.size; start += MAX_ROW_PIECE) {
        const int64_t length = min_of(MAX_ROW_PIECE, p.size - start);
        for (int64_t k = 0; k < length; k += LANES) {
            const int64_t n = length - k;
            store_some(piece + k, load_some(x + start + k, n) * scale * load_some(p.weight + start + k, n), n);
        }
        if (p.output) memcpy(p.output + row * p.output_stride + start, piece, size_t(length) * 4);
        p.prepared.write(*p.num_rows, row, start, piece, length);
    }
}

void rms_norm(const void* parameters, const Worker& worker) {
    const RmsNormParameters& p = *(const RmsNormParameters*)parameters;
    const int64_t num_rows = p.num_rows->all;
    for (Tasks tasks(worker, num_rows, grain_of(worker, num_rows)); tasks.next();)
        for (int64_t row = tasks.first; row < tasks.last; row++) rms_norm_row(p, row);
}

enum Activation : int64_t { SILU = 0, GELU_TANH = 1, GELU = 2 };  // ACTIVATIONS of kernels.py

INLINE Floats silu(Floats x) { return x / (fill(1.0f) + exponential(zero() - x)); }

INLINE Floats gelu_tanh(Floats x) {
    Floats inner = fill(0.797884560802865f) * (x + fill(0.044715f) * x * x * x);
    return fill(0.5f) * x * (fill(1.0f) + tanh_of(inner));
}

INLINE Floats gelu(Floats x) {  // erf by Abramowitz and Stegun 7.1.26, error below 1.5e-7
    Floats z = absolute(x) * fill(0.707106781186548f);
    Floats t = fill(1.0f) / (fill(1.0f) + fill(0.3275911f) * z);
    Floats poly = multiply_add(fill(1.061405429f), t, fill(-1.453152027f));
    poly = multiply_add(poly, t, fill(1.421413741f));
    poly = multiply_add(poly, t, fill(-0.284496736f));
    poly = multiply_add(poly, t, fill(0.254829592f)) * t;
    Floats tail = poly * exponential(zero() - z * z);  // 1 - erf(z)
    return fill(0.5f) * x * where_less(x, zero(), tail, fill(2.0f) - tail);
}

INLINE Floats activate(Floats x, int64_t activation) {
    if (activation == SILU) return silu(x);
    return activation == GELU_TANH ? gelu_tanh(x) : gelu(x);
}

struct ActAndMulParameters {
    const RowCounts* num_rows;
    const float* gate_up;  // each row is gate, then up
    int64_t input_stride;
    int64_t size;  // of gate
    int64_t activation;
    float* output;  // or null
    int64_t output_stride;
    PreparedRows prepared;
};

constexpr int64_t ACT_PIECE = MAX_ROW_PIECE / 2;

inline void act_and_mul_piece(const ActAndMulParameters& p, int64_t row, int64_t start) {
    const int64_t length = min_of(ACT_PIECE, p.size - start);
    const float* gate = p.gate_up + row * p.input_stride + start;
    const float* up = gate + p.size;
    float piece[ACT_PIECE];
    for (int64_t k = 0; k < length; k += LANES) {
        const int64_t n = length - k;
        store_some(piece + k, activate(load_some(gate + k, n), p.activation) * load_some(up + k, n), n);
    }
    if (p.output) memcpy(p.output + row * p.output_stride + start, piece, size_t(length) * 4);
    p.prepared.write(*p.num_rows, row, start, piece, length);
}

// act(gate) * up (GLU variants, Shazeer 2020). Rows are cut into pieces, so that threads can share a row.
void act_and_mul(const void* parameters, const Worker& worker) {
    const ActAndMulParameters& p = *(const ActAndMulParameters*)parameters;
    const int64_t num_pieces = divide_up(p.size, ACT_PIECE), num_tasks = p.num_rows->all * num_pieces;
    for (Tasks tasks(worker, num_tasks, grain_of(worker, num_tasks)); tasks.next();)
        for (int64_t task = tasks.first; task < tasks.last; task++)
            act_and_mul_piece(p, task / num_pieces, task % num_pieces * ACT_PIECE);
}

}  // namespace
