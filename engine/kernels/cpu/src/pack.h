// Packs a checkpoint's rows (one for each output) into panels.
//
// The block types are those of GGML, defined in ggml-common.h and ggml-quants.c of llama.cpp.
#pragma once

#include "activations.h"

namespace {

struct PackParameters {
    const uint8_t* data;  // contiguous rows
    int64_t row_bytes;
    int64_t num_inputs;
    int64_t num_outputs;
    uint8_t* output;  // zeroed
};

inline float half_at(const uint8_t* p) { return Half::load_one(p); }

// Each block reader returns the codes of BLOCK inputs, and the scale and minimum of each GROUP of them.

struct BlockQ4_0 {
    static constexpr int BLOCK = 32, BYTES = 18;
    static void read(const uint8_t* p, uint8_t* codes, float* scales, float*) {
        scales[0] = half_at(p);
        for (int i = 0; i < 16; i++) codes[i] = p[2 + i] & 15, codes[i + 16] = p[2 + i] >> 4;
    }
};

struct BlockQ4_1 {
    static constexpr int BLOCK = 32, BYTES = 20;
    static void read(const uint8_t* p, uint8_t* codes, float* scales, float* minima) {
        scales[0] = half_at(p), minima[0] = half_at(p + 2);
        for (int i = 0; i < 16; i++) codes[i] = p[4 + i] & 15, codes[i + 16] = p[4 + i] >> 4;
    }
};

inline void read_five_bits(const uint8_t* high, const uint8_t* low, uint8_t* codes) {
    uint32_t bits = uint32_t(load_int32(high));
    for (int i = 0; i < 16; i++) {
        codes[i] = uint8_t((low[i] & 15) | (bits >> i & 1) << 4);
        codes[i + 16] = uint8_t(low[i] >> 4 | (bits >> (i + 16) & 1) << 4);
    }
}

struct BlockQ5_0 {
    static constexpr int BLOCK = 32, BYTES = 22;
    static void read(const uint8_t* p, uint8_t* codes, float* scales, float*) {
        scales[0] = half_at(p);
        read_five_bits(p + 2, p + 6, codes);
    }
};

struct BlockQ5_1 {
    static constexpr int BLOCK = 32, BYTES = 24;
    static void read(const uint8_t* p, uint8_t* codes, float* scales, float* minima) {
        scales[0] = half_at(p), minima[0] = half_at(p + 2);
        read_five_bits(p + 4, p + 8, codes);
    }
};

struct BlockQ8_0 {
    static constexpr int BLOCK = 32, BYTES = 34;
    static void read(const uint8_t* p, uint8_t* codes, float* scales, float*) {
        scales[0] = half_at(p);
        for (int i = 0; i < 32; i++) codes[i] = uint8_t(int8_t(p[2 + i]) + 128);
    }
};

// Reads the scales and minima of the eight groups of a Q4_K or Q5_K block: six bits each, packed in twelve bytes.
inline void read_k_scales(const uint8_t* p, float* scales, float* minima) {
    const float scale = half_at(p), minimum = half_at(p + 2);
    const uint8_t* packed = p + 4;
    for (int j = 0; j < 8; j++) {
        int s = j < 4 ? packed[j] & 63 : (packed[j + 4] & 15) | packed[j - 4] >> 6 << 4;
        int m = j < 4 ? packed[j + 4] & 63 : packed[j + 4] >> 4 | packed[j] >> 6 << 4;
        scales[j] = scale * float(s);
        minima[j] = -minimum * float(m);
    }
}

struct BlockQ4_K {
    static constexpr int BLOCK = 256, BYTES = 144;
    static void read(const uint8_t* p, uint8_t* codes, float* scales, float* minima) {
        read_k_scales(p, scales, minima);
        for (int i = 0; i < 128; i++) {
            codes[i / 32 * 64 + i % 32] = p[16 + i] & 15;
            codes[i / 32 * 64 + 32 + i % 32] = p[16 + i] >> 4;
        }
    }
};

struct BlockQ5_K {
    static constexpr int BLOCK = 256, BYTES = 176;
    static void read(const uint8_t* p, uint8_t* codes, float* scales, float* minima) {
        read_k_scales(p, scales, minima);
        for (int i = 0; i < 128; i++) {
            int pair = i / 32, high = p[16 + i % 32];
            codes[pair * 64 + i % 32] = uint8_t((p[48 + i] & 15) | (high >> 2 * pair & 1) << 4);
            codes[pair * 64 + 32 + i % 32] = uint8_t(p[48 + i] >> 4 | (high >> (2 * pair + 1) & 1) << 4);
        }
    }
};

struct BlockQ6_K {
    static constexpr int BLOCK = 256, BYTES = 210;
    static void read(const uint8_t* p, uint8_t* codes, float* scales, float*) {
        const float scale = half_at(p + 208);
        for (int i = 0; i < 16; i++) scales[i] = scale * float(int8_t(p[192 + i]));
        for (int i = 0; i < 256; i++) {
            int half = i / 128, quarter = i % 128 / 32, l = i % 32;
            int low = p[half * 64 + quarter % 2 * 32 + l] >> (quarter >= 2 ? 4 : 0) & 15;
            codes[i] = uint8_t(low | (p[128 + half * 32 + l] >> 2 * quarter & 3) << 4);
        }
    }
};

// A row of float32, quantised like Q8_0. The scale is NaN if a number is not finite.
struct FloatRow {
    static constexpr int BLOCK = 32, BYTES = 128;
    static void read(const uint8_t* p, uint8_t* codes, float* scales, float*) {
        float values[BLOCK], largest = 0, zero_or_nan = 0;
        memcpy(values, p, sizeof values);
        for (float x : values) largest = x > largest ? x : -x > largest ? -x : largest, zero_or_nan += x * 0.0f;
        scales[0] = half_to_float(float_to_half((largest + zero_or_nan) / 127.0f));
        const float inverse = scales[0] > 0 ? 1.0f / scales[0] : 0.0f;
        int32_t rounded[BLOCK];
        for (int i = 0; i < BLOCK; i += LANES) {
            Floats scaled = minimum(maximum(load(values + i) * fill(inverse), fill(-127)), fill(127));
            store_ints(rounded + i, to_nearest(scaled));
        }
        for (int i = 0; i < BLOCK; i++) codes[i] = uint8_t(rounded[i] + 128);
    }
};

template <class Format, class Block>
void pack(const void* parameters, const Worker& worker) {
    const PackParameters& p = *(const PackParameters*)parameters;
    const int64_t panel_bytes = Format::panel_bytes(p.num_inputs);
    for (Tasks tasks(worker, divide_up(p.num_outputs, PANEL), 1); tasks.next();) {
        const int64_t column = tasks.first * PANEL;
        uint8_t* panel = p.output + tasks.first * panel_bytes;
        for (int64_t c = 0; c < min_of(PANEL, p.num_outputs - column); c++) {
            const uint8_t* row = p.data + (column + c) * p.row_bytes;
            for (int64_t k = 0; k < p.num_inputs; k += Block::BLOCK, row += Block::BYTES) {
                uint8_t codes[Block::BLOCK];
                float scales[16], minima[16];
                Block::read(row, codes, scales, minima);
                for (int g = 0; g < Block::BLOCK / Format::GROUP; g++) {
                    uint8_t* group = panel + (k / Format::GROUP + g) * Format::GROUP_BYTES;
                    uint8_t* vector = group + c / LANES * Format::VECTOR_BYTES;
                    Format::set_codes(vector, int(c % LANES), codes + g * Format::GROUP);
                    Format::Scale::store_one(group + Format::SCALES + c * Format::Scale::SIZE, scales[g]);
                    if (Format::HAS_MINIMUM)
                        Format::Scale::store_one(group + Format::MINIMA + c * Format::Scale::SIZE, minima[g]);
                }
            }
        }
    }
}

// Packs bfloat16 or float32 rows without conversion; a number has ELEMENT bytes.
template <class Format, int ELEMENT>
void pack_plain(const void* parameters, const Worker& worker) {
    const PackParameters& p = *(const PackParameters*)parameters;
    const int64_t panel_bytes = Format::panel_bytes(p.num_inputs);
    constexpr int64_t together = 4 / ELEMENT;
    for (Tasks tasks(worker, divide_up(p.num_outputs, PANEL), 1); tasks.next();) {
        const int64_t column = tasks.first * PANEL;
        uint8_t* panel = p.output + tasks.first * panel_bytes;
        for (int64_t c = 0; c < min_of(PANEL, p.num_outputs - column); c++) {
            const uint8_t* row = p.data + (column + c) * p.row_bytes;
            for (int64_t k = 0; k < p.num_inputs; k++)
                memcpy(panel + k / together * Format::STEP_BYTES + c * 4 + k % together * ELEMENT, row + k * ELEMENT, ELEMENT);
        }
    }
}

}  // namespace
