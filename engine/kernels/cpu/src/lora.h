// What low-rank adapters (LoRA, Hu et al. 2021) add to a product: out += B (A x), with the matrices of each row's own.
//
// Every element is added up in one order, whichever rows are computed together: A x along the lanes, then over them; B
// times that in the order of ranks.
#pragma once

#include "activations.h"

namespace {

struct AddLoraParameters {
    const RowCounts* num_rows;
    const int64_t* places;  // where each row's adapter lies, -1: nowhere
    const float* input;
    int64_t input_stride;  // floats
    int64_t num_inputs;
    const uint8_t* a;  // [places, parts, max_rank, a_stride], filled up to whole vectors
    int64_t a_stride;
    const uint8_t* b;  // [places, max_rank, b_stride], filled up by more than a vector
    int64_t b_stride;
    const int64_t* ranks;  // [places, parts]
    const int64_t* part_ends;  // [parts] in the outputs
    int64_t num_parts;
    int64_t max_rank;
    float* shrunk;  // [rows, parts, max_rank]
    float* output;
    int64_t output_stride;

    float* shrunk_row(int64_t row, int64_t part) const { return shrunk + (row * num_parts + part) * max_rank; }
};

INLINE Floats load_weights(const float* p) { return load(p); }
INLINE Floats load_weights(const uint16_t* p) { return load_bfloat16(p); }

constexpr int SHRINK_ROWS = NUM_REGISTERS == 32 ? 4 : 2;
constexpr int SHRINK_RANKS = NUM_REGISTERS == 32 ? 4 : 2;

// Some ranks of A x, for rows that share A.
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
        for (int r = 0; r < RANKS; r++) p.shrunk_row(row + i, part)[rank + r] = sum_of_lanes(sums[i][r]);
}

template <class Weight, int ROWS>
void shrink_rows(const AddLoraParameters& p, int64_t row, int64_t part) {
    const int64_t of_part = p.places[row] * p.num_parts + part, num_ranks = p.ranks[of_part];
    const Weight* a = (const Weight*)p.a + of_part * p.max_rank * p.a_stride;
    int64_t rank = 0;
    for (; rank + SHRINK_RANKS <= num_ranks; rank += SHRINK_RANKS) shrink_tile<Weight, ROWS, SHRINK_RANKS>(p, a, row, part, rank);
    for (; rank < num_ranks; rank++) shrink_tile<Weight, ROWS, 1>(p, a, row, part, rank);
}

// Up to SHRINK_ROWS rows: all at once where they share an adapter, else one by one.
template <class Weight>
void shrink(const AddLoraParameters& p, int64_t first, int64_t last, int64_t part) {
    bool is_shared = last - first == SHRINK_ROWS && p.places[first] >= 0;
    for (int64_t row = first; row < last; row++) is_shared &= p.places[row] == p.places[first];
    if (is_shared) return shrink_rows<Weight, SHRINK_ROWS>(p, first, part);
    for (int64_t row = first; row < last; row++)
        if (p.places[row] >= 0) shrink_rows<Weight, 1>(p, row, part);
}

template <class Weight, int VECTORS>
INLINE void expand_vectors(const AddLoraParameters& p, const float* shrunk, int64_t num_ranks, const Weight* b, float* out, int64_t left) {
    Floats sums[VECTORS];
    for (int v = 0; v < VECTORS; v++) sums[v] = zero();
    for (int64_t r = 0; r < num_ranks; r++) {
        const Floats x = fill(shrunk[r]);
        for (int v = 0; v < VECTORS; v++) sums[v] = multiply_add(load_weights(b + r * p.b_stride + v * LANES), x, sums[v]);
    }
    for (int v = 0; v < VECTORS; v++) {
        const int64_t n = left - v * LANES;
        store_some(out + v * LANES, load_some(out + v * LANES, n) + sums[v], n);
    }
}

constexpr int64_t EXPAND_PIECE = 512;  // outputs
constexpr int EXPAND_VECTORS = 4;

// The outputs start..end of a row, which may be of several parts.
template <class Weight>
void expand(const AddLoraParameters& p, int64_t row, int64_t start, int64_t end) {
    const int64_t place = p.places[row];
    const Weight* b = (const Weight*)p.b + place * p.max_rank * p.b_stride;
    float* out = p.output + row * p.output_stride;
    for (int64_t part = 0, column = start; column < end; part++) {
        const int64_t last = min_of(end, p.part_ends[part]), num_ranks = p.ranks[place * p.num_parts + part];
        const float* shrunk = p.shrunk_row(row, part);
        if (num_ranks == 0 && column < last) column = last;
        for (; column + EXPAND_VECTORS * LANES <= last; column += EXPAND_VECTORS * LANES)
            expand_vectors<Weight, EXPAND_VECTORS>(p, shrunk, num_ranks, b + column, out + column, last - column);
        for (; column < last; column = min_of(column + LANES, last))
            expand_vectors<Weight, 1>(p, shrunk, num_ranks, b + column, out + column, last - column);
    }
}

template <class Weight>
void add_lora(const void* parameters, const Worker& worker) {
    const AddLoraParameters& p = *(const AddLoraParameters*)parameters;
    const int64_t num_rows = p.num_rows->all, num_outputs = p.part_ends[p.num_parts - 1];
    int64_t first = 0;  // that has an adapter; all threads find the same
    while (first < num_rows && p.places[first] < 0) first++;
    if (first == num_rows) return;
    const int64_t num_tiles = divide_up(num_rows, SHRINK_ROWS), num_shrinks = num_tiles * p.num_parts;
    for (Tasks tasks(worker, num_shrinks, grain_of(worker, num_shrinks)); tasks.next();)
        for (int64_t task = tasks.first; task < tasks.last; task++) {
            const int64_t row = task / p.num_parts * SHRINK_ROWS;
            shrink<Weight>(p, row, min_of(row + SHRINK_ROWS, num_rows), task % p.num_parts);
        }
    barrier(worker);
    const int64_t num_pieces = divide_up(num_outputs, EXPAND_PIECE), num_expands = num_rows * num_pieces;
    for (Tasks tasks(worker, num_expands, grain_of(worker, num_expands)); tasks.next();)
        for (int64_t task = tasks.first; task < tasks.last; task++) {
            const int64_t row = task / num_pieces, start = task % num_pieces * EXPAND_PIECE;
            if (p.places[row] >= 0) expand<Weight>(p, row, start, min_of(start + EXPAND_PIECE, num_outputs));
        }
}

}  // namespace
