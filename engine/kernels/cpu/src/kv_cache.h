// The KV cache of one layer: its layout, rotary embedding, and storing keys and values.
//
// N tokens to a block, a multiple of LANES; KH KV heads of D dimensions:
//   bfloat16: keys [B, KH, D / 2, N, 2], values [B, KH, N / 2, D, 2], so that a lane takes in a pair
//   float32, int8: keys [B, KH, D, N], values [B, KH, N, D]; for int8, scales [B, KH, N] of both
// A dimension of the keys of adjacent tokens is contiguous, so that scores need no sums across lanes. The blocks of all
// layers alternate, so B has a stride.
#pragma once

#include "activations.h"

namespace {

constexpr int64_t MAX_HEAD_DIM = 512;

enum CacheType : int64_t { CACHE_FLOAT32 = 0, CACHE_BFLOAT16 = 1, CACHE_INT8 = 2 };  // CACHE_TYPES of attention.py

struct CacheParameters {
    int64_t type;
    uint8_t* keys;
    uint8_t* values;
    float* key_scales;  // int8 only
    float* value_scales;
    int64_t block_size;
    int64_t num_kv_heads;
    int64_t head_dim;
    int64_t block_stride;  // heads from one block to the next
};

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
    const int64_t head_block = slot / n * c.block_stride + head, base = head_block * n * size;
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
        c.key_scales[head_block * n + offset] = quantise_head(k, size, codes);
        for (int64_t d = 0; d < size; d++) ((int8_t*)c.keys)[base + d * n + offset] = codes[d];
        c.value_scales[head_block * n + offset] = quantise_head(v, size, (int8_t*)c.values + base + offset * size);
    }
}

struct RopeAndStoreKvParameters {
    const RowCounts* num_rows;
    const int64_t* slot_mapping;  // [T] block id * N + offset
    float* q;  // rotated in place
    const float* k;
    const float* v;
    int64_t row_stride;  // floats, of all three
    int64_t num_heads;
    const float* cos;  // [T, D / 2]
    const float* sin;
    CacheParameters cache;
};

// Rotates the pairs (i, i + D / 2) of a head (Su et al. 2021, halves as in Hugging Face's Llama).
INLINE void rotate(const float* x, const float* cos, const float* sin, int64_t half, float* out) {
    for (int64_t i = 0; i < half; i += LANES) {
        int64_t n = min_of(LANES, half - i);
        Floats first = load_some(x + i, n), second = load_some(x + half + i, n);
        Floats c = load_some(cos + i, n), s = load_some(sin + i, n);
        store_some(out + i, first * c - second * s, n);
        store_some(out + half + i, second * c + first * s, n);
    }
}

inline void rope_and_store_row(const RopeAndStoreKvParameters& p, int64_t row) {
    const int64_t size = p.cache.head_dim, half = size / 2;
    const float* cos = p.cos + row * half;
    const float* sin = p.sin + row * half;
    for (int64_t head = 0; head < p.num_heads; head++) {
        float* q = p.q + row * p.row_stride + head * size;
        rotate(q, cos, sin, half, q);
    }
    for (int64_t head = 0; head < p.cache.num_kv_heads; head++) {
        float rotated[MAX_HEAD_DIM];
        rotate(p.k + row * p.row_stride + head * size, cos, sin, half, rotated);
        store_key_value(p.cache, p.slot_mapping[row], head, rotated, p.v + row * p.row_stride + head * size);
    }
}

inline void rope_and_store_kv(const void* parameters, const Worker& worker) {
    const RopeAndStoreKvParameters& p = *(const RopeAndStoreKvParameters*)parameters;
    const int64_t num_rows = p.num_rows->all;
    for (Tasks tasks(worker, num_rows, grain_of(worker, num_rows)); tasks.next();)
        for (int64_t row = tasks.first; row < tasks.last; row++) rope_and_store_row(p, row);
}

}  // namespace
