// Products with weights in bfloat16 on the tile registers of AMX.
#pragma once

#include "linear.h"
#include "tiles.h"

namespace {

struct TileProducts {
    static constexpr int64_t MAX_ROWS = 2 * ROWS_OF_TILE;
    static constexpr int64_t SUM_BYTES = PANEL * 4, STEP_BYTES = NUMBERS_OF_TILE / 2 * BFloat16::STEP_BYTES;
    // Two tiles of rows with two tiles of columns make four of sums: each tile that is loaded serves twice.
    enum { UPPER_LEFT, UPPER_RIGHT, LOWER_LEFT, LOWER_RIGHT, UPPER, LOWER, LEFT, RIGHT };

    const LinearParameters& p;
    int64_t configured_rows = 0;  // of the tiles

    TileProducts(const LinearParameters& p) : p(p) {}
    ~TileProducts() { tile_release(); }

    void compute(const uint8_t* panel, int64_t panel_bytes, int64_t column, int64_t start, int64_t end) {
        const int64_t num_tiles = divide_up(end - start, MAX_ROWS);
        for (int64_t tile = 0; tile < num_tiles; tile++) {
            const int64_t row = start + tile * MAX_ROWS, num_rows = min_of(MAX_ROWS, end - row);
            const Ahead ahead = Ahead::of_tile<STEP_BYTES / 64>(panel, panel_bytes, tile, num_tiles);
            const uint8_t* input = p.input + row * p.input_stride;
            alignas(64) float sums[MAX_ROWS * PANEL];
            configure(num_rows);
            if (num_rows > ROWS_OF_TILE) multiply<true>(panel, input, ahead, sums);
            else multiply<false>(panel, input, ahead, sums);
            for (int64_t r = 0; r < num_rows; r++) {
                const Floats ready[1][2] = {{load(sums + r * PANEL), load(sums + r * PANEL + LANES)}};
                store_tile<1, 2>(p, ready, row + r, column);
            }
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
    INLINE void multiply(const uint8_t* weights, const uint8_t* input, Ahead ahead, float* sums) const {
        const int64_t input_stride = p.input_stride;
        const uint8_t* lower_input = input + ROWS_OF_TILE * input_stride;
        tile_zero<UPPER_LEFT>();
        tile_zero<UPPER_RIGHT>();
        tile_zero<LOWER_LEFT>();
        tile_zero<LOWER_RIGHT>();
        for (int64_t k = 0; k < p.num_inputs; k += NUMBERS_OF_TILE) {
            ahead.ask();
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
        if (HAS_LOWER) tile_store<LOWER_LEFT>(sums + ROWS_OF_TILE * PANEL, SUM_BYTES);
        if (HAS_LOWER) tile_store<LOWER_RIGHT>(sums + ROWS_OF_TILE * PANEL + LANES, SUM_BYTES);
    }
};

}  // namespace
