// Panels of int8 by int8 activations, summed in int32. A tile of either holds 64 k's, four to a lane.
#pragma once
#include <immintrin.h>

#include "tile.h"

// As Sums, of int32.
struct Counts {
  alignas(64) int32_t of[2][ROWS][LANES];
};

#if defined(SPARSEC_AMX)
#include "gemm_amx.h"

struct AmxInt8 : AmxBf16 {
  static constexpr int OFFSET = 0;  // of activations as they are stored

  // As of AmxBf16.
  template <int tiles, bool cold>
  SPARSEC_INLINE void multiply(const char* a, int64_t stride, const char* b, int steps, int, Counts* sums) {
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
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      if (tiles == 2) {
        _tile_loadd(5, a + stride, 64);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
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
#endif

// A few rows by a stretch of a panel that stays in the first cache, by whoever counts `rows` of them at a time.
template <class Block>
struct InBlocks {
  static constexpr int STRETCH = 8;  // steps

  static void begin() {}
  static void end() {}

  // As of AmxBf16.
  template <int tiles, bool cold>
  static void multiply(const char* a, int64_t stride, const char* b, int steps, int rows, Counts* sums) {
    for (int s = 0; s < steps; s += STRETCH) {
      const int some = least(STRETCH, steps - s);
      for (int row = 0; row < rows;) {
        const char* at = a + row / ROWS * stride + row % ROWS * 64 + s * TILE;
        const int left = least(rows - row, ROWS - row % ROWS);
        const bool ask = cold && row == 0;
        row += Block::some(left, at, b + s * PAIR, some, s == 0, ask, sums[row / ROWS], row % ROWS);
      }
    }
  }
};

#if defined(__AVX512VNNI__)
// vpdpbusd takes one unsigned factor: activations are stored plus 128, and 128 times the weights is taken off again.
struct Vnni : InBlocks<Vnni> {
  static constexpr int OFFSET = 128;

  static int some(int left, const char* a, const char* b, int steps, bool starts, bool ask, Counts& sums, int row) {
    if (left >= 8) return block<8>(a, b, steps, starts, ask, sums, row);
    if (left >= 4) return block<4>(a, b, steps, starts, ask, sums, row);
    if (left >= 2) return block<2>(a, b, steps, starts, ask, sums, row);
    return block<1>(a, b, steps, starts, ask, sums, row);
  }

  template <int rows>
  static int block(const char* a, const char* b, int steps, bool starts, bool ask, Counts& sums, int row) {
    const __m512i offset = _mm512_set1_epi8(char(OFFSET));
    __m512i sum[rows][2], more[2] = {};
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < 2; ++j)
        sum[r][j] = starts ? _mm512_setzero_si512() : _mm512_load_si512(sums.of[j][row + r]);
    for (int s = 0; s < steps; ++s, a += TILE, b += PAIR) {
      if (ask) ask_ahead(b);
      for (int k = 0; k < 16; ++k) {
        const __m512i b0 = _mm512_loadu_si512(b + k * 64), b1 = _mm512_loadu_si512(b + TILE + k * 64);
        more[0] = _mm512_dpbusd_epi32(more[0], offset, b0);
        more[1] = _mm512_dpbusd_epi32(more[1], offset, b1);
        for (int r = 0; r < rows; ++r) {
          int32_t v;
          memcpy(&v, a + r * 64 + k * 4, 4);
          sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], _mm512_set1_epi32(v), b0);
          sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], _mm512_set1_epi32(v), b1);
        }
      }
    }
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < 2; ++j) _mm512_store_si512(sums.of[j][row + r], _mm512_sub_epi32(sum[r][j], more[j]));
    return rows;
  }
};
#endif

#if defined(SPARSEC_AVX2)
// Products of bytes are added in pairs to 16 bits: 2 * 127 * 127 fits. The sign goes from the activations to the weights,
// for one factor must be unsigned here too.
struct Pairwise : InBlocks<Pairwise> {
  static constexpr int OFFSET = 0;

  static int some(int left, const char* a, const char* b, int steps, bool starts, bool ask, Counts& sums, int row) {
    if (left >= 2) return block<2>(a, b, steps, starts, ask, sums, row);
    return block<1>(a, b, steps, starts, ask, sums, row);
  }

  template <int rows>
  static int block(const char* a, const char* b, int steps, bool starts, bool ask, Counts& sums, int row) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum[rows][4];
    auto place = [&](int r, int c) { return (__m256i*)(sums.of[c / 2][row + r] + c % 2 * 8); };
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < 4; ++c) sum[r][c] = starts ? _mm256_setzero_si256() : _mm256_load_si256(place(r, c));
    for (int s = 0; s < steps; ++s, a += TILE, b += PAIR) {
      if (ask) ask_ahead(b);
      for (int k = 0; k < 16; ++k) {
        __m256i x[rows], size[rows];
        for (int r = 0; r < rows; ++r) {
          int32_t v;
          memcpy(&v, a + r * 64 + k * 4, 4);
          x[r] = _mm256_set1_epi32(v);
          size[r] = _mm256_abs_epi8(x[r]);
        }
        for (int c = 0; c < 4; ++c) {
          const __m256i w = _mm256_loadu_si256((const __m256i*)(b + c / 2 * TILE + k * 64 + c % 2 * 32));
          for (int r = 0; r < rows; ++r) {
            const __m256i pairs = _mm256_maddubs_epi16(size[r], _mm256_sign_epi8(w, x[r]));
            sum[r][c] = _mm256_add_epi32(sum[r][c], _mm256_madd_epi16(pairs, ones));
          }
        }
      }
    }
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < 4; ++c) _mm256_store_si256(place(r, c), sum[r][c]);
    return rows;
  }
};
#endif
