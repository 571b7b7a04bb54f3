// Panels by AVX2: two rows by 32 columns in registers. bf16 is widened to f32 on the way, which is exact.
#pragma once
#include <immintrin.h>

#include "tile.h"

// The V values of 8 columns, or one row's value in all lanes, as f32.
template <class Elem>
struct Widened;
template <>
struct Widened<float> {
  static constexpr int COUNT = 1;
  __m256 of[1];
  SPARSEC_INLINE Widened from(__m256i bits) { return {{(__m256)bits}}; }
};
template <>
struct Widened<bf16> {
  static constexpr int COUNT = 2;
  __m256 of[2];
  SPARSEC_INLINE Widened from(__m256i bits) {
    const __m256i high = _mm256_set1_epi32(int32_t(0xffff0000));
    return {{(__m256)_mm256_slli_epi32(bits, 16), (__m256)_mm256_and_si256(bits, high)}};
  }
};

template <class Element>
struct Avx2 {
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
        const bool ask = cold && row == 0;
        if (rows - row >= 2)  // tiles hold an even number of rows
          row += block<2>(at, b + s * PAIR, some, s == 0, ask, sums[row / ROWS], row % ROWS);
        else
          row += block<1>(at, b + s * PAIR, some, s == 0, ask, sums[row / ROWS], row % ROWS);
      }
    }
  }

  template <int rows>
  static int block(const char* a, const char* b, int steps, bool starts, bool ask, Sums& sums, int row) {
    typedef Widened<Elem> W;
    __m256 sum[rows][4];
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < 4; ++c)
        sum[r][c] = starts ? _mm256_setzero_ps() : _mm256_load_ps(sums.of[c / 2][row + r] + c % 2 * 8);
    for (int s = 0; s < steps; ++s, a += TILE, b += PAIR) {
      if (ask) ask_ahead(b);
      for (int k = 0; k < 16; ++k) {
        W x[rows];
        for (int r = 0; r < rows; ++r) {
          int32_t v;
          memcpy(&v, a + r * 64 + k * 4, 4);
          x[r] = W::from(_mm256_set1_epi32(v));
        }
        for (int c = 0; c < 4; ++c) {
          const char* at = b + c / 2 * TILE + k * 64 + c % 2 * 32;
          const W w = W::from(_mm256_loadu_si256((const __m256i*)at));
          for (int r = 0; r < rows; ++r)
            for (int v = 0; v < W::COUNT; ++v) sum[r][c] = _mm256_fmadd_ps(x[r].of[v], w.of[v], sum[r][c]);
        }
      }
    }
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < 4; ++c) _mm256_store_ps(sums.of[c / 2][row + r] + c % 2 * 8, sum[r][c]);
    return rows;
  }
};
