// The operations on each row between the matrix products: gather, sums, scales, activations.
#pragma once

#include "norms.h"

namespace {

void gather(const void* parameters, const Worker& worker) {
    const GatherParameters& p = *(const GatherParameters*)parameters;
    const int64_t num_rows = p.num_rows->all;
    for (Tasks tasks(worker, num_rows, grain_of(worker, num_rows)); tasks.next();)
        for (int64_t row = tasks.first; row < tasks.last; row++)
            memcpy(p.output + row * p.output_stride, p.table + p.row_index[row] * p.table_stride, size_t(p.size) * 4);
}

// Adds scale * input to the output.
void add(const void* parameters, const Worker& worker) {
    const AddParameters& p = *(const AddParameters*)parameters;
    const int64_t num_rows = p.num_rows->all;
    for (Tasks tasks(worker, num_rows, grain_of(worker, num_rows)); tasks.next();)
        for (int64_t row = tasks.first; row < tasks.last; row++)
            add_to(p.output + row * p.output_stride, p.input + row * p.input_stride, p.size, float(p.scale));
}

constexpr int64_t SCALE_PIECE = 4096;  // floats that a thread takes at a time, because one row of logits is long

inline void scale_piece(const ScaleParameters& p, float* x, int64_t size) {
    const bool is_capped = p.softcap != 0;
    const Floats cap = fill(float(p.softcap)), scale = fill(float(is_capped ? p.scale / p.softcap : p.scale));
    for (int64_t k = 0; k < size; k += LANES) {
        const Floats v = load_some(x + k, size - k), scaled = v * scale;
        // The product keeps numbers that are not finite, which a cap would hide.
        store_some(x + k, is_capped ? multiply_add(v, zero(), cap * tanh_of(scaled)) : scaled, size - k);
    }
}

void scale(const void* parameters, const Worker& worker) {
    const ScaleParameters& p = *(const ScaleParameters*)parameters;
    const int64_t num_pieces = divide_up(p.size, SCALE_PIECE), num_tasks = p.num_rows->all * num_pieces;
    for (Tasks tasks(worker, num_tasks, grain_of(worker, num_tasks)); tasks.next();)
        for (int64_t task = tasks.first; task < tasks.last; task++) {
            const int64_t start = task % num_pieces * SCALE_PIECE;
            scale_piece(p, p.values + task / num_pieces * p.stride + start, min_of(SCALE_PIECE, p.size - start));
        }
}

enum Activation : int64_t { SILU = 0, GELU_TANH = 1, GELU = 2, SWIGLU_OAI = 3, SIGMOID_GATE = 4, IDENTITY = 5 };  // ACTIVATIONS of kernels.py

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

// The clamped SwiGLU of gpt-oss. In this order of operands a NaN stays a NaN.
INLINE Floats swiglu_oai(Floats gate, Floats up) {
    const Floats limit = fill(7.0f), x = minimum(limit, gate);
    const Floats bounded = maximum(zero() - limit, minimum(limit, up));
    return x / (fill(1.0f) + exponential(x * fill(-1.702f))) * (bounded + fill(1.0f));
}

INLINE Floats act_and_mul(Floats gate, Floats up, int64_t activation) {
    if (activation == SILU) return silu(gate) * up;
    if (activation == SWIGLU_OAI) return swiglu_oai(gate, up);
    if (activation == SIGMOID_GATE) return up / (fill(1.0f) + exponential(zero() - gate));
    if (activation == IDENTITY) return gate * up;
    return (activation == GELU_TANH ? gelu_tanh(gate) : gelu(gate)) * up;
}

// Multiplies each row by the sigmoid of a number.
void gate_rows(const void* parameters, const Worker& worker) {
    const GateRowsParameters& p = *(const GateRowsParameters*)parameters;
    const int64_t num_rows = p.num_rows->all;
    for (Tasks tasks(worker, num_rows, grain_of(worker, num_rows)); tasks.next();)
        for (int64_t row = tasks.first; row < tasks.last; row++) {
            const Floats one = fill(1.0f), factor = one / (one + exponential(fill(-p.gate[row * p.gate_stride])));
            const float* x = p.input + row * p.input_stride;
            float* out = p.output + row * p.output_stride;
            for (int64_t k = 0; k < p.size; k += LANES) store_some(out + k, load_some(x + k, p.size - k) * factor, p.size - k);
        }
}

constexpr int64_t ACT_PIECE = MAX_ROW_PIECE / 2;

inline void act_and_mul_piece(const ActAndMulParameters& p, int64_t row, int64_t start) {
    const int64_t length = min_of(ACT_PIECE, p.size - start);
    const float* gate = p.gate + row * p.gate_stride + start;
    const float* up = p.up + row * p.up_stride + start;
    float piece[ACT_PIECE];
    for (int64_t k = 0; k < length; k += LANES) {
        const int64_t n = length - k;
        store_some(piece + k, act_and_mul(load_some(gate + k, n), load_some(up + k, n), p.activation), n);
    }
    if (p.output) memcpy(p.output + row * p.output_stride + start, piece, size_t(length) * 4);
    write_prepared(p.prepared, *p.num_rows, row, start, piece, length);
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
