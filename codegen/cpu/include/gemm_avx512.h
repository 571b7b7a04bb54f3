// Panels by AVX-512: up to eight rows by 32 columns in registers, along a stretch of k that stays in the first cache.
#pragma once
#include <immintrin.h>

#include "tile.h"

// sum + a * b for the V values of each column; the first argument says of which type they are.
SPARSEC_INLINE __m512 multiply_add(float, __m512 sum, int32_t a, __m512i b) {
  return _mm512_fmadd_ps((__m512)_mm512_set1_epi32(a), (__m512)b, sum);
}
#if defined(__AVX512BF16__)
SPARSEC_INLINE __m512 multiply_add(bf16, __m512 sum, int32_t a, __m512i b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
}
#endif

template <class Element>
struct Avx512 {
  typedef Element Elem;
  static constexpr int STRETCH = 8;  // steps
  static constexpr int SLICE = 0;    // it slices the steps itself

  static void begin() {}
  static void end() {}

  // As of AmxBf16.
  template <int tiles, bool cold>
  static void multiply(const char* a, int64_t stride, const char* b, int steps, int rows, Sums* sums) {
    for (int s = 0; s < steps; s += STRETCH) {
      const int some = least(STRETCH, steps - s);
      for (int row = 0; row < rows;) {
        const char* at = a + row / ROWS * stride + row % ROWS * 64 + s * TILE;
        const int left = least(rows - row, ROWS - row % ROWS);
        const bool ask = cold && row == 0;
        Sums& to = sums[row / ROWS];
        if (left >= 8)
          row += block<8>(at, b + s * PAIR, some, s == 0, ask, to, row % ROWS);
        else if (left >= 4)
          row += block<4>(at, b + s * PAIR, some, s == 0, ask, to, row % ROWS);
        else if (left >= 2)
          row += block<2>(at, b + s * PAIR, some, s == 0, ask, to, row % ROWS);
        else
          row += block<1>(at, b + s * PAIR, some, s == 0, ask, to, row % ROWS);
      }
    }
  }

  template <int rows>
  static int block(const char* a, const char* b, int steps, bool starts, bool ask, Sums& sums, int row) {
    __m512 sum[rows][2];
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < 2; ++j) sum[r][j] = starts ? _mm512_setzero_ps() : _mm512_load_ps(sums.of[j][row + r]);
    for (int s = 0; s < steps; ++s, a += TILE, b += PAIR) {
      if (ask) ask_ahead(b);
      for (int k = 0; k < 16; ++k) {
        const __m512i b0 = _mm512_loadu_si512(b + k * 64), b1 = _mm512_loadu_si512(b + TILE + k * 64);
        for (int r = 0; r < rows; ++r) {
          int32_t v;
          memcpy(&v, a + r * 64 + k * 4, 4);
          sum[r][0] = multiply_add(Elem(), sum[r][0], v, b0);
          sum[r][1] = multiply_add(Elem(), sum[r][1], v, b1);
        }
      }
    }
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < 2; ++j) _mm512_store_ps(sums.of[j][row + r], sum[r][j]);
    return rows;
  }
};
