// RMS norm and layer norm of each row.
#pragma once

#include "activations.h"

namespace {

constexpr int64_t MAX_ROW_PIECE = 1024;  // floats of a row in a buffer on the stack, a multiple of ACTIVATION_GROUP

// Returns 1 / sqrt(mean of (x - center)^2 + epsilon). The RMS norm has no center, and no subtraction.
template <bool IS_CENTERED>
INLINE float inverse_deviation(const float* x, int64_t size, float center, double epsilon) {
    float centers[LANES];  // because lanes after the last number must stay zero
    if constexpr (IS_CENTERED) store(centers, fill(center));
    Floats squares = zero();
    for (int64_t k = 0; k < size; k += LANES) {
        Floats v = load_some(x + k, size - k);
        if constexpr (IS_CENTERED) v = v - load_some(centers, size - k);
        squares = multiply_add(v, v, squares);
    }
    const float mean = sum_of_lanes(squares) / float(size) + float(epsilon);
    float root;
    _mm_store_ss(&root, _mm_sqrt_ss(_mm_set_ss(mean)));
    return 1.0f / root;
}

INLINE float inverse_rms(const float* x, int64_t size, double epsilon) {
    return inverse_deviation<false>(x, size, 0.0f, epsilon);
}

INLINE float mean_of(const float* x, int64_t size) {
    Floats sum = zero();
    for (int64_t k = 0; k < size; k += LANES) sum = sum + load_some(x + k, size - k);
    return sum_of_lanes(sum) / float(size);
}

// Adds scale * x to out[size].
INLINE void add_to(float* out, const float* x, int64_t size, float scale) {
    for (int64_t k = 0; k < size; k += LANES)
        store_some(out + k, multiply_add(load_some(x + k, size - k), fill(scale), load_some(out + k, size - k)), size - k);
}

template <bool IS_CENTERED>
inline void norm_row(const NormParameters& p, int64_t row) {
    const float* x = p.input + row * p.input_stride;
    const float center = IS_CENTERED ? mean_of(x, p.size) : 0.0f;
    const Floats scale = fill(inverse_deviation<IS_CENTERED>(x, p.size, center, p.epsilon));
    float* out = p.output ? p.output + row * p.output_stride : nullptr;
    float piece[MAX_ROW_PIECE];
    for (int64_t start = 0; start < p.size; start += MAX_ROW_PIECE) {
        const int64_t length = min_of(MAX_ROW_PIECE, p.size - start);
        for (int64_t k = 0; k < length; k += LANES) {
            const int64_t n = length - k;
            Floats v = load_some(x + start + k, n);
            if constexpr (IS_CENTERED) v = v - fill(center);
            store_some(piece + k, v * scale * load_some(p.weight + start + k, n), n);
        }
        if (p.accumulate) add_to(out + start, piece, length, 1.0f);
        else if (out) memcpy(out + start, piece, size_t(length) * 4);
        write_prepared(p.prepared, *p.num_rows, row, start, piece, length);
    }
}

template <bool IS_CENTERED>
inline void norm_rows(const void* parameters, const Worker& worker) {
    const NormParameters& p = *(const NormParameters*)parameters;
    const int64_t num_rows = p.num_rows->all;
    for (Tasks tasks(worker, num_rows, grain_of(worker, num_rows)); tasks.next();)
        for (int64_t row = tasks.first; row < tasks.last; row++) norm_row<IS_CENTERED>(p, row);
}

// Root mean square norm (Zhang and Sennrich 2019).
inline void rms_norm(const void* parameters, const Worker& worker) { norm_rows<false>(parameters, worker); }

// Layer norm (Ba et al. 2016), without a bias.
inline void layer_norm(const void* parameters, const Worker& worker) { norm_rows<true>(parameters, worker); }

}  // namespace
