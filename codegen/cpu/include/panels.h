// Rows of activations times panels of weights, whatever the weights are stored as.
#pragma once
#include "activations8.h"
#include "few.h"
#include "gemm.h"

// Some panels of one expert's bank, one after the other, and their scales if they have any.
struct Panels {
  const char* first;
  int64_t bytes;  // from one to the next
  int64_t count;
  const float* scales;
  int64_t scales_each;  // floats from one panel's scales to the next's
};

template <class Gemm, class Weights, Rows>
struct Sweep {
  static constexpr bool QUANTISED = Weights::STEPS > 1;

  // Multiply rows in tiles by panels, and hand the sums of each row to `done(panel, row, sums, r)`: they are those of
  // row r in their tile.
  //
  // stride: bytes from one 16 rows to the next. steps: of the activations. expanded: room for a panel of bf16.
  // Rows have no scales here: those of int8 do (panels8.h).
  template <class Done>
  static void run(const char* a, int64_t stride, const char* /* row_scales */, int rows, const Panels& panels, int steps, char* expanded,
                  Done done) {
    alignas(64) Sums sums[2];
#if defined(__AVX512VNNI__)
    if constexpr (QUANTISED)
      if (rows <= FewRows::MOST) {
        const FewRows few(a, rows, steps, Weights::STEPS, expanded);
        for (int64_t p = 0; p < panels.count; ++p) {
          const float* scales = panels.scales + p * panels.scales_each;
          few.template multiply_all<Weights>(rows, panels.first + p * panels.bytes, scales, few.groups, sums[0]);
          for (int row = 0; row < rows; ++row) done(p, row, sums[0], row);
        }
        return;
      }
#endif
    for (int64_t p = 0; p < panels.count; ++p) {
      const char* panel = panels.first + p * panels.bytes;
      const float* scales = panels.scales + p * panels.scales_each;
      if constexpr (QUANTISED) {
        expand_panel<Weights>(panel, scales, steps / Weights::STEPS, expanded);
        panel = expanded;
      }
      for (int first = 0; first < rows; first += 2 * ROWS) {
        const int some = least(2 * ROWS, rows - first);
        const char* at = a + first / ROWS * stride;
        if (first == 0 && !QUANTISED)
          block<true>(at, stride, panel, steps, some, sums);
        else
          block<false>(at, stride, panel, steps, some, sums);
        for (int r = 0; r < some; ++r) {
          Sums& of = sums[r / ROWS];
          if constexpr (QUANTISED) scale_row(of, r % ROWS, scales);
          done(p, first + r, of, r % ROWS);
        }
      }
    }
  }

  template <bool cold>
  SPARSEC_INLINE void block(const char* a, int64_t stride, const char* panel, int steps, int rows, Sums* sums) {
    if (rows > ROWS)
      Gemm::template multiply<2, cold>(a, stride, panel, steps, rows, sums);
    else
      Gemm::template multiply<1, cold>(a, stride, panel, steps, rows, sums);
  }

  // Scales that an expanded panel does not hold already.
  SPARSEC_INLINE void scale_row(Sums& sums, int r, const float* scales) {
    if (Weights::grouped) return;
    for (int j = 0; j < 2; ++j) store(sums.of[j][r], load(sums.of[j][r]) * load(scales + j * LANES));
  }
};
