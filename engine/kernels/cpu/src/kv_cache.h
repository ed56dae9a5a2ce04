// The KV cache of one layer: its layout, and storing keys and values.
//
// N tokens to a block, a multiple of LANES; KH KV heads of D dimensions:
//   bfloat16: keys [B, KH, D / 2, N, 2], values [B, KH, N / 2, D, 2], so that a lane takes in a pair
//   float32, int8: keys [B, KH, D, N], values [B, KH, N, D]; for int8, scales [B, KH, N] of both
// A dimension of the keys of adjacent tokens is contiguous, so that scores need no sums across lanes. A block holds the
// layers of one KV group after each other, so B has a stride.
#pragma once

#include "activations.h"

namespace {

constexpr int64_t MAX_HEAD_DIM = 576;

enum CacheType : int64_t { CACHE_FLOAT32 = 0, CACHE_BFLOAT16 = 1, CACHE_INT8 = 2 };  // CACHE_TYPES of attention.py

// Returns the index of the first key or value of a KV head in a block.
INLINE int64_t first_of_head(const CacheParameters& c, int64_t block, int64_t head) {
    return block * c.block_stride + head * c.block_size * c.head_dim;
}

// Returns the index of its first scale.
INLINE int64_t first_scale_of_head(const CacheParameters& c, int64_t block, int64_t head) {
    return block * c.scale_stride + head * c.block_size;
}

// Quantises a head and returns its scale, which is NaN if a number is not finite.
INLINE float quantise_head(const float* x, int64_t size, int8_t* out) {
    Floats largest = zero(), not_finite = zero();
    for (int64_t d = 0; d < size; d += LANES) {
        Floats v = load_some(x + d, min_of(LANES, size - d));
        largest = maximum(absolute(v), largest);
        not_finite = multiply_add(v, zero(), not_finite);
    }
    const float highest = max_of_lanes(largest);
    const Floats inverse = fill(highest > 0 ? 127.0f / highest : 0.0f);
    for (int64_t d = 0; d < size; d += LANES) {
        const int64_t n = min_of(LANES, size - d);
        Ints codes = to_nearest(load_some(x + d, n) * inverse);
        if (n == LANES) {
            store_int8(out + d, codes);
        } else {
            int8_t some[LANES];
            store_int8(some, codes);
            memcpy(out + d, some, size_t(n));
        }
    }
    return equal_mask(not_finite, zero()) == 0xffff ? highest / 127.0f : __builtin_nanf("");
}

INLINE void store_key_value(const CacheParameters& c, int64_t slot, int64_t head, const float* k, const float* v) {
    const int64_t n = c.block_size, size = c.head_dim, offset = slot % n;
    const int64_t base = first_of_head(c, slot / n, head);
    if (c.type == CACHE_BFLOAT16) {
        uint16_t* keys = (uint16_t*)c.keys + base + offset * 2;
        uint16_t* values = (uint16_t*)c.values + base + offset / 2 * size * 2 + offset % 2;
        uint16_t rounded[MAX_HEAD_DIM + LANES];
        write_bfloat16(k, size, rounded);
        for (int64_t d = 0; d < size; d += 2) memcpy(keys + d * n, rounded + d, 4);
        write_bfloat16(v, size, rounded);
        for (int64_t d = 0; d < size; d++) values[2 * d] = rounded[d];
    } else if (c.type == CACHE_FLOAT32) {
        for (int64_t d = 0; d < size; d++) ((float*)c.keys)[base + d * n + offset] = k[d];
        memcpy((float*)c.values + base + offset * size, v, size_t(size) * 4);
    } else {
        int8_t codes[MAX_HEAD_DIM];
        const int64_t scale = first_scale_of_head(c, slot / n, head) + offset;
        c.key_scales[scale] = quantise_head(k, size, codes);
        for (int64_t d = 0; d < size; d++) ((int8_t*)c.keys)[base + d * n + offset] = codes[d];
        c.value_scales[scale] = quantise_head(v, size, (int8_t*)c.values + base + offset * size);
    }
}

}  // namespace
