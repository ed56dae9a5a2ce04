// Matrix products with fixed weights: out = x W^T + bias, or added to what `out` holds.
//
// A tile of rows x 32 columns stays in registers over all of K, so that every element is added up in the order of K for
// any number of rows. The integer products of quantised groups are exact; only their scaled sums are rounded.
#pragma once

#include <math.h>

#include "activations.h"

namespace {

template <int ROWS, int VECTORS>
INLINE void store_tile(const LinearParameters& p, const Floats (&sums)[ROWS][VECTORS], int64_t row, int64_t column) {
    for (int v = 0; v < VECTORS; v++) {
        int64_t first = column + v * LANES, left = p.num_outputs - first;
        if (left <= 0) return;
        for (int r = 0; r < ROWS; r++) {
            float* out = p.output + (row + r) * p.output_stride + first;
            Floats sum = sums[r][v];
            if (left >= LANES) {
                if (p.bias) sum = sum + load(p.bias + first);
                store(out, p.accumulate ? load(out) + sum : sum);
            } else {
                if (p.bias) sum = sum + load_some(p.bias + first, left);
                store_some(out, p.accumulate ? load_some(out, left) + sum : sum, left);
            }
        }
    }
}

// Prefetches the output that `store_tile` will write.
template <int ROWS, int VECTORS>
INLINE void prefetch_tile(const LinearParameters& p, int64_t row, int64_t column) {
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) prefetch(p.output + (row + r) * p.output_stride + column + v * LANES);
}

constexpr int64_t L2_AHEAD = 8192, L1_AHEAD = 4096;  // bytes

// Prefetches the weights that will be read next, a few cache lines at each step of a tile: the processor would stall on
// more lines than the memory delivers in the meantime.
struct Prefetcher {
    const uint8_t* next;
    int64_t lines;  // of a step

    // A single tile prefetches the weights that it reads soon; several tiles share out the next panel.
    template <int LINES_OF_STEP>
    static Prefetcher for_tile(const uint8_t* panel, int64_t panel_bytes, int64_t tile, int64_t num_tiles) {
        if (num_tiles == 1) return {panel + L2_AHEAD, LINES_OF_STEP};
        const int64_t num_shares = min_of(num_tiles, LINES_OF_STEP);
        if (tile >= num_shares) return {panel, 0};
        return {panel + panel_bytes + panel_bytes * tile / num_shares, divide_up(LINES_OF_STEP, num_shares)};
    }

    // Does part `part` of `num_parts` of what belongs to a step, which reads from `position` on.
    template <int LINES_OF_STEP>
    INLINE void step(const uint8_t*, int part = 0, int = 1) {
        for (int64_t i = 0; part == 0 && i < lines; i++, next += 64) prefetch_to_l2(next);
    }
};

// Prefetches for a tile of few rows, the only one that reads a panel. Weights wait in the L2 cache, since more of them are
// on the way from memory than the L1 cache can have under way. They are in the L1 cache in time, since the arithmetic
// would not hide the way from the L2 cache.
struct StreamPrefetcher {
    template <int LINES_OF_STEP>
    INLINE void step(const uint8_t* position, int part = 0, int num_parts = 1) {
        for (int line = LINES_OF_STEP * part / num_parts; line < LINES_OF_STEP * (part + 1) / num_parts; line++) {
            prefetch_to_l2(position + L2_AHEAD + 64 * line);
            prefetch(position + L1_AHEAD + 64 * line);
        }
    }
};

template <class Format, int STEP, int ROWS, int VECTORS>
INLINE void add_step(const uint8_t* block, int group, int vector, int offset, const ActivationGroup* const (&rows)[ROWS],
                     Ints (&sums)[ROWS][VECTORS]) {
    Bytes codes[VECTORS];
    for (int v = 0; v < VECTORS; v++) codes[v] = Format::template codes<STEP>(block, group, vector + v);
    for (int r = 0; r < ROWS; r++) {
        int32_t four = load_int32(rows[r]->codes + offset + 4 * STEP);
        for (int v = 0; v < VECTORS; v++) sums[r][v] = dot<Format::BITS>(sums[r][v], codes[v], four);
    }
}

// Steps STEP and STEP + STEPS / 2 and those after them. In this order, a low and a high nibble share a load.
template <class Format, int STEP, int ROWS, int VECTORS, class Prefetching>
INLINE void add_steps(const uint8_t* block, int group, int vector, int offset, const ActivationGroup* const (&rows)[ROWS],
                      Prefetching& prefetcher, Ints (&sums)[ROWS][VECTORS]) {
    prefetcher.template step<Format::GROUP_LINES>(block + group * Format::BYTES_OF_GROUP, STEP, Format::STEPS / 2);
    add_step<Format, STEP>(block, group, vector, offset, rows, sums);
    add_step<Format, STEP + Format::STEPS / 2>(block, group, vector, offset, rows, sums);
    if constexpr (STEP + 1 < Format::STEPS / 2) add_steps<Format, STEP + 1>(block, group, vector, offset, rows, prefetcher, sums);
}

// Where the tiles of a panel's rows read the scales of its blocks: in the blocks themselves.
template <class Format>
struct ScaleSource {
    void begin_panel(int64_t) {}
    INLINE const uint8_t* of_block(const uint8_t* block, int64_t) { return block; }
};

// The first tile multiplies out the scales and minima for the other tiles, which saves them 3 % of their time. Q6_K would
// lose as much, because it would read its scales from elsewhere than the codes.
template <class Codes>
struct ScaleSource<Quantised<Codes, BlockScales<8, 2>>> {
    using Scales = BlockScales<8, 2>;
    static constexpr int64_t BLOCKS = 64;  // the last of them is for all further blocks
    alignas(64) float numbers[BLOCKS][8 * 2 * PANEL];
    int64_t num_kept, num_ready;  // blocks from the start of the panel on

    void begin_panel(int64_t num_tiles) { num_kept = num_tiles > 1 ? BLOCKS - 1 : 0, num_ready = 0; }
    INLINE const float* of_block(const uint8_t* block, int64_t index) {
        float* out = numbers[min_of(index, num_kept)];
        if (index >= num_ready) {
            Scales::unpack(block, out);
            num_ready = min_of(index + 1, num_kept);
        }
        return out;
    }
};

// Adds the integer products of a group times its scales, and its minima, to `sums`. The activations are codes, to be
// multiplied by their scale later, unless the group is a whole ActivationGroup.
template <class Format, int ROWS, int VECTORS, class Number, class Prefetching>
INLINE void add_group(const uint8_t* block, const Number* scales, int group, int half, int vector,
                      const ActivationGroup* const (&rows)[ROWS], Prefetching& prefetcher, Floats (&sums)[ROWS][VECTORS]) {
    constexpr bool IS_WHOLE = Format::GROUP == ACTIVATION_GROUP;
    Ints products[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++) {
        Ints start = zero_ints();
        if constexpr (!Format::HAS_MINIMUM) {  // products use the unsigned codes; the zero point is subtracted here
            uint32_t negative = uint32_t(rows[r]->negative_sums[half]);
            if (IS_WHOLE) negative += uint32_t(rows[r]->negative_sums[1]);
            start = fill_ints(int32_t(negative << Format::ZERO_SHIFT));
        }
        for (int v = 0; v < VECTORS; v++) products[r][v] = start;
    }
    add_steps<Format, 0>(block, group, vector, half * 16, rows, prefetcher, products);
    using Scales = typename Format::Scales;
    for (int v = 0; v < VECTORS; v++) {
        const int column = (vector + v) * LANES;
        const Floats scale = Scales::template load_vector<SCALE>(scales, group, column);
        for (int r = 0; r < ROWS; r++)
            sums[r][v] = multiply_add(to_floats(products[r][v]), IS_WHOLE ? scale * fill(rows[r]->scale) : scale, sums[r][v]);
        if constexpr (Format::HAS_MINIMUM) {
            const Floats minimum = Scales::template load_vector<MINIMUM>(scales, group, column);
            for (int r = 0; r < ROWS; r++) {
                const float sum = IS_WHOLE ? rows[r]->scaled_sum : -float(rows[r]->negative_sums[half]);
                sums[r][v] = multiply_add(minimum, fill(sum), sums[r][v]);
            }
        }
    }
}

// Adds the products of an ActivationGroup, of one group or two.
template <class Format, int ROWS, int VECTORS, class Number, class Prefetching>
INLINE void add_groups(const uint8_t* block, const Number* scales, int group, int vector,
                       const ActivationGroup* const (&rows)[ROWS], Prefetching& prefetcher, Floats (&sums)[ROWS][VECTORS]) {
    if constexpr (Format::GROUP == ACTIVATION_GROUP) return add_group<Format>(block, scales, group, 0, vector, rows, prefetcher, sums);
    Floats partial[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) partial[r][v] = zero();
    add_group<Format>(block, scales, group, 0, vector, rows, prefetcher, partial);
    add_group<Format>(block, scales, group + 1, 1, vector, rows, prefetcher, partial);
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) sums[r][v] = multiply_add(partial[r][v], fill(rows[r]->scale), sums[r][v]);
}

// Multiplies ROWS rows with VECTORS vectors of columns of one panel. Its code is compiled once, not for each caller.
template <class Format>
struct Tile {
    static constexpr int MAX_ROWS = NUM_REGISTERS == 32 ? 6 : 2;
    static constexpr int VECTORS = NUM_REGISTERS == 32 ? 2 : 1;
    static constexpr int GROUPS = Format::BLOCK / Format::GROUP, GROUPS_OF_STEP = ACTIVATION_GROUP / Format::GROUP;
    static constexpr int LINES = Format::GROUP_LINES;  // of what the prefetcher takes for a step

    template <int ROWS, class Prefetching>
    static NOT_INLINE void compute(const LinearParameters& p, const uint8_t* panel, int64_t row, int64_t column, int vector, Prefetching prefetcher,
                        ScaleSource<Format>& source) {
        const ActivationGroup* rows[ROWS];
        prefetch_tile<ROWS, VECTORS>(p, row, column + vector * LANES);
        for (int r = 0; r < ROWS; r++) rows[r] = (const ActivationGroup*)(p.input + (row + r) * p.input_stride);
        Floats sums[ROWS][VECTORS];
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++) sums[r][v] = zero();
        const int64_t num_blocks = divide_up(p.num_inputs, Format::BLOCK);
        for (int64_t b = 0; b < num_blocks; b++) {
            const uint8_t* block = panel + b * Format::BLOCK_BYTES;
            const auto* scales = source.of_block(block, b);
            for (int group = 0; group < GROUPS; group += GROUPS_OF_STEP) {
                add_groups<Format>(block, scales, group, vector, rows, prefetcher, sums);
                for (int r = 0; r < ROWS; r++) rows[r]++;
            }
        }
        store_tile<ROWS, VECTORS>(p, sums, row, column + vector * LANES);
    }
};

template <>
struct Tile<BFloat16> {
    static constexpr int MAX_ROWS = NUM_REGISTERS == 32 ? 12 : 2;
    static constexpr int VECTORS = 2;
    static constexpr int LINES = BFloat16::STEP_BYTES / 64;  // of a step

    template <int ROWS, class Prefetching>
    static NOT_INLINE void compute(const LinearParameters& p, const uint8_t* panel, int64_t row, int64_t column, int, Prefetching prefetcher,
                        ScaleSource<BFloat16>&) {
        prefetch_tile<ROWS, VECTORS>(p, row, column);
        Floats sums[ROWS][VECTORS];
        for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = zero();
        const int64_t num_pairs = divide_up(p.num_inputs, 2);
        const uint8_t* input = p.input + row * p.input_stride;
        for (int64_t k = 0; k < num_pairs; k++) {
            prefetcher.template step<LINES>(panel + k * BFloat16::STEP_BYTES);
            const int32_t* pairs = (const int32_t*)(panel + k * BFloat16::STEP_BYTES);
            Ints low = load_ints(pairs), high = load_ints(pairs + LANES);
            for (int r = 0; r < ROWS; r++) {
                Ints x = fill_ints(load_int32(input + r * p.input_stride + 4 * k));
                sums[r][0] = dot_pairs(sums[r][0], low, x);
                sums[r][1] = dot_pairs(sums[r][1], high, x);
            }
        }
        store_tile<ROWS, VECTORS>(p, sums, row, column);
    }
};

template <>
struct Tile<Float32> {
    static constexpr int MAX_ROWS = NUM_REGISTERS == 32 ? 12 : 2;
    static constexpr int VECTORS = 2;
    static constexpr int LINES = Float32::STEP_BYTES / 64;  // of a step

    template <int ROWS, class Prefetching>
    static NOT_INLINE void compute(const LinearParameters& p, const uint8_t* panel, int64_t row, int64_t column, int, Prefetching prefetcher,
                        ScaleSource<Float32>&) {
        prefetch_tile<ROWS, VECTORS>(p, row, column);
        Floats sums[ROWS][VECTORS];
        for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = zero();
        const uint8_t* input = p.input + row * p.input_stride;
        for (int64_t k = 0; k < p.num_inputs; k++) {
            prefetcher.template step<LINES>(panel + k * Float32::STEP_BYTES);
            const float* weights = (const float*)(panel + k * Float32::STEP_BYTES);
            Floats low = load(weights), high = load(weights + LANES);
            for (int r = 0; r < ROWS; r++) {
                Floats x = fill(load_float(input + r * p.input_stride + 4 * k));
                sums[r][0] = multiply_add(low, x, sums[r][0]);
                sums[r][1] = multiply_add(high, x, sums[r][1]);
            }
        }
        store_tile<ROWS, VECTORS>(p, sums, row, column);
    }
};

// Computes a tile of `num_rows` rows, MIN_ROWS to ROWS.
template <class Format, int ROWS, int MIN_ROWS, class Prefetching>
inline void compute_tile(const LinearParameters& p, const uint8_t* panel, int64_t row, int64_t column, int64_t num_rows,
                         Prefetching prefetcher, ScaleSource<Format>& source) {
    if constexpr (ROWS > MIN_ROWS) {
        if (num_rows < ROWS)
            return compute_tile<Format, ROWS - 1, MIN_ROWS>(p, panel, row, column, num_rows, prefetcher, source);
    }
    Tile<Format>::template compute<ROWS>(p, panel, row, column, 0, prefetcher, source);
    if constexpr (Tile<Format>::VECTORS == 1)
        Tile<Format>::template compute<ROWS>(p, panel, row, column, 1, Prefetcher{panel, 0}, source);
}

// Computes the rows start..end of a panel, in tiles of nearly the same size. Up to STREAM_ROWS, reading weights takes
// longer than multiplying them; more kinds of tiles with a prefetcher of their own would take long to compile.
template <class Format>
inline void compute_rows(const LinearParameters& p, const uint8_t* panel, int64_t panel_bytes, int64_t column, int64_t start,
                         int64_t end, ScaleSource<Format>& source) {
    constexpr int MAX_ROWS = Tile<Format>::MAX_ROWS, STREAM_ROWS = int(min_of(MAX_ROWS, 4));
    constexpr int MIN_ROWS = int(min_of(MAX_ROWS / 2, STREAM_ROWS + 1));  // of one of several tiles, or of a larger one
    const int64_t num_tiles = divide_up(end - start, MAX_ROWS);
    source.begin_panel(num_tiles);
    if (num_tiles == 1 && end - start <= STREAM_ROWS)
        return compute_tile<Format, STREAM_ROWS, 1>(p, panel, start, column, end - start, StreamPrefetcher{}, source);
    int64_t row = start;
    for (int64_t tile = 0; tile < num_tiles; tile++) {
        const int64_t num_rows = divide_up(end - row, num_tiles - tile);
        const Prefetcher prefetcher = Prefetcher::for_tile<Tile<Format>::LINES>(panel, panel_bytes, tile, num_tiles);
        compute_tile<Format, MAX_ROWS, MIN_ROWS>(p, panel, row, column, num_rows, prefetcher, source);
        row += num_rows;
    }
}

constexpr int64_t TASKS_OF_A_THREAD = 2 * PIECES_OF_A_THREAD;

// Computes a thread's rows of a panel in the vector registers.
template <class Format>
struct VectorProducts {
    static constexpr int64_t MAX_ROWS = Tile<Format>::MAX_ROWS;
    static constexpr int64_t ROWS_OF_A_THREAD = 32;  // at which it pays that each thread reads all weights
    VectorProducts(const LinearParameters& p) : p(p) {}
    void compute(const uint8_t* panel, int64_t panel_bytes, int64_t column, int64_t start, int64_t end) {
        compute_rows<Format>(p, panel, panel_bytes, column, start, end, source);
    }
    const LinearParameters& p;
    ScaleSource<Format> source;
};

// Computes the rows first..last.
template <class Format, class Products>
void multiply_rows(const LinearParameters& p, const Worker& worker, int64_t first, int64_t last) {
    const int64_t num_rows = last - first;
    if (num_rows == 0) return;
    const int64_t num_panels = divide_up(p.num_outputs, PANEL), panel_bytes = Format::panel_bytes(p.num_inputs);
    const int64_t threads = num_threads(worker), target_tasks = TASKS_OF_A_THREAD * threads;
    // With many rows, each thread takes rows of its own. With few, threads share out the columns; with few columns, both.
    const int64_t num_tiles = divide_up(num_rows, Products::MAX_ROWS), few = min_of(num_tiles, max_of(1, target_tasks / num_panels));
    const int64_t row_parts = num_rows >= threads * Products::ROWS_OF_A_THREAD ? threads : few;
    const int64_t num_tasks = row_parts * num_panels;
    Products products(p);
    for (Tasks tasks(worker, num_tasks, max_of(1, num_tasks / target_tasks)); tasks.next();)
        for (int64_t task = tasks.first; task < tasks.last; task++) {
            const int64_t panel = task % num_panels, part = task / num_panels;
            const int64_t start = first + num_rows * part / row_parts, end = first + num_rows * (part + 1) / row_parts;
            products.compute(p.weights + panel * panel_bytes, panel_bytes, panel * PANEL, start, end);
        }
}

template <class Format, class Products = VectorProducts<Format>>
void linear(const void* parameters, const Worker& worker) {
    const LinearParameters& p = *(const LinearParameters*)parameters;
    multiply_rows<Format, Products>(p, worker, 0, p.num_rows->all);
}

// Computes rows of generated tokens with Products and rows of prompts with PromptProducts.
template <class Format, class Products, class PromptProducts>
void linear_by_origin(const void* parameters, const Worker& worker) {
    const LinearParameters& p = *(const LinearParameters*)parameters;
    const RowCounts counts = *p.num_rows;
    multiply_rows<Format, Products>(p, worker, 0, counts.generated);
    if (0 < counts.generated && counts.generated < counts.all) barrier(worker);  // resets the counters of tasks
    multiply_rows<Format, PromptProducts>(p, worker, counts.generated, counts.all);
}

// An id without an embedding gets NaN, which ends its request and no other.
template <class Format>
void embed(const void* parameters, const Worker& worker) {
    const EmbedParameters& p = *(const EmbedParameters*)parameters;
    const int64_t num_rows = p.num_rows->all;
    for (Tasks tasks(worker, num_rows, grain_of(worker, num_rows)); tasks.next();)
        for (int64_t row = tasks.first; row < tasks.last; row++) {
            const int64_t token_id = p.token_ids[row];
            if (token_id < 0 || token_id >= p.num_ids) {
                for (int64_t k = 0; k < p.size; k++) p.output[row * p.output_stride + k] = NAN;
                continue;
            }
            const uint8_t* panel = p.weights + token_id / PANEL * Format::panel_bytes(p.size);
            for (int64_t k = 0; k < p.size; k++)
                p.output[row * p.output_stride + k] = Format::weight(panel, int(token_id % PANEL), k);
        }
}

}  // namespace
