// Packs a checkpoint's rows (one for each output) into panels.
//
// The block types are those of GGML, defined in ggml-common.h and ggml-quants.c of llama.cpp.
#pragma once

#include "activations.h"

namespace {

inline float half_at(const uint8_t* p) { return Half::load_one(p); }

// Reads 32 codes of four bits: all low nibbles, then all high ones.
inline void read_nibbles(const uint8_t* p, uint8_t* codes) {
    for (int i = 0; i < 16; i++) codes[i] = p[i] & 15, codes[i + 16] = p[i] >> 4;
}

inline void read_five_bits(const uint8_t* high, const uint8_t* low, uint8_t* codes) {
    const uint32_t bits = uint32_t(load_int32(high));
    read_nibbles(low, codes);
    for (int i = 0; i < 32; i++) codes[i] |= uint8_t((bits >> i & 1) << 4);
}

// Each block reader reads the numbers of BLOCK inputs.

struct BlockQ4_0 {
    static constexpr int BYTES = 18;
    static void read(const uint8_t* p, BlockNumbers& out) {
        out.scales[0] = half_at(p);
        read_nibbles(p + 2, out.codes);
    }
};

struct BlockQ4_1 {
    static constexpr int BYTES = 20;
    static void read(const uint8_t* p, BlockNumbers& out) {
        out.scales[0] = half_at(p), out.minima[0] = half_at(p + 2);
        read_nibbles(p + 4, out.codes);
    }
};

struct BlockQ5_0 {
    static constexpr int BYTES = 22;
    static void read(const uint8_t* p, BlockNumbers& out) {
        out.scales[0] = half_at(p);
        read_five_bits(p + 2, p + 6, out.codes);
    }
};

struct BlockQ5_1 {
    static constexpr int BYTES = 24;
    static void read(const uint8_t* p, BlockNumbers& out) {
        out.scales[0] = half_at(p), out.minima[0] = half_at(p + 2);
        read_five_bits(p + 4, p + 8, out.codes);
    }
};

struct BlockQ8_0 {
    static constexpr int BYTES = 34;
    static void read(const uint8_t* p, BlockNumbers& out) {
        out.scales[0] = half_at(p);
        for (int i = 0; i < 32; i++) out.codes[i] = uint8_t(int8_t(p[2 + i]) + 128);
    }
};

struct BlockMXFP4 {
    static constexpr int BYTES = 17;
    static void read(const uint8_t* p, BlockNumbers& out) {
        // Half of 2^(p[0] - 127), because the codes stand for doubled numbers.
        const uint32_t bits = p[0] < 2 ? 0x00200000u << p[0] : (p[0] - 1u) << 23;
        memcpy(&out.scales[0], &bits, sizeof bits);
        read_nibbles(p + 1, out.codes);
    }
};

// Reads two bits of each of 256 codes: 32 bytes hold those of 128 successive codes.
inline void read_two_bits(const uint8_t* p, int shift, uint8_t* codes) {
    for (int i = 0; i < 256; i++) codes[i] |= uint8_t((p[i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3) << shift);
}

struct BlockQ2_K {
    static constexpr int BYTES = 84;
    static void read(const uint8_t* p, BlockNumbers& out) {
        out.scale = half_at(p + 80), out.minimum = -half_at(p + 82);
        for (int j = 0; j < 16; j++) out.scales[j] = p[j] & 15, out.minima[j] = p[j] >> 4;
        memset(out.codes, 0, sizeof out.codes);
        read_two_bits(p + 16, 0, out.codes);
    }
};

struct BlockQ3_K {
    static constexpr int BYTES = 110;
    static void read(const uint8_t* p, BlockNumbers& out) {
        const uint8_t* packed = p + 96;
        out.scale = half_at(p + 108);
        for (int j = 0; j < 16; j++)
            out.scales[j] = float((packed[j % 8] >> j / 8 * 4 & 15) | (packed[8 + j % 4] >> j / 4 * 2 & 3) << 4) - 32;
        for (int i = 0; i < 256; i++) out.codes[i] = uint8_t((p[i % 32] >> i / 32 & 1) << 2);
        read_two_bits(p + 32, 0, out.codes);
    }
};

// Reads the scales and minima of the eight groups of a Q4_K or Q5_K block: six bits each, packed in twelve bytes.
inline void read_k_scales(const uint8_t* p, BlockNumbers& out) {
    const uint8_t* packed = p + 4;
    out.scale = half_at(p), out.minimum = -half_at(p + 2);
    for (int j = 0; j < 8; j++) {
        out.scales[j] = float(j < 4 ? packed[j] & 63 : (packed[j + 4] & 15) | packed[j - 4] >> 6 << 4);
        out.minima[j] = float(j < 4 ? packed[j + 4] & 63 : packed[j + 4] >> 4 | packed[j] >> 6 << 4);
    }
}

struct BlockQ4_K {
    static constexpr int BYTES = 144;
    static void read(const uint8_t* p, BlockNumbers& out) {
        read_k_scales(p, out);
        for (int i = 0; i < 128; i++) {
            out.codes[i / 32 * 64 + i % 32] = p[16 + i] & 15;
            out.codes[i / 32 * 64 + 32 + i % 32] = p[16 + i] >> 4;
        }
    }
};

struct BlockQ5_K {
    static constexpr int BYTES = 176;
    static void read(const uint8_t* p, BlockNumbers& out) {
        read_k_scales(p, out);
        for (int i = 0; i < 128; i++) {
            int pair = i / 32, high = p[16 + i % 32];
            out.codes[pair * 64 + i % 32] = uint8_t((p[48 + i] & 15) | (high >> 2 * pair & 1) << 4);
            out.codes[pair * 64 + 32 + i % 32] = uint8_t(p[48 + i] >> 4 | (high >> (2 * pair + 1) & 1) << 4);
        }
    }
};

struct BlockQ6_K {
    static constexpr int BYTES = 210;
    static void read(const uint8_t* p, BlockNumbers& out) {
        out.scale = half_at(p + 208);
        for (int j = 0; j < 16; j++) out.scales[j] = int8_t(p[192 + j]);
        for (int i = 0; i < 256; i++)
            out.codes[i] = p[i / 128 * 64 + i % 64] >> i % 128 / 64 * 4 & 15;
        read_two_bits(p + 128, 4, out.codes);
    }
};

struct BlockIQ4_NL {
    static constexpr int BYTES = 18;
    static void read(const uint8_t* p, BlockNumbers& out) { BlockQ4_0::read(p, out); }
};

struct BlockIQ4_XS {
    static constexpr int BYTES = 136;
    static void read(const uint8_t* p, BlockNumbers& out) {
        const int high = p[2] | p[3] << 8;
        out.scale = half_at(p);
        for (int j = 0; j < 8; j++) {
            out.scales[j] = float((p[4 + j / 2] >> j % 2 * 4 & 15) | (high >> 2 * j & 3) << 4) - 32;
            read_nibbles(p + 8 + 16 * j, out.codes + 32 * j);
        }
    }
};

// Codes of GPTQ, AWQ and compressed-tensors, after a scale in half precision and a zero point.
struct BlockUInt4 {
    static constexpr int BYTES = 19;
    static void read(const uint8_t* p, BlockNumbers& out) {
        out.scales[0] = half_at(p), out.minima[0] = p[2];
        read_nibbles(p + 3, out.codes);
    }
};

struct BlockUInt8 {
    static constexpr int BYTES = 35;
    static void read(const uint8_t* p, BlockNumbers& out) {
        out.scales[0] = half_at(p), out.minima[0] = p[2];
        memcpy(out.codes, p + 3, 32);
    }
};

// A row of float32, quantised like Q8_0. The scale is NaN if a number is not finite.
struct FloatRow {
    static constexpr int BYTES = 128;
    static void read(const uint8_t* p, BlockNumbers& out) {
        float values[32], largest = 0, zero_or_nan = 0;
        memcpy(values, p, sizeof values);
        for (float x : values) largest = x > largest ? x : -x > largest ? -x : largest, zero_or_nan += x * 0.0f;
        out.scales[0] = half_to_float(float_to_half((largest + zero_or_nan) / 127.0f));
        const float inverse = out.scales[0] > 0 ? 1.0f / out.scales[0] : 0.0f;
        int32_t rounded[32];
        for (int i = 0; i < 32; i += LANES) {
            Floats scaled = minimum(maximum(load(values + i) * fill(inverse), fill(-127)), fill(127));
            store_ints(rounded + i, to_nearest(scaled));
        }
        for (int i = 0; i < 32; i++) out.codes[i] = uint8_t(rounded[i] + 128);
    }
};

template <class Format, class Block>
void pack(const void* parameters, const Worker& worker) {
    const PackParameters& p = *(const PackParameters*)parameters;
    const int64_t panel_bytes = Format::panel_bytes(p.num_inputs);
    for (Tasks tasks(worker, divide_up(p.num_outputs, PANEL), 1); tasks.next();) {
        const int64_t column = tasks.first * PANEL;
        for (int64_t c = 0; c < min_of(PANEL, p.num_outputs - column); c++) {
            const uint8_t* row = p.data + (column + c) * p.row_bytes;
            uint8_t* block = p.output + tasks.first * panel_bytes;
            for (int64_t k = 0; k < p.num_inputs; k += Format::BLOCK) {
                BlockNumbers numbers;
                Block::read(row, numbers);
                Format::store_column(block, int(c), numbers);
                row += Block::BYTES;
                block += Format::BLOCK_BYTES;
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
