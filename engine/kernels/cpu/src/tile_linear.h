// Matrix products on the tile registers of AMX, which multiply bfloat16.
#pragma once

#include <type_traits>

#include "linear.h"
#include "tiles.h"

namespace {

constexpr int64_t STEP_BYTES = NUMBERS_OF_TILE / 2 * BFloat16::STEP_BYTES;  // weights of a panel's columns for the inputs of a tile
constexpr int64_t STEPS_AT_ONCE = 9;  // their weights and as much of the input fit into the L1 cache

// The weights that tiles load: bfloat16 directly from the panel.
template <class Format>
struct TileWeights {
    static_assert(std::is_same_v<Format, BFloat16>);
    // A single tile of rows reads no weights twice, so cutting its steps would only store and load its sums.
    static int64_t steps_at_once(int64_t num_steps, int64_t num_tiles) { return num_tiles == 1 ? num_steps : STEPS_AT_ONCE; }
    const uint8_t* steps(const uint8_t* panel, int64_t first, int64_t) { return panel + first * STEP_BYTES; }
    static Prefetcher prefetcher(const uint8_t* steps, int64_t num_steps, int64_t tile, int64_t num_tiles) {
        return Prefetcher::for_tile<STEP_BYTES / 64>(steps, num_steps * STEP_BYTES, tile, num_tiles);
    }
};

// Quantised weights, unpacked a few steps at a time. Unpacking takes about as long as multiplying fifty rows.
template <class Codes, class Scales>
struct TileWeights<Quantised<Codes, Scales>> {
    using Format = Quantised<Codes, Scales>;
    static constexpr int GROUPS = NUMBERS_OF_TILE / Format::GROUP;  // of a step
    static constexpr int64_t STEPS_OF_BLOCK = Format::BLOCK / NUMBERS_OF_TILE;
    static constexpr int64_t PACKED_BYTES = Format::BLOCK_BYTES / STEPS_OF_BLOCK;  // of a step
    alignas(64) uint8_t unpacked[STEPS_AT_ONCE * STEP_BYTES];

    static int64_t steps_at_once(int64_t, int64_t) { return STEPS_AT_ONCE; }
    const uint8_t* steps(const uint8_t* panel, int64_t first, int64_t num_steps) {
        for (int64_t step = first; step < first + num_steps; step++) {
            const uint8_t* ahead = panel + (step + STEPS_AT_ONCE) * PACKED_BYTES;
            for (int64_t line = 0; line < PACKED_BYTES; line += 64) prefetch_to_l2(ahead + line);
            const uint8_t* block = panel + step / STEPS_OF_BLOCK * Format::BLOCK_BYTES;
            for (int i = 0; i < GROUPS; i++) {
                const int group = int(step % STEPS_OF_BLOCK) * GROUPS + i;
                uint8_t* out = unpacked + ((step - first) * GROUPS + i) * (STEP_BYTES / GROUPS);
                unpack_group<0>(block, group, out);
                unpack_group<1>(block, group, out + LANES * 4);
            }
        }
        return unpacked;
    }
    static Prefetcher prefetcher(const uint8_t* steps, int64_t, int64_t, int64_t) { return {steps, 0}; }

    template <int VECTOR>
    static INLINE void unpack_group(const uint8_t* block, int group, uint8_t* out) {
        const Floats scale = quiet(Scales::template load_vector<SCALE>(block, group, VECTOR * LANES));
        Floats offset = scale * fill(-Format::ZERO);
        if constexpr (Format::HAS_MINIMUM)
            offset = quiet(Scales::template load_vector<MINIMUM>(block, group, VECTOR * LANES));
        unpack_steps<VECTOR, 0>(block, group, scale, offset, out);
    }

    // Unpacks four inputs of each column: two pairs.
    template <int VECTOR, int STEP>
    static INLINE void unpack_steps(const uint8_t* block, int group, Floats scale, Floats offset, uint8_t* out) {
        const Ints codes = as_ints(Format::template codes<STEP>(block, group, VECTOR)), byte = fill_ints(255);
        const Floats first = to_floats(codes & byte), second = to_floats(shift_right<8>(codes) & byte);
        const Floats third = to_floats(shift_right<16>(codes) & byte), fourth = to_floats(shift_right<24>(codes));
        int32_t* pairs = (int32_t*)(out + 2 * STEP * BFloat16::STEP_BYTES);
        store_ints(pairs, pair_of(multiply_add(first, scale, offset), multiply_add(second, scale, offset)));
        pairs += BFloat16::STEP_BYTES / 4;
        store_ints(pairs, pair_of(multiply_add(third, scale, offset), multiply_add(fourth, scale, offset)));
        if constexpr (STEP + 1 < Format::STEPS) unpack_steps<VECTOR, STEP + 1>(block, group, scale, offset, out);
    }

    // Rounds to bfloat16, which is the upper half of a float32; ties go away from zero.
    static INLINE Ints pair_of(Floats low, Floats high) {
        const Ints half = fill_ints(0x8000), upper = fill_ints(int32_t(0xffff0000));
        return shift_right<16>(as_ints(low) + half) | ((as_ints(high) + half) & upper);
    }

    // Replaces NaNs by one that stays NaN when rounded.
    static INLINE Floats quiet(Floats x) {
        return {_mm512_mask_mov_ps(x.v, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), _mm512_set1_ps(__builtin_nanf("")))};
    }
};

template <class Format>
struct TileProducts {
    static constexpr int64_t MAX_ROWS = 2 * ROWS_OF_TILE;
    static constexpr int64_t ROWS_OF_A_THREAD = INT32_MAX;  // never: it pays more to read and unpack weights once
    static constexpr int64_t BAND = 8;  // tiles of rows
    static constexpr int64_t SUM_BYTES = PANEL * 4;
    // Two tiles of rows times two tiles of columns make four tiles of sums: each loaded tile is used twice.
    enum { UPPER_LEFT, UPPER_RIGHT, LOWER_LEFT, LOWER_RIGHT, UPPER, LOWER, LEFT, RIGHT };

    const LinearParameters& p;
    int64_t configured_rows = 0;  // of the tiles
    TileWeights<Format> weights;

    TileProducts(const LinearParameters& p) : p(p) {}
    ~TileProducts() { tile_release(); }

    void compute(const uint8_t* panel, int64_t, int64_t column, int64_t start, int64_t end) {
        for (; start < end; start += BAND * MAX_ROWS)
            compute_band(panel, column, start, min_of(end, start + BAND * MAX_ROWS));
    }

    // Computes a few steps for all rows before the next steps, so that their weights stay in the L1 cache.
    void compute_band(const uint8_t* panel, int64_t column, int64_t start, int64_t end) {
        alignas(64) float sums[BAND][MAX_ROWS * PANEL];
        const int64_t num_tiles = divide_up(end - start, MAX_ROWS), all_steps = divide_up(p.num_inputs, NUMBERS_OF_TILE);
        const int64_t steps_at_once = weights.steps_at_once(all_steps, num_tiles);
        for (int64_t step = 0; step < all_steps; step += steps_at_once) {
            const int64_t num_steps = min_of(steps_at_once, all_steps - step);
            const uint8_t* some = weights.steps(panel, step, num_steps);
            for (int64_t tile = 0; tile < num_tiles; tile++) {
                const int64_t row = start + tile * MAX_ROWS;
                const uint8_t* input = p.input + row * p.input_stride + step * TILE_BYTES;
                const Prefetcher prefetcher = weights.prefetcher(some, num_steps, tile, num_tiles);
                const int64_t num_rows = min_of(MAX_ROWS, end - row);
                configure(num_rows);
                if (num_rows > ROWS_OF_TILE) multiply<true>(some, input, step == 0, num_steps, prefetcher, sums[tile]);
                else multiply<false>(some, input, step == 0, num_steps, prefetcher, sums[tile]);
            }
        }
        for (int64_t row = start; row < end; row++) {
            const float* sum = sums[(row - start) / MAX_ROWS] + (row - start) % MAX_ROWS * PANEL;
            const Floats ready[1][2] = {{load(sum), load(sum + LANES)}};
            store_tile<1, 2>(p, ready, row, column);
        }
    }

    void configure(int64_t num_rows) {
        if (num_rows == configured_rows) return;
        configured_rows = num_rows;
        TileConfiguration configuration;
        for (int tile : {UPPER_LEFT, UPPER_RIGHT, UPPER}) configuration.set(tile, min_of(num_rows, ROWS_OF_TILE));
        for (int tile : {LOWER_LEFT, LOWER_RIGHT, LOWER}) configuration.set(tile, max_of(1, num_rows - ROWS_OF_TILE));
        for (int tile : {LEFT, RIGHT}) configuration.set(tile, ROWS_OF_TILE);
        tile_configure(configuration);
    }

    template <bool HAS_LOWER>
    INLINE void multiply(const uint8_t* weights, const uint8_t* input, bool is_first, int64_t num_steps, Prefetcher prefetcher, float* sums) const {
        const int64_t input_stride = p.input_stride;
        const uint8_t* lower_input = input + ROWS_OF_TILE * input_stride;
        float* const lower_sums = sums + ROWS_OF_TILE * PANEL;
        begin<UPPER_LEFT>(sums, is_first);
        begin<UPPER_RIGHT>(sums + LANES, is_first);
        if (HAS_LOWER) begin<LOWER_LEFT>(lower_sums, is_first);
        if (HAS_LOWER) begin<LOWER_RIGHT>(lower_sums + LANES, is_first);
        for (int64_t step = 0; step < num_steps; step++) {
            prefetcher.step<STEP_BYTES / 64>(weights);
            tile_load<LEFT>(weights, BFloat16::STEP_BYTES);
            tile_load<RIGHT>(weights + TILE_BYTES, BFloat16::STEP_BYTES);
            tile_load<UPPER>(input, input_stride);
            tile_dot_pairs<UPPER_LEFT, UPPER, LEFT>();
            tile_dot_pairs<UPPER_RIGHT, UPPER, RIGHT>();
            if (HAS_LOWER) {
                tile_load<LOWER>(lower_input, input_stride);
                tile_dot_pairs<LOWER_LEFT, LOWER, LEFT>();
                tile_dot_pairs<LOWER_RIGHT, LOWER, RIGHT>();
            }
            weights += STEP_BYTES;
            input += TILE_BYTES;
            lower_input += TILE_BYTES;
        }
        tile_store<UPPER_LEFT>(sums, SUM_BYTES);
        tile_store<UPPER_RIGHT>(sums + LANES, SUM_BYTES);
        if (HAS_LOWER) tile_store<LOWER_LEFT>(lower_sums, SUM_BYTES);
        if (HAS_LOWER) tile_store<LOWER_RIGHT>(lower_sums + LANES, SUM_BYTES);
    }

    // Zeroes the sums, or loads them from the steps before.
    template <int SUMS>
    static INLINE void begin(const float* sums, bool is_first) {
        if (is_first) tile_zero<SUMS>();
        else tile_load<SUMS>(sums, SUM_BYTES);
    }
};

}  // namespace
