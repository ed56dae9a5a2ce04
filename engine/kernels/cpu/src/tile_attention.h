// Attention over a bfloat16 KV cache on the tile registers of AMX: the products differ from attention.h.
#pragma once

#include "attention.h"
#include "tiles.h"

namespace {

struct TileAttention : Attention<BFloat16Cache> {
    // Four adjacent tiles of sums; queries or weights; keys or values.
    enum { FIRST, SECOND, THIRD, FOURTH, QUERIES, WEIGHTS, KEYS, VALUES };

    int64_t configured_rows = 0;

    using Attention::Attention;
    ~TileAttention() { tile_release(); }

    static bool can_compute(const PagedAttentionParameters& p) { return p.cache.head_dim % NUMBERS_OF_TILE == 0; }

    void run() {
        start();
        for (int64_t c = item.first_chunk; c < item.first_chunk + item.num_chunks; c++)
            for (int64_t packed = 0; packed < num_packed(); packed += ROWS_OF_TILE)
                add_rows(c * CHUNK, packed, min_of(ROWS_OF_TILE, num_packed() - packed));
    }

    // Like add_tile.
    void add_rows(int64_t start, int64_t packed, int64_t num_rows) {
        const int64_t end = min_of(start + CHUNK, position(packed + num_rows - 1) + 1);
        // The block before that of the first token may have slid out of the window.
        const int64_t first = max_of(start, first_visible(packed)) / LANES * LANES, begin = first / NUMBERS_OF_TILE * NUMBERS_OF_TILE;
        if (first >= end) return;
        configure(num_rows);
        alignas(64) float scores[ROWS_OF_TILE][CHUNK];
        alignas(64) uint16_t weights[ROWS_OF_TILE][CHUNK];
        for (int64_t token = first; token < end;) token = add_scores(token, end, packed, &scores[0][token - start]);
        float highest[ROWS_OF_TILE], sums[ROWS_OF_TILE];
        for (int64_t r = 0; r < num_rows; r++) {
            sums[r] = softmax(start, begin, end, packed + r, scores[r], weights[r], highest[r]);
            for (int64_t t = divide_up(end, LANES) * LANES; t % NUMBERS_OF_TILE; t += LANES) memset(&weights[r][t - start], 0, LANES * 2);
        }
        alignas(64) float values[ROWS_OF_TILE][MAX_HEAD_DIM + LANES];
        for (int64_t d = 0; d < size;) d = add_values(start, first, end, weights, d, values);
        for (int64_t r = 0; r < num_rows; r++) {
            values[r][size] = highest[r];
            values[r][size + 1] = sums[r];
            merge(values[r], size, states + (packed + r) * (size + 2));
        }
    }

    void configure(int64_t num_rows) {
        if (num_rows == configured_rows) return;
        configured_rows = num_rows;
        TileConfiguration configuration;
        for (int tile : {FIRST, SECOND, THIRD, FOURTH, QUERIES, WEIGHTS}) configuration.set(tile, num_rows);
        for (int tile : {KEYS, VALUES}) configuration.set(tile, ROWS_OF_TILE);
        tile_configure(configuration);
    }

    // Computes the scores of up to four tiles of tokens. Returns the token after them.
    int64_t add_scores(int64_t token, int64_t end, int64_t packed, float* scores) const {
        const int64_t num_tiles = divide_up(end - token, LANES);
        const uint16_t* q = queries + packed * size;
        if (reads_once)
            for (int64_t t = token; t < min_of(end, token + 4 * LANES); t += LANES) prefetch_values(t);
        if (num_tiles >= 4) return multiply_keys<4>(token, q, scores);
        return num_tiles >= 2 ? multiply_keys<2>(token, q, scores) : multiply_keys<1>(token, q, scores);
    }

    void prefetch_values(int64_t token) const {
        const uint8_t* values = pair_of(token);
        for (int64_t line = 0; line < LANES * size * 2; line += 64) prefetch_to_l2(values + line);
    }

    template <int TILES>
    int64_t multiply_keys(int64_t token, const uint16_t* q, float* scores) const {
        const int64_t stride = block_size * 4;  // bytes of a pair of dimensions
        const uint8_t* keys[TILES];
        for (int i = 0; i < TILES; i++, token += LANES) keys[i] = (const uint8_t*)keys_of(token) + token % block_size * 4;
        zero_sums<TILES>();
        for (int64_t d = 0; d < size; d += NUMBERS_OF_TILE) {
            tile_load<QUERIES>(q + d, size * 2);
            each_tile<TILES>([&]<int TILE>() {
                tile_load<KEYS>(keys[TILE] + d / 2 * stride, stride);
                tile_dot_pairs<TILE, QUERIES, KEYS>();
            });
        }
        store_sums<TILES>(scores, CHUNK * 4);
        return token;
    }

    // Computes the weighted values of up to four tiles of dimensions. Returns the dimension after them.
    int64_t add_values(int64_t start, int64_t first, int64_t end, uint16_t (&weights)[ROWS_OF_TILE][CHUNK], int64_t d, float (&values)[ROWS_OF_TILE][MAX_HEAD_DIM + LANES]) const {
        if (size - d >= 4 * LANES) return multiply_values<4>(start, first, end, &weights[0][0], d, &values[0][0]);
        return multiply_values<2>(start, first, end, &weights[0][0], d, &values[0][0]);
    }

    template <int TILES>
    int64_t multiply_values(int64_t start, int64_t first, int64_t end, const uint16_t* weights, int64_t d, float* values) const {
        zero_sums<TILES>();
        for (int64_t token = first / NUMBERS_OF_TILE * NUMBERS_OF_TILE; token < end; token += NUMBERS_OF_TILE) {
            if (reads_once && d == 0)
                if (const uint8_t* ahead = keys_after(start, token)) prefetch_keys(ahead, token);
            alignas(64) uint8_t copy[ROWS_OF_TILE * TILES * TILE_BYTES];
            const uint8_t* tile = pair_of(token) + d * 4;
            int64_t stride = size * 4;
            if (block_size < NUMBERS_OF_TILE || token + NUMBERS_OF_TILE > end) {
                copy_values<TILES>(token, first, end, d, copy);
                tile = copy;
                stride = TILES * TILE_BYTES;
            }
            tile_load<WEIGHTS>(weights + token - start, CHUNK * 2);
            each_tile<TILES>([&]<int TILE>() {
                tile_load<VALUES>(tile + TILE * TILE_BYTES, stride);
                tile_dot_pairs<TILE, WEIGHTS, VALUES>();
            });
        }
        store_sums<TILES>(values + d, (MAX_HEAD_DIM + LANES) * 4);
        return d + TILES * LANES;
    }

    // Returns the values of a token and the one after it.
    const uint8_t* pair_of(int64_t token) const { return (const uint8_t*)values_of(token) + token % block_size * size * 2; }

    void prefetch_keys(const uint8_t* block, int64_t token) const {
        const int64_t bytes = min_of(NUMBERS_OF_TILE, block_size) * size * 2;
        const uint8_t* part = block + token % block_size * size * 2;
        for (int64_t line = 0; line < bytes; line += 64) prefetch_to_l2(part + line);
    }

    // Copies the values of one tile from one block or several. Values before the vector of the first token and after the
    // last token may be garbage: zeros instead.
    template <int TILES>
    void copy_values(int64_t token, int64_t first, int64_t end, int64_t d, uint8_t* out) const {
        constexpr int64_t BYTES = TILES * TILE_BYTES;
        for (int64_t pair = 0; pair < ROWS_OF_TILE; pair++, token += 2, out += BYTES) {
            if (token < first || token >= end) {
                memset(out, 0, BYTES);
                continue;
            }
            const uint8_t* values = pair_of(token) + d * 4;
            const Ints mask = fill_ints(token + 1 < end ? -1 : 0xffff);
            for (int64_t i = 0; i < BYTES; i += TILE_BYTES)
                store_ints((int32_t*)(out + i), load_ints((const int32_t*)(values + i)) & mask);
        }
    }

    template <int TILES, int TILE = 0, class Function>
    static INLINE void each_tile(const Function& function) {
        if constexpr (TILE < TILES) {
            function.template operator()<TILE>();
            each_tile<TILES, TILE + 1>(function);
        }
    }

    template <int TILES>
    static INLINE void zero_sums() {
        each_tile<TILES>([]<int TILE>() { tile_zero<TILE>(); });
    }

    template <int TILES>
    static INLINE void store_sums(float* out, int64_t stride) {
        each_tile<TILES>([&]<int TILE>() { tile_store<TILE>(out + TILE * LANES, stride); });
    }
};

void paged_attention_on_tiles(const void* parameters, const Worker& worker) {
    const PagedAttentionParameters& p = *(const PagedAttentionParameters*)parameters;
    if (p.cache.type == CACHE_BFLOAT16 && TileAttention::can_compute(p)) attend<TileAttention>(p, worker);
    else paged_attention(parameters, worker);
}

}  // namespace
