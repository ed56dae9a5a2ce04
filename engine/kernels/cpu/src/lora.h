// Low-rank adapters (LoRA, Hu et al. 2021) of a product: out += B (A x), with the adapter of each row.
//
// The order of additions does not depend on the rows that are computed together: A x is added up lane by lane and then
// across lanes; B (A x) in the order of ranks.
#pragma once

#include "activations.h"

namespace {

INLINE Floats load_weights(const float* p) { return load(p); }
INLINE Floats load_weights(const uint16_t* p) { return load_bfloat16(p); }

inline float* shrunk_row(const AddLoraParameters& p, int64_t row, int64_t part) {
    return p.shrunk + (row * p.num_parts + part) * p.max_rank;
}

// Sizes of tiles that fit into the registers.
constexpr int LORA_ROWS = NUM_REGISTERS == 32 ? 4 : 2;
constexpr int SHRINK_RANKS = NUM_REGISTERS == 32 ? 4 : 2;
constexpr int EXPAND_VECTORS = NUM_REGISTERS == 32 ? 4 : 2;

// Computes RANKS ranks of A x for rows that share an adapter.
template <class Weight, int ROWS, int RANKS>
INLINE void shrink_tile(const AddLoraParameters& p, const Weight* a, int64_t row, int64_t part, int64_t rank) {
    Floats sums[ROWS][RANKS];
    for (int i = 0; i < ROWS; i++)
        for (int r = 0; r < RANKS; r++) sums[i][r] = zero();
    const float* x = p.input + row * p.input_stride;
    for (int64_t k = 0; k < p.num_inputs; k += LANES) {
        Floats weights[RANKS];
        for (int r = 0; r < RANKS; r++) weights[r] = load_weights(a + (rank + r) * p.a_stride + k);
        for (int i = 0; i < ROWS; i++) {
            const Floats inputs = load_some(x + i * p.input_stride + k, p.num_inputs - k);
            for (int r = 0; r < RANKS; r++) sums[i][r] = multiply_add(weights[r], inputs, sums[i][r]);
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int r = 0; r < RANKS; r++) shrunk_row(p, row + i, part)[rank + r] = sum_of_lanes(sums[i][r]);
}

template <class Weight, int ROWS>
void shrink_rows(const AddLoraParameters& p, int64_t row, int64_t part) {
    const int64_t of_part = p.lora_slots[row] * p.num_parts + part, num_ranks = p.ranks[of_part];
    const Weight* a = (const Weight*)p.a + of_part * p.max_rank * p.a_stride;
    int64_t rank = 0;
    for (; rank + SHRINK_RANKS <= num_ranks; rank += SHRINK_RANKS) shrink_tile<Weight, ROWS, SHRINK_RANKS>(p, a, row, part, rank);
    for (; rank < num_ranks; rank++) shrink_tile<Weight, ROWS, 1>(p, a, row, part, rank);
}

template <class Weight, int ROWS, int VECTORS>
INLINE void expand_tile(const AddLoraParameters& p, int64_t row, int64_t part, int64_t num_ranks, const Weight* b, int64_t column, int64_t left) {
    Floats sums[ROWS][VECTORS];
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < VECTORS; v++) sums[i][v] = zero();
    for (int64_t r = 0; r < num_ranks; r++) {
        Floats weights[VECTORS];
        for (int v = 0; v < VECTORS; v++) weights[v] = load_weights(b + r * p.b_stride + column + v * LANES);
        for (int i = 0; i < ROWS; i++) {
            const Floats x = fill(shrunk_row(p, row + i, part)[r]);
            for (int v = 0; v < VECTORS; v++) sums[i][v] = multiply_add(weights[v], x, sums[i][v]);
        }
    }
    for (int i = 0; i < ROWS; i++) {
        float* out = p.output + (row + i) * p.output_stride + column;
        for (int v = 0; v < VECTORS; v++) {
            const int64_t n = left - v * LANES;
            store_some(out + v * LANES, load_some(out + v * LANES, n) + sums[i][v], n);
        }
    }
}

// Adds B (A x) to the outputs start..end, which may span parts, of rows that share an adapter.
template <class Weight, int ROWS>
void expand_rows(const AddLoraParameters& p, int64_t row, int64_t start, int64_t end) {
    const int64_t slot = p.lora_slots[row];
    const Weight* b = (const Weight*)p.b + slot * p.max_rank * p.b_stride;
    for (int64_t part = 0, column = start; column < end; part++) {
        const int64_t last = min_of(end, p.part_ends[part]), num_ranks = p.ranks[slot * p.num_parts + part];
        if (num_ranks == 0 && column < last) column = last;
        for (; column + EXPAND_VECTORS * LANES <= last; column += EXPAND_VECTORS * LANES)
            expand_tile<Weight, ROWS, EXPAND_VECTORS>(p, row, part, num_ranks, b, column, last - column);
        for (; column < last; column = min_of(column + LANES, last))
            expand_tile<Weight, ROWS, 1>(p, row, part, num_ranks, b, column, last - column);
    }
}

// Returns whether the rows first..last fill a tile and share an adapter.
inline bool is_tile(const AddLoraParameters& p, int64_t first, int64_t last) {
    bool is_shared = last - first == LORA_ROWS && p.lora_slots[first] >= 0;
    for (int64_t row = first; row < last; row++) is_shared &= p.lora_slots[row] == p.lora_slots[first];
    return is_shared;
}

template <class Weight>
void shrink(const AddLoraParameters& p, int64_t first, int64_t last, int64_t part) {
    if (is_tile(p, first, last)) return shrink_rows<Weight, LORA_ROWS>(p, first, part);
    for (int64_t row = first; row < last; row++)
        if (p.lora_slots[row] >= 0) shrink_rows<Weight, 1>(p, row, part);
}

template <class Weight>
void expand(const AddLoraParameters& p, int64_t first, int64_t last, int64_t start, int64_t end) {
    if (is_tile(p, first, last)) return expand_rows<Weight, LORA_ROWS>(p, first, start, end);
    for (int64_t row = first; row < last; row++)
        if (p.lora_slots[row] >= 0) expand_rows<Weight, 1>(p, row, start, end);
}

constexpr int64_t EXPAND_PIECE = 512;  // outputs

template <class Weight>
void add_lora(const void* parameters, const Worker& worker) {
    const AddLoraParameters& p = *(const AddLoraParameters*)parameters;
    const int64_t num_rows = p.num_rows->all, num_outputs = p.part_ends[p.num_parts - 1];
    int64_t first = 0;  // row with an adapter, the same in all threads
    while (first < num_rows && p.lora_slots[first] < 0) first++;
    if (first == num_rows) return;
    const int64_t num_tiles = divide_up(num_rows, LORA_ROWS), num_shrinks = num_tiles * p.num_parts;
    for (Tasks tasks(worker, num_shrinks, grain_of(worker, num_shrinks)); tasks.next();)
        for (int64_t task = tasks.first; task < tasks.last; task++) {
            const int64_t row = task / p.num_parts * LORA_ROWS;
            shrink<Weight>(p, row, min_of(row + LORA_ROWS, num_rows), task % p.num_parts);
        }
    barrier(worker);
    const int64_t num_pieces = divide_up(num_outputs, EXPAND_PIECE), num_expands = num_tiles * num_pieces;
    for (Tasks tasks(worker, num_expands, grain_of(worker, num_expands)); tasks.next();)
        for (int64_t task = tasks.first; task < tasks.last; task++) {
            const int64_t row = task / num_pieces * LORA_ROWS, start = task % num_pieces * EXPAND_PIECE;
            expand<Weight>(p, row, min_of(row + LORA_ROWS, num_rows), start, min_of(start + EXPAND_PIECE, num_outputs));
        }
}

}  // namespace
