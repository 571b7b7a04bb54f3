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

constexpr int MOST_ROWS_SWEPT = 320;  // their sums wait in the second-level cache

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
      if constexpr (Gemm::SLICE > 0)
        if (rows > 2 * ROWS) {
          const auto each = [&](int row, const Sums& of, int r) { done(p, row, of, r); };
          if (QUANTISED)
            sliced<false, 0>(a, stride, panel, rows, steps, scales, each);
          else if (rows <= 12 * ROWS)
            sliced<true, 4>(a, stride, panel, rows, steps, scales, each);
          else
            sliced<false, 4>(a, stride, panel, rows, steps, scales, each);
          continue;
        }
      for (int first = 0; first < rows; first += 2 * ROWS) {
        const int some = least(2 * ROWS, rows - first);
        const char* at = a + first / ROWS * stride;
        if (first == 0 && !QUANTISED)
          block<true>(at, stride, panel, steps, some, sums);
        else
          block<false>(at, stride, panel, steps, some, sums);
        finish(first, some, scales, sums, [&](int row, const Sums& of, int r) { done(p, row, of, r); });
      }
    }
  }

  // Many rows by one panel, slice by slice of k: a slice of the panel is in the first-level cache for all rows, while
  // activations come from the second-level one, and the next slice from memory. Sums wait in between.
  // cold: whether the first rows ask for weights just ahead of them. lines: of the next slice that a step asks for.
  template <bool cold, int lines, class Done>
  static void sliced(const char* a, int64_t stride, const char* panel, int rows, int steps, const float* scales,
                     Done done) {
    alignas(64) Sums sums[MOST_ROWS_SWEPT / ROWS];
    const int slice = int(ceil_div(steps, ceil_div(steps, Gemm::SLICE)));
    for (int k = 0; k < steps; k += slice) {
      const int some_steps = least(slice, steps - k);
      const char *weights = panel + k * PAIR, *next = weights + some_steps * PAIR;
      for (int first = 0; first < rows; first += 2 * ROWS) {
        const int some = least(2 * ROWS, rows - first);
        const char* at = a + first / ROWS * stride + k * TILE;
        Sums* to = sums + first / ROWS;
        if (cold && first == 0)
          Gemm::template add<2, true, lines>(at, stride, weights, some_steps, k == 0, next, to);
        else if (some > ROWS)
          Gemm::template add<2, false, lines>(at, stride, weights, some_steps, k == 0, next, to);
        else
          Gemm::template add<1, false, lines>(at, stride, weights, some_steps, k == 0, next, to);
        if (k + some_steps == steps) finish(first, some, scales, to, done);
      }
    }
  }

  template <class Done>
  SPARSEC_INLINE void finish(int first, int rows, const float* scales, Sums* sums, Done done) {
    for (int r = 0; r < rows; ++r) {
      Sums& of = sums[r / ROWS];
      if constexpr (QUANTISED) scale_row(of, r % ROWS, scales);
      done(first + r, of, r % ROWS);
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
