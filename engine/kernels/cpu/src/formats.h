// The layout of packed weights, for a matrix of N outputs (columns) and K inputs.
//
// A panel has 32 columns, two vectors of 16. It is one sequential stream of groups along K. A quantised group holds GROUP
// inputs of each column as unsigned codes, then a scale for each column and, if the format has one, a minimum:
// weight = scale * (code - zero) + minimum. In one step, a lane of a vector takes in the codes of four successive inputs
// of a column. bfloat16 is stored in pairs of inputs, float32 one by one.
#pragma once

#include "simd.h"

namespace {

constexpr int PANEL = 2 * LANES;  // columns
constexpr int ACTIVATION_GROUP = 32;

// 32 inputs of a row, quantised symmetrically with one scale.
struct ActivationGroup {
    int8_t codes[ACTIVATION_GROUP];
    float scale;
    float scaled_sum;  // scale * sum of codes
    int32_t negative_sums[2];  // minus the sum of the codes, for each half
};
static_assert(sizeof(ActivationGroup) == 48);

struct Half {
    static constexpr int SIZE = 2;
    static INLINE Floats load_vector(const uint8_t* p) { return load_half((const uint16_t*)p); }
    static float load_one(const uint8_t* p) { uint16_t x; memcpy(&x, p, 2); return half_to_float(x); }
    static void store_one(uint8_t* p, float value) { uint16_t x = float_to_half(value); memcpy(p, &x, 2); }
};

struct Single {
    static constexpr int SIZE = 4;
    static INLINE Floats load_vector(const uint8_t* p) { return load((const float*)p); }
    static float load_one(const uint8_t* p) { float x; memcpy(&x, p, 4); return x; }
    static void store_one(uint8_t* p, float value) { memcpy(p, &value, 4); }
};

// BITS of a code; GROUP inputs with one scale; log2 of the zero point, or -1 if there is a minimum instead.
template <int BITS_, int GROUP_, class Scale_, int ZERO_SHIFT_>
struct Quantised {
    static constexpr int BITS = BITS_, GROUP = GROUP_, ZERO_SHIFT = ZERO_SHIFT_;
    using Scale = Scale_;
    static constexpr bool HAS_MINIMUM = ZERO_SHIFT < 0;
    static constexpr int STEPS = GROUP / 4;
    static constexpr int NIBBLE_BYTES = BITS == 8 ? GROUP * LANES : GROUP * LANES / 2;
    static constexpr int HIGH_BYTES = BITS == 5 ? GROUP * LANES / 8 : BITS == 6 ? GROUP * LANES / 4 : 0;
    static constexpr int VECTOR_BYTES = NIBBLE_BYTES + HIGH_BYTES;  // one group of 16 columns
    static constexpr int SCALES = 2 * VECTOR_BYTES;
    static constexpr int MINIMA = SCALES + PANEL * Scale::SIZE;
    static constexpr int GROUP_BYTES = MINIMA + (HAS_MINIMUM ? PANEL * Scale::SIZE : 0);
    static constexpr int GROUPS_OF_ACTIVATION = ACTIVATION_GROUP / GROUP;

    // Returns the codes of one step: four inputs of 16 columns.
    template <int STEP>
    static INLINE Bytes codes(const uint8_t* vector) {
        if constexpr (BITS == 8) return load_bytes(vector + 64 * STEP);
        constexpr bool is_high = STEP >= STEPS / 2;
        Bytes packed = load_bytes(vector + 64 * (is_high ? STEP - STEPS / 2 : STEP));
        Bytes nibbles = is_high ? high_nibbles(packed) : low_nibbles(packed);
        if constexpr (BITS == 5) return nibbles | fifth_bits(vector + NIBBLE_BYTES + 8 * STEP);
        if constexpr (BITS == 6) return nibbles | two_bits<2 * (STEP % 4)>(load_bytes(vector + NIBBLE_BYTES));
        return nibbles;
    }

    static int code(const uint8_t* vector, int lane, int input) {
        int step = input / 4, index = 4 * lane + input % 4;
        if (BITS == 8) return vector[64 * step + index];
        bool is_high = step >= STEPS / 2;
        int nibble = vector[64 * (is_high ? step - STEPS / 2 : step) + index] >> (is_high ? 4 : 0) & 15;
        if (BITS == 5) return nibble | (vector[NIBBLE_BYTES + 8 * step + index / 8] >> index % 8 & 1) << 4;
        if (BITS == 6) return nibble | (vector[NIBBLE_BYTES + index] >> 2 * step & 3) << 4;
        return nibble;
    }

    // Stores the codes of a lane's GROUP inputs into zeroed memory. Four successive inputs are one word.
    static INLINE void set_codes(uint8_t* vector, int lane, const uint8_t* codes) {
        constexpr int HALF = BITS == 8 ? 0 : GROUP / 2, NUM_BYTES = GROUP - HALF;
        uint8_t bytes[NUM_BYTES];
        for (int i = 0; i < NUM_BYTES; i++)
            bytes[i] = BITS == 8 ? codes[i] : uint8_t((codes[i] & 15) | codes[i + HALF] << 4);
        for (int i = 0; i < NUM_BYTES; i += 4) memcpy(vector + 16 * i + 4 * lane, bytes + i, 4);
        for (int i = 0; i < GROUP && HIGH_BYTES > 0; i++) {
            int step = i / 4, index = 4 * lane + i % 4;
            if (BITS == 5) vector[NIBBLE_BYTES + 8 * step + index / 8] |= uint8_t((codes[i] >> 4 & 1) << index % 8);
            if (BITS == 6) vector[NIBBLE_BYTES + index] |= uint8_t((codes[i] >> 4 & 3) << 2 * step);
        }
    }

    static float zero_point() { return HAS_MINIMUM ? 0.0f : float(1 << (HAS_MINIMUM ? 0 : ZERO_SHIFT)); }

    // Returns input `k` of column `column` of a panel.
    static float weight(const uint8_t* panel, int column, int64_t k) {
        const uint8_t* group = panel + k / GROUP * GROUP_BYTES;
        int vector = column / LANES, lane = column % LANES;
        float scale = Scale::load_one(group + SCALES + column * Scale::SIZE);
        float minimum = HAS_MINIMUM ? Scale::load_one(group + MINIMA + column * Scale::SIZE) : 0.0f;
        return scale * (float(code(group + vector * VECTOR_BYTES, lane, int(k % GROUP))) - zero_point()) + minimum;
    }

    static int64_t panel_bytes(int64_t num_inputs) { return divide_up(num_inputs, GROUP) * GROUP_BYTES; }
};

using Q4_0 = Quantised<4, 32, Half, 3>;
using Q4_1 = Quantised<4, 32, Half, -1>;
using Q5_0 = Quantised<5, 32, Half, 4>;
using Q5_1 = Quantised<5, 32, Half, -1>;
using Q8_0 = Quantised<8, 32, Half, 7>;
using Q4_K = Quantised<4, 32, Single, -1>;
using Q5_K = Quantised<5, 32, Single, -1>;
using Q6_K = Quantised<6, 16, Single, 5>;

constexpr int64_t ROW_PADDING = 32;  // rows of bfloat16 are padded with zeros to a multiple of this

struct BFloat16 {
    static constexpr int STEP_BYTES = PANEL * 4;  // two inputs of each column
    static float weight(const uint8_t* panel, int column, int64_t k) {
        uint16_t x;
        memcpy(&x, panel + k / 2 * STEP_BYTES + column * 4 + k % 2 * 2, 2);
        return bfloat16_to_float(x);
    }
    static int64_t panel_bytes(int64_t num_inputs) { return divide_up(num_inputs, ROW_PADDING) * (ROW_PADDING / 2) * STEP_BYTES; }
};

struct Float32 {
    static constexpr int STEP_BYTES = PANEL * 4;
    static float weight(const uint8_t* panel, int column, int64_t k) {
        return Single::load_one(panel + k * STEP_BYTES + column * 4);
    }
    static int64_t panel_bytes(int64_t num_inputs) { return num_inputs * STEP_BYTES; }
};

}  // namespace
