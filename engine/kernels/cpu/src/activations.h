// Rows on their way into a matrix product: as the product wants them.
#pragma once

#include "formats.h"

namespace {

// Which form a product reads its input in. Same numbers in kernels.py.
enum InputForm : int64_t { FLOAT32 = 0, BFLOAT16 = 1, INT8_GROUPS = 2 };

int64_t input_row_bytes(int64_t form, int64_t size) {
    if (form == INT8_GROUPS) return divide_up(size, ACTIVATION_GROUP) * int64_t(sizeof(ActivationGroup));
    if (form == BFLOAT16) return divide_up(size, 2) * 4;
    return size * 4;
}

// 32 numbers as codes of -127..127 times a scale. One that is not finite makes the scale a NaN.
INLINE void quantise_group(Floats low, Floats high, ActivationGroup& out) {
    float largest = max_of_lanes(maximum(absolute(low), absolute(high)));
    if (equal_mask(multiply_add(low, zero(), high * zero()), zero()) != 0xffff) largest = __builtin_nanf("");
    const Floats inverse = fill(largest > 0 ? 127.0f / largest : 0.0f);
    Ints low_codes = to_nearest(low * inverse), high_codes = to_nearest(high * inverse);
    store_int8(out.codes, low_codes);
    store_int8(out.codes + LANES, high_codes);
    // The codes of what is not finite are the lowest integers, whose sums may wrap; the scale tells what they are worth.
    const int32_t sums[2] = {sum_of_lanes(low_codes), sum_of_lanes(high_codes)};
    out.scale = largest / 127.0f;
    out.scaled_sum = out.scale * (float(sums[0]) + float(sums[1]));
    for (int i = 0; i < 2; i++) out.negative_sums[i] = int32_t(0 - uint32_t(sums[i]));
}

// Writes values[size] in the wanted form, padded with zeros to whole groups or pairs.
inline void write_input_row(const float* values, int64_t size, int64_t form, uint8_t* out) {
    if (form == INT8_GROUPS) {
        ActivationGroup* groups = (ActivationGroup*)out;
        for (int64_t k = 0; k < size; k += ACTIVATION_GROUP) {
            int64_t left = size - k;
            Floats low = left >= LANES ? load(values + k) : load_some(values + k, left);
            Floats high = left >= 2 * LANES ? load(values + k + LANES)
                          : left > LANES ? load_some(values + k + LANES, left - LANES) : zero();
            quantise_group(low, high, groups[k / ACTIVATION_GROUP]);
        }
    } else if (form == BFLOAT16) {
        uint16_t* pairs = (uint16_t*)out;
        int64_t k = 0;
        for (; k + LANES <= size; k += LANES) store_bfloat16(pairs + k, load(values + k));
        for (; k < size; k++) pairs[k] = float_to_bfloat16(values[k]);
        if (size % 2) pairs[size] = 0;
    } else {
        memcpy(out, values, size_t(size) * 4);
    }
}

struct PrepareParameters {
    const int64_t* num_rows;
    const float* input;
    int64_t row_stride;  // floats
    int64_t size;
    int64_t form;
    uint8_t* output;
    int64_t output_stride;  // bytes
};

// How many of the tasks a thread takes at a time: few for balance, but asking costs a transfer between cores, and rows
// that lie side by side share cache lines.
constexpr int64_t PIECES_OF_A_THREAD = 4;
inline int64_t grain_of(const Worker& worker, int64_t num_tasks) {
    return max_of(1, num_tasks / (PIECES_OF_A_THREAD * num_threads(worker)));
}

void prepare(const void* parameters, const Worker& worker) {
    const PrepareParameters& p = *(const PrepareParameters*)parameters;
    const int64_t num_rows = *p.num_rows, grain = grain_of(worker, num_rows);
    for (int64_t first; (first = next_task(worker, grain)) < num_rows;)
        for (int64_t row = first; row < min_of(first + grain, num_rows); row++)
            write_input_row(p.input + row * p.row_stride, p.size, p.form, p.output + row * p.output_stride);
}

}  // namespace
