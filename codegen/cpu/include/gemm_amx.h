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

  // Steps whose weights stay in the first-level cache while all rows of a chunk pass by them.
  static constexpr int SLICE = 16;

  // sums = rows of one or two tiles * panel, `steps` tiles deep.
  // a: tiles of the first 16 rows, one after the other; those of the next 16 rows are `stride` bytes further.
  // rows: how many of them count. cold: whether the panel comes from memory.
  template <int tiles, bool cold>
  SPARSEC_INLINE void multiply(const char* a, int64_t stride, const char* b, int steps, int, Sums* sums) {
    clear<tiles>();
    for (int s = 0; s < steps; ++s, a += TILE, b += PAIR) step<tiles, cold, false, 0>(a, stride, b, b);
    put<tiles>(sums);
  }

  // The same for one slice of the steps, added to `sums` where it is not the first. Each step asks for `lines` of what
  // lies at `next`, which comes from memory meanwhile.
  template <int tiles, bool cold, int lines>
  SPARSEC_INLINE void add(const char* a, int64_t stride, const char* b, int steps, bool first, const char*& next,
                          Sums* sums) {
    if (first)
      clear<tiles>();
    else
      take<tiles>(sums);
    for (int s = 0; s < steps; ++s, a += TILE, b += PAIR, next += lines * 64)
      step<tiles, cold, true, lines>(a, stride, b, next);
    put<tiles>(sums);
  }

 private:
  // past: whether activations pass by the first-level cache, which the weights of a slice need.
  template <int tiles, bool cold, bool past, int lines>
  SPARSEC_INLINE void step(const char* a, int64_t stride, const char* b, const char* next) {
    ask<cold, lines, 0>(b, next);
    if (past)
      _tile_stream_loadd(4, a, 64);
    else
      _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    ask<cold, lines, 1>(b, next);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + TILE, 64);
    ask<cold, lines, 2>(b, next);
    _tile_dpbf16ps(1, 4, 7);
    if (tiles == 2) {
      if (past)
        _tile_stream_loadd(5, a + stride, 64);
      else
        _tile_loadd(5, a + stride, 64);
      _tile_dpbf16ps(2, 5, 6);
    }
    ask<cold, lines, 3>(b, next);
    if (tiles == 2) _tile_dpbf16ps(3, 5, 7);
  }

  // A quarter of what a step asks for: the weights two steps on if they come from memory, and of those at `next`. What is
  // asked for all at once may be dropped.
  template <bool cold, int lines, int quarter>
  SPARSEC_INLINE void ask(const char* b, const char* next) {
    if (cold)
      for (int i = PAIR * quarter / 4; i < PAIR * (quarter + 1) / 4; i += 64) __builtin_prefetch(b + PAIR + i, 0, 2);
    for (int i = lines * quarter / 4; i < lines * (quarter + 1) / 4; ++i) __builtin_prefetch(next + i * 64, 0, 2);
  }

  template <int tiles>
  SPARSEC_INLINE void clear() {
    _tile_zero(0);
    _tile_zero(1);
    if (tiles == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }

  template <int tiles>
  SPARSEC_INLINE void take(const Sums* sums) {
    _tile_loadd(0, sums[0].of[0], 64);
    _tile_loadd(1, sums[0].of[1], 64);
    if (tiles == 2) {
      _tile_loadd(2, sums[1].of[0], 64);
      _tile_loadd(3, sums[1].of[1], 64);
    }
  }

  template <int tiles>
  SPARSEC_INLINE void put(Sums* sums) {
    _tile_stored(0, sums[0].of[0], 64);
    _tile_stored(1, sums[0].of[1], 64);
    if (tiles == 2) {
      _tile_stored(2, sums[1].of[0], 64);
      _tile_stored(3, sums[1].of[1], 64);
    }
  }
};
