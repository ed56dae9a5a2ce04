// The input rows of a matrix product, in the form that its weights need.
#pragma once

#include "formats.h"

namespace {

// The form of a product's input. weights.py has the same numbers.
enum InputForm : int64_t { FLOAT32 = 0, BFLOAT16 = 1, INT8_GROUPS = 2 };

int64_t input_row_bytes(int64_t form, int64_t size) {
    if (form == INT8_GROUPS) return divide_up(size, ACTIVATION_GROUP) * int64_t(sizeof(ActivationGroup));
    if (form == BFLOAT16) return divide_up(size, ROW_PADDING) * ROW_PADDING * 2;
    return size * 4;
}

constexpr int64_t FOUR_GROUPS = 4 * ACTIVATION_GROUP;

// Quantises up to 128 numbers in groups of 32: codes of -127..127 times a scale, which is NaN if a number is not finite.
INLINE void quantise_groups(const float* values, int64_t size, ActivationGroup* out) {
    Floats x[8];
    for (int i = 0; i < 8; i++) {
        const int64_t left = size - i * LANES;
        x[i] = left >= LANES ? load(values + i * LANES) : left > 0 ? load_some(values + i * LANES, left) : zero();
    }
    // Without the sign, numbers have the same order as their bits, and those that are not finite come last.
    Ints bits[4];
    for (int g = 0; g < 4; g++) bits[g] = maximum(as_ints(absolute(x[2 * g])), as_ints(absolute(x[2 * g + 1])));
    const __m128i most = maxima_of_lanes(bits[0], bits[1], bits[2], bits[3]);
    const __m128i not_finite = _mm_cmpgt_epi32(most, _mm_set1_epi32(0x7f7fffff));
    const __m128 largest = _mm_castsi128_ps(_mm_or_si128(most, not_finite)), highest_code = _mm_set1_ps(127.0f);
    const __m128 scale = _mm_div_ps(largest, highest_code);
    float inverses[4], scales[4], scaled_sums[4];
    _mm_storeu_ps(inverses, _mm_and_ps(_mm_div_ps(highest_code, largest), _mm_cmpgt_ps(largest, _mm_setzero_ps())));
    Ints codes[8];
    for (int i = 0; i < 8; i++) codes[i] = to_nearest(x[i] * fill(inverses[i / 2]));
    // Numbers that are not finite get the lowest integer as code, so sums may wrap; the NaN of the scale covers it.
    const __m128i low = sums_of_lanes(codes[0], codes[2], codes[4], codes[6]);
    const __m128i high = sums_of_lanes(codes[1], codes[3], codes[5], codes[7]);
    int32_t negative_sums[2][4];
    _mm_storeu_si128((__m128i*)negative_sums[0], _mm_sub_epi32(_mm_setzero_si128(), low));
    _mm_storeu_si128((__m128i*)negative_sums[1], _mm_sub_epi32(_mm_setzero_si128(), high));
    _mm_storeu_ps(scales, scale);
    _mm_storeu_ps(scaled_sums, _mm_mul_ps(scale, _mm_add_ps(_mm_cvtepi32_ps(low), _mm_cvtepi32_ps(high))));
    for (int64_t g = 0; g * ACTIVATION_GROUP < size; g++) {
        store_int8(out[g].codes, codes[2 * g]);
        store_int8(out[g].codes + LANES, codes[2 * g + 1]);
        out[g].scale = scales[g];
        out[g].scaled_sum = scaled_sums[g];
        for (int i = 0; i < 2; i++) out[g].negative_sums[i] = negative_sums[i][g];
    }
}

inline void write_bfloat16(const float* values, int64_t size, uint16_t* out) {
    int64_t k = 0;
    for (; k + LANES <= size; k += LANES) store_bfloat16(out + k, load(values + k));
    for (; k < size; k++) out[k] = float_to_bfloat16(values[k]);
}

// Writes values[size] in an input form, padded with zeros.
inline void write_input_row(const float* values, int64_t size, int64_t form, uint8_t* out) {
    if (form == INT8_GROUPS) {
        ActivationGroup* groups = (ActivationGroup*)out;
        for (int64_t k = 0; k < size; k += FOUR_GROUPS)
            quantise_groups(values + k, min_of(FOUR_GROUPS, size - k), groups + k / ACTIVATION_GROUP);
    } else if (form == BFLOAT16) {
        write_bfloat16(values, size, (uint16_t*)out);
        memset(out + 2 * size, 0, size_t(input_row_bytes(BFLOAT16, size) - 2 * size));
    } else {
        memcpy(out, values, size_t(size) * 4);
    }
}

// Writes values[size] to a row from `start` on, a multiple of ACTIVATION_GROUP.
inline void write_prepared(
    const PreparedRows& prepared, const RowCounts& counts, int64_t row, int64_t start, const float* values, int64_t size) {
    if (prepared.rows == nullptr) return;
    const int64_t form = row < counts.generated ? prepared.form : prepared.prompt_form;
    write_input_row(values, size, form, prepared.rows + row * prepared.stride + input_row_bytes(form, start));
}

// Tasks that a thread takes at a time. Few give better balance, but each request costs a transfer between cores, and
// adjacent rows share cache lines.
constexpr int64_t PIECES_OF_A_THREAD = 4;
inline int64_t grain_of(const Worker& worker, int64_t num_tasks) {
    return max_of(1, num_tasks / (PIECES_OF_A_THREAD * num_threads(worker)));
}

inline void prepare(const void* parameters, const Worker& worker) {
    const PrepareParameters& p = *(const PrepareParameters*)parameters;
    const int64_t num_rows = p.num_rows->all;
    for (Tasks tasks(worker, num_rows, grain_of(worker, num_rows)); tasks.next();)
        for (int64_t row = tasks.first; row < tasks.last; row++)
            write_prepared(p.output, *p.num_rows, row, 0, p.input + row * p.row_stride, p.size);
}

}  // namespace
