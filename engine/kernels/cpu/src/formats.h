// The layout of packed weights, for a matrix of N outputs (columns) and K inputs.
//
// A panel has 32 columns, two vectors of 16. It is one sequential stream of blocks along K. A quantised block begins with
// the scales of its columns, and their minima if the format has some. The codes of its groups follow, which are unsigned:
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

struct Brain {  // the upper half of a float32, which has all powers of two
    static constexpr int SIZE = 2;
    static INLINE Floats load_vector(const uint8_t* p) { return load_bfloat16((const uint16_t*)p); }
    static float load_one(const uint8_t* p) { uint16_t x; memcpy(&x, p, 2); return bfloat16_to_float(x); }
    static void store_one(uint8_t* p, float value) { uint16_t x = float_to_bfloat16(value); memcpy(p, &x, 2); }
};

// A column's numbers in a block.
struct BlockNumbers {
    uint8_t codes[256];
    float scales[16], minima[16];  // of each group
    float scale, minimum;  // of the block, by which those of groups are multiplied, if the format has some
};

enum Field { SCALE, MINIMUM };

// A scale for each 32 inputs, and if FIELDS is 2 a minimum.
template <class Number, int FIELDS>
struct GroupScales {
    static constexpr int BLOCK = 32, BYTES = FIELDS * PANEL * Number::SIZE;
    static constexpr bool HAS_MINIMUM = FIELDS == 2;

    template <Field FIELD>
    static INLINE Floats load_vector(const uint8_t* block, int, int column) {
        return Number::load_vector(block + (FIELD * PANEL + column) * Number::SIZE);
    }
    template <Field FIELD>
    static float load_one(const uint8_t* block, int, int column) {
        return Number::load_one(block + (FIELD * PANEL + column) * Number::SIZE);
    }
    static void store_column(uint8_t* block, int column, const BlockNumbers& numbers) {
        Number::store_one(block + column * Number::SIZE, numbers.scales[0]);
        if (HAS_MINIMUM) Number::store_one(block + (PANEL + column) * Number::SIZE, numbers.minima[0]);
    }
};

// Scales, and if FIELDS is 2 minima, of the GROUPS groups of 256 inputs: integers in half precision's multiples. The
// integers take a byte each, or half a byte if they are NIBBLES: then a scale and a minimum share a byte.
template <int GROUPS, int FIELDS, bool NIBBLES = false>
struct BlockScales {
    static constexpr int BLOCK = 256, INTEGERS = FIELDS * PANEL * Half::SIZE;
    static constexpr int BYTES = INTEGERS + (NIBBLES ? 1 : FIELDS) * GROUPS * PANEL;
    static constexpr bool HAS_MINIMUM = FIELDS == 2;

    template <Field FIELD>
    static INLINE Floats load_vector(const uint8_t* block, int group, int column) {
        const uint8_t* integers = block + INTEGERS + ((NIBBLES ? 0 : FIELD * GROUPS) + group) * PANEL + column;
        const Floats scale = Half::load_vector(block + (FIELD * PANEL + column) * Half::SIZE);
        if constexpr (!NIBBLES) return load_int8((const int8_t*)integers) * scale;
        return to_floats(shift_right<FIELD * 4>(load_uint8(integers)) & fill_ints(15)) * scale;
    }
    // Multiplies all scales and minima of a block, for the other `load_vector`.
    static INLINE void unpack(const uint8_t* block, float* out) {
        for (int g = 0; g < GROUPS; g++)
            for (int column = 0; column < PANEL; column += LANES) {
                float* scales = out + FIELDS * PANEL * g + column;
                store(scales, load_vector<SCALE>(block, g, column));
                if (HAS_MINIMUM) store(scales + PANEL, load_vector<MINIMUM>(block, g, column));
            }
    }
    template <Field FIELD>
    static INLINE Floats load_vector(const float* unpacked, int group, int column) {
        return load(unpacked + (FIELDS * group + FIELD) * PANEL + column);
    }
    template <Field FIELD>
    static float load_one(const uint8_t* block, int group, int column) {
        const uint8_t integer = block[INTEGERS + ((NIBBLES ? 0 : FIELD * GROUPS) + group) * PANEL + column];
        const float scale = Half::load_one(block + (FIELD * PANEL + column) * Half::SIZE);
        return float(NIBBLES ? integer >> FIELD * 4 & 15 : int8_t(integer)) * scale;
    }
    static void store_column(uint8_t* block, int column, const BlockNumbers& numbers) {
        Half::store_one(block + column * Half::SIZE, numbers.scale);
        if (HAS_MINIMUM) Half::store_one(block + (PANEL + column) * Half::SIZE, numbers.minimum);
        for (int g = 0; g < GROUPS; g++) {
            uint8_t* integers = block + INTEGERS + g * PANEL + column;
            integers[0] = uint8_t(int(numbers.scales[g]) | (NIBBLES ? int(numbers.minima[g]) << 4 : 0));
            if (HAS_MINIMUM && !NIBBLES) integers[GROUPS * PANEL] = uint8_t(int(numbers.minima[g]));
        }
    }
};

// A scale and a zero point, one byte, for each 32 inputs: the minimum is minus their product.
template <class Number>
struct ZeroPoints {
    static constexpr int BLOCK = 32, POINTS = PANEL * Number::SIZE, BYTES = POINTS + PANEL;
    static constexpr bool HAS_MINIMUM = true;

    template <Field FIELD>
    static INLINE Floats load_vector(const uint8_t* block, int, int column) {
        const Floats scale = Number::load_vector(block + column * Number::SIZE);
        if constexpr (FIELD == SCALE) return scale;
        return to_floats(load_uint8(block + POINTS + column)) * (scale * fill(-1));
    }
    template <Field FIELD>
    static float load_one(const uint8_t* block, int, int column) {
        const float scale = Number::load_one(block + column * Number::SIZE);
        return FIELD == SCALE ? scale : -scale * float(block[POINTS + column]);
    }
    static void store_column(uint8_t* block, int column, const BlockNumbers& numbers) {
        Number::store_one(block + column * Number::SIZE, numbers.scales[0]);
        block[POINTS + column] = uint8_t(numbers.minima[0]);
    }
};

// Codes of LOW + HIGH bits, of groups with one scale. The zero point is 2^ZERO_SHIFT, or 0 if there is a minimum.
// Several steps share the bytes of their low bits: the first half of them the lower nibbles, for example.
template <int LOW, int HIGH, int GROUP_, int ZERO_SHIFT_ = 0>
struct Codes {
    static constexpr int BITS = LOW + HIGH, GROUP = GROUP_, ZERO_SHIFT = ZERO_SHIFT_, STEPS = GROUP / 4;
    static constexpr int LOADS = STEPS * LOW / 8;
    static constexpr int LOW_BYTES = LOADS * 64, HIGH_BYTES = STEPS * 8 * HIGH;  // of a vector
    static_assert(HIGH < 2 || STEPS == 4);  // all two-bit numbers share 64 bytes

    // Returns the codes of one step: four inputs of 16 columns.
    template <int STEP>
    static INLINE Bytes load(const uint8_t* low, const uint8_t* high) {
        Bytes codes = load_bytes(low + 64 * (STEP % LOADS));
        if constexpr (LOW < 8) codes = move_bits<LOW, STEP / LOADS * LOW, 0>(codes);
        if constexpr (HIGH == 1) return codes | spread_bits<LOW>(high + 8 * STEP);
        if constexpr (HIGH == 2) return codes | move_bits<2, 2 * STEP, LOW>(load_bytes(high));
        return codes;
    }

    static int load_one(const uint8_t* low, const uint8_t* high, int lane, int input) {
        const int step = input / 4, index = 4 * lane + input % 4;
        const int code = low[64 * (step % LOADS) + index] >> step / LOADS * LOW & ((1 << LOW) - 1);
        if (HIGH == 1) return code | (high[8 * step + index / 8] >> index % 8 & 1) << LOW;
        if (HIGH == 2) return code | (high[index] >> 2 * step & 3) << LOW;
        return code;
    }

    // Stores the codes of a lane's GROUP inputs into zeroed memory. Four successive inputs are one word.
    static INLINE void store(uint8_t* low, uint8_t* high, int lane, const uint8_t* codes) {
        constexpr uint32_t BYTE = 0x01010101;
        uint32_t low_words[LOADS] = {}, high_word = 0;
        for (int step = 0; step < STEPS; step++) {
            const uint32_t four = uint32_t(load_int32(codes + 4 * step)), above = four >> LOW % 8;
            low_words[step % LOADS] |= (four & BYTE * ((1 << LOW) - 1)) << step / LOADS * LOW;
            if (HIGH == 2) high_word |= (above & BYTE * 3) << 2 * step;
            for (int i = 0; i < 4 && HIGH == 1; i++)
                high[8 * step + lane / 2] |= uint8_t((above >> 8 * i & 1) << (lane % 2 * 4 + i));
        }
        for (int i = 0; i < LOADS; i++) memcpy(low + 64 * i + 4 * lane, &low_words[i], 4);
        if (HIGH == 2) memcpy(high + 4 * lane, &high_word, 4);
    }
};

// Codes of four bits that stand for the 8-bit codes of a table.
template <class Table>
struct TableCodes : Codes<4, 0, 32, Table::ZERO_SHIFT> {
    using Indices = Codes<4, 0, 32, Table::ZERO_SHIFT>;
    static constexpr int BITS = Table::BITS;

    template <int STEP>
    static INLINE Bytes load(const uint8_t* low, const uint8_t* high) {
        return look_up(Indices::template load<STEP>(low, high), Table::CODES);
    }
    static int load_one(const uint8_t* low, const uint8_t* high, int lane, int input) {
        return Table::CODES[Indices::load_one(low, high, lane, input)];
    }
};

struct NonLinearTable {  // kvalues_iq4nl of ggml-common.h, plus 128
    static constexpr int BITS = 8, ZERO_SHIFT = 7;
    static constexpr uint8_t CODES[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
};

struct Float4Table {  // e2m1, doubled: 0, 1, 2, 3, 4, 6, 8, 12 and the same with a minus, plus 16
    static constexpr int BITS = 5, ZERO_SHIFT = 4;
    static constexpr uint8_t CODES[16] = {16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4};
};

template <class Codes, class Scales_>
struct Quantised {
    using Scales = Scales_;
    static constexpr int BITS = Codes::BITS, GROUP = Codes::GROUP, STEPS = Codes::STEPS, BLOCK = Scales::BLOCK;
    static constexpr int ZERO_SHIFT = Codes::ZERO_SHIFT;
    static constexpr bool HAS_MINIMUM = Scales::HAS_MINIMUM;
    static constexpr float ZERO = HAS_MINIMUM ? 0.0f : float(1 << ZERO_SHIFT);
    static constexpr int GROUP_BYTES = 2 * (Codes::LOW_BYTES + Codes::HIGH_BYTES);  // codes of all columns
    static constexpr int BLOCK_BYTES = Scales::BYTES + BLOCK / GROUP * GROUP_BYTES;
    static constexpr int BYTES_OF_GROUP = BLOCK_BYTES / (BLOCK / GROUP);  // with its part of the scales
    static constexpr int GROUP_LINES = (BYTES_OF_GROUP + 63) / 64;

    // Returns where the low and the high bits of the codes of 16 columns are.
    static INLINE const uint8_t* low_bits(const uint8_t* block, int group, int vector) {
        return block + Scales::BYTES + group * GROUP_BYTES + vector * Codes::LOW_BYTES;
    }
    static INLINE const uint8_t* high_bits(const uint8_t* block, int group, int vector) {
        return low_bits(block, group, 2) + vector * Codes::HIGH_BYTES;
    }

    template <int STEP>
    static INLINE Bytes codes(const uint8_t* block, int group, int vector) {
        return Codes::template load<STEP>(low_bits(block, group, vector), high_bits(block, group, vector));
    }

    // Stores a column of a block into zeroed memory.
    static INLINE void store_column(uint8_t* block, int column, const BlockNumbers& numbers) {
        Scales::store_column(block, column, numbers);
        const int vector = column / LANES;
        for (int g = 0; g < BLOCK / GROUP; g++)
            Codes::store((uint8_t*)low_bits(block, g, vector), (uint8_t*)high_bits(block, g, vector), column % LANES,
                         numbers.codes + g * GROUP);
    }

    // Returns input `k` of column `column` of a panel.
    static float weight(const uint8_t* panel, int column, int64_t k) {
        const uint8_t* block = panel + k / BLOCK * BLOCK_BYTES;
        const int group = int(k % BLOCK / GROUP), vector = column / LANES;
        const int code = Codes::load_one(low_bits(block, group, vector), high_bits(block, group, vector), column % LANES,
                                         int(k % GROUP));
        const float product = Scales::template load_one<SCALE>(block, group, column) * (float(code) - ZERO);
        return HAS_MINIMUM ? product + Scales::template load_one<MINIMUM>(block, group, column) : product;
    }

    static int64_t panel_bytes(int64_t num_inputs) { return divide_up(num_inputs, BLOCK) * BLOCK_BYTES; }
};

using Q4_0 = Quantised<Codes<4, 0, 32, 3>, GroupScales<Half, 1>>;
using Q4_1 = Quantised<Codes<4, 0, 32>, GroupScales<Half, 2>>;
using Q5_0 = Quantised<Codes<4, 1, 32, 4>, GroupScales<Half, 1>>;
using Q5_1 = Quantised<Codes<4, 1, 32>, GroupScales<Half, 2>>;
using Q8_0 = Quantised<Codes<8, 0, 32, 7>, GroupScales<Half, 1>>;
using Q2_K = Quantised<Codes<2, 0, 16>, BlockScales<16, 2, true>>;
using Q3_K = Quantised<Codes<2, 1, 16, 2>, BlockScales<16, 1>>;
using Q4_K = Quantised<Codes<4, 0, 32>, BlockScales<8, 2>>;
using Q5_K = Quantised<Codes<4, 1, 32>, BlockScales<8, 2>>;
using Q6_K = Quantised<Codes<4, 2, 16, 5>, BlockScales<16, 1>>;
using IQ4_NL = Quantised<TableCodes<NonLinearTable>, GroupScales<Half, 1>>;
using IQ4_XS = Quantised<TableCodes<NonLinearTable>, BlockScales<8, 1>>;
using MXFP4 = Quantised<TableCodes<Float4Table>, GroupScales<Brain, 1>>;
using UInt4 = Quantised<Codes<4, 0, 32>, ZeroPoints<Half>>;
using UInt8 = Quantised<Codes<8, 0, 32>, ZeroPoints<Half>>;

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
        return load_float(panel + k * STEP_BYTES + column * 4);
    }
    static int64_t panel_bytes(int64_t num_inputs) { return num_inputs * STEP_BYTES; }
};

}  // namespace
