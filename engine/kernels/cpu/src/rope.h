// Norms and rotary embedding of queries and keys, and storing keys and values.
#pragma once

#include "kv_cache.h"
#include "norms.h"

namespace {

// The heads of one row.
struct HeadsOfRow {
    const Heads& heads;
    float* const row;
    const int64_t size;
    const double epsilon;
    float scale = 0.0f;  // of a norm over all heads

    HeadsOfRow(const Heads& heads, int64_t index, int64_t size, double epsilon)
        : heads(heads), row(heads.rows + index * heads.stride), size(size), epsilon(epsilon) {
        if (heads.norm && heads.norm_size != size) scale = inverse_rms(row, heads.norm_size, epsilon);
    }

    // Returns a head as it is, or normed in `normed`.
    INLINE const float* get(int64_t head, float* normed) const {
        const float* x = row + head * size;
        return heads.norm ? norm(x, head, normed) : x;
    }

    NOT_INLINE const float* norm(const float* x, int64_t head, float* out) const {
        const bool is_alone = heads.norm_size == size;
        const float* weight = is_alone ? heads.norm : heads.norm + head * size;
        const Floats factor = fill(is_alone ? inverse_rms(x, size, epsilon) : scale);
        for (int64_t d = 0; d < size; d += LANES) store(out + d, load(x + d) * factor * load(weight + d));
        return out;
    }
};

// Rotates the pairs (i, i + D / 2) of a head (Su et al. 2021, halves as in Hugging Face's Llama).
INLINE void rotate(const float* x, const float* rotations, int64_t half, float* out) {
    for (int64_t i = 0; i < half; i += LANES) {
        int64_t n = min_of(LANES, half - i);
        Floats first = load_some(x + i, n), second = load_some(x + half + i, n);
        Floats c = load_some(rotations + i, n), s = load_some(rotations + half + i, n);
        store_some(out + i, first * c - second * s, n);
        store_some(out + half + i, second * c + first * s, n);
    }
}

inline void rope_and_store_row(const RopeAndStoreKvParameters& p, int64_t row) {
    const int64_t size = p.cache.head_dim, half = size / 2;
    float normed[MAX_HEAD_DIM], rotated[MAX_HEAD_DIM];
    const HeadsOfRow queries(p.q, row, size, p.epsilon);
    for (int64_t head = 0; head < p.num_heads; head++)
        rotate(queries.get(head, normed), p.q_rotations + row * size, half, queries.row + head * size);
    if (p.k.rows == nullptr || p.slot_mapping[row] < 0) return;
    const HeadsOfRow keys(p.k, row, size, p.epsilon), values(p.v, row, size, p.epsilon);
    for (int64_t head = 0; head < p.cache.num_kv_heads; head++) {
        rotate(keys.get(head, normed), p.k_rotations + row * size, half, rotated);
        store_key_value(p.cache, p.slot_mapping[row], head, rotated, values.get(head, normed));
    }
}

inline void rope_and_store_kv(const void* parameters, const Worker& worker) {
    const RopeAndStoreKvParameters& p = *(const RopeAndStoreKvParameters*)parameters;
    const int64_t num_rows = p.num_rows->all;
    for (Tasks tasks(worker, num_rows, grain_of(worker, num_rows)); tasks.next();)
        for (int64_t row = tasks.first; row < tasks.last; row++) rope_and_store_row(p, row);
}

}  // namespace
