// Tiles: 16 rows of 64 bytes, what one AMX register holds. Weights and rows of activations both come in tiles.
//
// A tile of weights holds 16 columns of the result; its row r holds, for each of those columns, the V consecutive k's
// from r * V on that fill 4 bytes. Two tiles that are multiplied by the same rows lie side by side (gate and up of the
// same columns, or two neighbours), and pairs for rising k follow one another: a `panel`, one stretch of memory.
// A tile of activations holds 16 rows of S = 16 * V consecutive k's.
#pragma once
#include <stdint.h>
#include <string.h>

#include "store.h"

constexpr int64_t TILE = 1024;      // bytes
constexpr int64_t PAIR = 2 * TILE;  // bytes of the two weight tiles of one step along k
constexpr int ROWS = 16;            // rows of a tile

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
template <class T>
constexpr T least(T a, T b) {
  return a < b ? a : b;
}
template <class T>
constexpr T most(T a, T b) {
  return a > b ? a : b;
}

// 32 columns of f32 results for one tile of rows, as the two weight tiles of a panel yield them.
struct Sums {
  float of[2][ROWS][LANES];
};

// Ask for the weights one kilobyte ahead of a pair of tiles that comes from memory: what keeps the most lines in flight
// (measured: 20 GB/s on a core that reads 14 without it; 8 KB ahead is no better than nothing).
SPARSEC_INLINE void ask_ahead(const char* pair) {
#pragma GCC unroll 32
  for (int i = 0; i < PAIR; i += 64) __builtin_prefetch(pair + 1024 + i, 0, 2);
}
