// The tile registers of AMX: eight of up to 16 rows of 64 bytes.
//
// A product of tiles adds 16 pairs of bfloat16 to each of 16 x 16 sums. The sums of a row do not depend on the number of
// rows, but the order of additions differs from that of vector registers: code that uses tiles must use them for any
// number of rows.
#pragma once

#include <initializer_list>

#include "simd.h"

namespace {

constexpr int64_t ROWS_OF_TILE = 16;
constexpr int64_t TILE_BYTES = 64;  // of a row
constexpr int64_t NUMBERS_OF_TILE = 32;  // bfloat16 of a row

struct alignas(64) TileConfiguration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t num_rows[16] = {};
    void set(int tile, int64_t rows, int64_t bytes = TILE_BYTES) {
        row_bytes[tile] = uint16_t(bytes);
        num_rows[tile] = uint8_t(rows);
    }
};

// In assembly, because the compilers' intrinsics do not say that these instructions read and write memory.
INLINE void tile_configure(const TileConfiguration& configuration) {
    asm volatile("ldtilecfg %0" : : "m"(configuration));
}
INLINE void tile_release() { asm volatile("tilerelease"); }
template <int TILE> INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" : : "i"(TILE)); }
template <int TILE> INLINE void tile_load(const void* rows, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE> INLINE void tile_store(void* rows, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(TILE) : "memory");
}
// sums += a b, of pairs of bfloat16
template <int SUMS, int A, int B> INLINE void tile_dot_pairs() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(A), "i"(B));
}

}  // namespace
