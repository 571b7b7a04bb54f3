// Panels of bf16 by AMX: 32 rows by 32 columns in four accumulating registers, two loads for two products.
#pragma once
#include <immintrin.h>

#include "tile.h"

struct AmxBf16 {
  typedef bf16 Elem;

  static void begin() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config));  // g++ takes the intrinsic to read less than the whole struct
  }
  static void end() { _tile_release(); }

  // sums = rows of one or two tiles * panel, `steps` tiles deep.
  // a: tiles of the first 16 rows, one after the other; those of the next 16 rows are `stride` bytes further.
  // rows: how many of them count. cold: whether the panel comes from memory.
  template <int tiles, bool cold>
  SPARSEC_INLINE void multiply(const char* a, int64_t stride, const char* b, int steps, int, Sums* sums) {
    _tile_zero(0);
    _tile_zero(1);
    if (tiles == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int s = 0; s < steps; ++s, a += TILE, b += PAIR) {
      if (cold) ask_ahead(b);
      _tile_loadd(4, a, 64);
      _tile_loadd(6, b, 64);
      _tile_loadd(7, b + TILE, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (tiles == 2) {
        _tile_loadd(5, a + stride, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums[0].of[0], 64);
    _tile_stored(1, sums[0].of[1], 64);
    if (tiles == 2) {
      _tile_stored(2, sums[1].of[0], 64);
      _tile_stored(3, sums[1].of[1], 64);
    }
  }
};
