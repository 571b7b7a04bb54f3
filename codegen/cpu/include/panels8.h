// Rows of int8 activations times panels of int8 or int4.
#pragma once
#include "panels.h"

// Two int4 of each byte, less 8: first those of the first 64 k's of a group, then those of the last.
static void expand_panel8(const char* b, int packed, char* to) {
  typedef int8_t Bytes __attribute__((vector_size(64)));
  for (int s = 0; s < packed; ++s, b += PAIR, to += GROUP_STEPS * PAIR) {
    ask_ahead(b);
    for (int i = 0; i < PAIR; i += 64) {
      const U32 bits = load_bits(b + i);
      const Bytes first = (Bytes)(bits & 0x0f0f0f0f) - 8, last = (Bytes)((bits >> 4) & 0x0f0f0f0f) - 8;
      memcpy(to + i, &first, 64);
      memcpy(to + PAIR + i, &last, 64);
    }
  }
}

template <class Gemm, class Format, Rows kind>
struct Sweep<Gemm, ByInt8<Format>, kind> {
  typedef ByInt8<Format> Weights;

  // As of Sweep. row_scales: those of the first 16 rows. `done` gets sums that are multiplied by all scales.
  template <class Done>
  static void run(const char* a, int64_t stride, const char* row_scales, int rows, const Panels& panels, int steps,
                  char* expanded, Done done) {
    alignas(64) Sums sums[2];
    for (int64_t p = 0; p < panels.count; ++p) {
      const char* panel = panels.first + p * panels.bytes;
      const float* scales = panels.scales + p * panels.scales_each;
      if constexpr (Weights::STEPS > 1) {
        expand_panel8(panel, steps / Weights::STEPS, expanded);
        panel = expanded;
      }
      for (int first = 0; first < rows; first += 2 * ROWS) {
        const int some = least(2 * ROWS, rows - first);
        const char *at = a + first / ROWS * stride, *scales_at = row_scales + first / ROWS * stride;
        if (Weights::STEPS == 1 && first == 0)
          block<true>(at, stride, scales_at, panel, steps, some, scales, sums);
        else
          block<false>(at, stride, scales_at, panel, steps, some, scales, sums);
        for (int r = 0; r < some; ++r) done(p, first + r, sums[r / ROWS], r % ROWS);
      }
    }
  }

  template <bool cold>
  SPARSEC_INLINE void block(const char* a, int64_t stride, const char* row_scales, const char* panel, int steps, int rows,
                            const float* scales, Sums* sums) {
    if (rows > ROWS)
      scaled<2, cold>(a, stride, row_scales, panel, steps, rows, scales, sums);
    else
      scaled<1, cold>(a, stride, row_scales, panel, steps, rows, scales, sums);
  }

  // Each stretch of k that has scales of its own is summed in int32, all of them in f32.
  template <int tiles, bool cold>
  SPARSEC_INLINE void scaled(const char* a, int64_t stride, const char* row_scales, const char* panel, int steps,
                             int rows, const float* scales, Sums* sums) {
    constexpr bool parted = kind == Rows::activated || Weights::grouped;
    const int span = parted ? GROUP_STEPS : steps;
    Counts counts[2];
    for (int s = 0, group = 0; s < steps; s += span, ++group) {
      Gemm::template multiply<tiles, cold>(a + s * TILE, stride, panel + s * PAIR, least(span, steps - s), rows, counts);
      const float* of_columns = scales + (Weights::grouped ? group * 2 * LANES : 0);
      const char* of_rows = row_scales + (kind == Rows::activated ? group * ROWS * 4 : 0);
      const F32 column[2] = {load(of_columns), load(of_columns + LANES)};
      for (int r = 0; r < rows; ++r) {
        const float row = ((const float*)(of_rows + r / ROWS * stride))[r % ROWS];
        for (int j = 0; j < 2; ++j) {
          float* to = sums[r / ROWS].of[j][r % ROWS];
          const F32 count = to_float(load_i32(counts[r / ROWS].of[j][r % ROWS]));
          store(to, s == 0 ? count * (column[j] * row) : fma(count, column[j] * row, load(to)));
        }
      }
    }
  }
};
