// A few rows by quantised weights from memory: what decoding does, and all it does is wait for memory if nothing else
// takes long. So weights are multiplied as they are, unsigned bytes, by integers.
//
// Activations become 15-bit integers, 128 * high + low, with a scale for each row: finer than bf16 is for all but values
// that are small beside the row's largest. Each weight byte meets both halves; what was added to make it unsigned is
// taken off as that many times the sum of the row's integers. All sums are exact until they become f32.
#pragma once
#include "quantised.h"

#if defined(__AVX512VNNI__)
struct FewRows {
  static constexpr int MOST = 8;
  static constexpr int AHEAD = 3072;  // bytes: this loop takes less time for a line than AMX does

  int64_t k, groups;  // values of a row; packed steps
  int8_t* bytes;      // [rows][2][k]: high in -128..127, low in 0..127
  int32_t* sums;      // [rows][2][groups], of the bytes
  float scale[MOST];

  const int8_t* high(int row) const { return bytes + row * 2 * k; }
  const int8_t* low(int row) const { return bytes + (row * 2 + 1) * k; }

  // From tiles of bf16, in packed steps of `each`. room: at least 4 * k bytes for each row.
  FewRows(const char* a, int rows, int steps, int each, char* room)
      : k(steps * 32), groups(steps / each), bytes((int8_t*)room), sums((int32_t*)(room + rows * 2 * k)) {
    memset(sums, 0, rows * 2 * groups * 4);
    for (int row = 0; row < rows; ++row, a += 64) {
      F32 largest = {};
      for (int s = 0; s < steps; ++s)
        for (int i = 0; i < 2; ++i) largest = max(largest, abs(load((const bf16*)(a + s * TILE) + i * LANES)));
      float most = 0;
      for (int i = 0; i < LANES; ++i) most = largest[i] > most || largest[i] != largest[i] ? largest[i] : most;
      scale[row] = most / 16383;
      const float up = most > 0 ? 16383 / most : 0;
      for (int s = 0; s < steps; ++s)
        for (int i = 0; i < 2; ++i) {
          const I32 v = to_int(round_even(load((const bf16*)(a + s * TILE) + i * LANES) * up));
          const int64_t at = row * 2 * k + s * 32 + i * LANES;
          store_i8(bytes + at, v >> 7);
          store_i8(bytes + at + k, v & 127);
          int32_t* sum = sums + row * 2 * groups + s / each;
          sum[0] += _mm512_reduce_add_epi32((__m512i)(v >> 7));
          sum[groups] += _mm512_reduce_add_epi32((__m512i)(v & 127));
        }
    }
  }

  template <int rows, class Weights>
  void multiply(int first, const char* b, const float* scales, int packed, Sums& to) const {
    __m512 total[rows][2] = {};
    __m512i high_sum[rows][2] = {}, low_sum[rows][2] = {};
    int32_t high_off[rows] = {}, low_off[rows] = {};  // what made the weights unsigned, times the row
    constexpr int K = Weights::STEPS * 32;  // of a packed step
    for (int s = 0; s < packed; ++s, b += PAIR) {
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < 2; ++j) {
          __builtin_prefetch(b + j * TILE + r * 64 + AHEAD, 0, 2);
          __m512i w[Weights::COUNT / 2];
          Weights::bytes(_mm512_loadu_si512(b + j * TILE + r * 64), w);
          for (int i = 0; i < Weights::COUNT / 2; ++i)
            for (int m = 0; m < rows; ++m) {
              const int64_t at = s * K + i * 64 + r * 4;
              high_sum[m][j] = _mm512_dpbusd_epi32(high_sum[m][j], w[i], quad(high(first + m) + at));
              low_sum[m][j] = _mm512_dpbusd_epi32(low_sum[m][j], w[i], quad(low(first + m) + at));
            }
        }
      for (int m = 0; m < rows; ++m) {
        const int32_t* sum = sums + (first + m) * 2 * groups + s;
        high_off[m] += Weights::OFFSET * sum[0], low_off[m] += Weights::OFFSET * sum[groups];
      }
      if (!Weights::grouped && s + 1 < packed) continue;
      for (int m = 0; m < rows; ++m) {
        for (int j = 0; j < 2; ++j) {
          const __m512 h = _mm512_cvtepi32_ps(_mm512_sub_epi32(high_sum[m][j], _mm512_set1_epi32(high_off[m])));
          const __m512 l = _mm512_cvtepi32_ps(_mm512_sub_epi32(low_sum[m][j], _mm512_set1_epi32(low_off[m])));
          const __m512 sum = _mm512_fmadd_ps(h, _mm512_set1_ps(128), l);
          const float* by = scales + (Weights::grouped ? (s * 2 + j) * LANES : j * LANES);
          total[m][j] = _mm512_fmadd_ps(sum, _mm512_loadu_ps(by), total[m][j]);
          high_sum[m][j] = low_sum[m][j] = _mm512_setzero_si512();
        }
        high_off[m] = low_off[m] = 0;
      }
    }
    for (int m = 0; m < rows; ++m)
      for (int j = 0; j < 2; ++j)
        _mm512_store_ps(to.of[j][first + m], _mm512_mul_ps(total[m][j], _mm512_set1_ps(scale[first + m])));
  }

  // sums = rows * a panel, all scales multiplied in.
  template <class Weights>
  void multiply_all(int rows, const char* b, const float* scales, int packed, Sums& to) const {
    int row = 0;
    for (; rows - row >= 4; row += 4) multiply<4, Weights>(row, b, scales, packed, to);
    if (rows - row >= 2) multiply<2, Weights>(row, b, scales, packed, to), row += 2;
    if (rows - row >= 1) multiply<1, Weights>(row, b, scales, packed, to);
  }

  static __m512i quad(const int8_t* at) {
    int32_t four;
    memcpy(&four, at, 4);
    return _mm512_set1_epi32(four);
  }
};
#endif
