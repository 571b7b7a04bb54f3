// Quantised weights, to be multiplied by bf16 activations: int8 with a scale for each column, int4 with one for each 128
// values of a column. Both become bf16 without rounding; what is multiplied by the scale is a sum.
//
// A packed step is 2 KB: two tiles of 16 rows of 64 bytes, as of `moe.pack`. A row expands to COUNT rows of bf16 tiles.
#pragma once
#include "tile.h"

struct Unquantised {
  template <class Elem>
  using Held = Elem;  // what rows are multiplied as
  static constexpr int STEPS = 1;  // steps of the activations that a packed step covers
  static constexpr bool grouped = false;
};

struct Int8 {
  template <class Elem>
  using Held = Elem;
  static constexpr int STEPS = 2, COUNT = 2;
  static constexpr bool grouped = false;  // one scale for each column

#if defined(__AVX512F__)
  // The values of 64 k's, OFFSET added, as unsigned bytes.
  static constexpr int OFFSET = 128;
  SPARSEC_INLINE void bytes(__m512i x, __m512i* w) { w[0] = _mm512_xor_si512(x, _mm512_set1_epi8(int8_t(0x80))); }
#endif

  SPARSEC_INLINE void expand(U32 x, U32* rows) {
    const I32 v = (I32)x;
    const U32 a = (U32)to_float((v << 24) >> 24), b = (U32)to_float((v << 16) >> 24);
    const U32 c = (U32)to_float((v << 8) >> 24), d = (U32)to_float(v >> 24);
    rows[0] = (a >> 16) | b;  // the low halves of these floats are zeros
    rows[1] = (c >> 16) | d;
  }
};

struct Int4 {
  template <class Elem>
  using Held = Elem;
  static constexpr int STEPS = 4, COUNT = 4;
  static constexpr bool grouped = true;  // one scale for each packed step

#if defined(__AVX512F__)
  static constexpr int OFFSET = 8;
  SPARSEC_INLINE void bytes(__m512i x, __m512i* w) {
    const __m512i low = _mm512_set1_epi8(15);
    w[0] = _mm512_and_si512(x, low);
    w[1] = _mm512_and_si512(_mm512_srli_epi16(x, 4), low);
  }
#endif

  SPARSEC_INLINE void expand(U32 x, U32* rows) {
    half(x, rows);
    half(x >> 4, rows + 2);
  }

  // The low four bits of each byte, less 8.
  SPARSEC_INLINE void half(U32 x, U32* rows) {
#if defined(__AVX512BW__)
    alignas(64) static const uint16_t bf16_of[32] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                                     0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    const __m512i table = _mm512_load_si512(bf16_of), mask = _mm512_set1_epi16(15), bits = (__m512i)x;
    const U32 even = (U32)_mm512_permutexvar_epi16(_mm512_and_si512(bits, mask), table);
    const U32 odd = (U32)_mm512_permutexvar_epi16(_mm512_and_si512(_mm512_srli_epi16(bits, 8), mask), table);
#else
    U32 even = {}, odd = {};
    for (int i = 0; i < 2; ++i) {
      even |= ((U32)to_float((I32)((x >> (16 * i)) & 15) - 8) >> 16) << (16 * i);
      odd |= ((U32)to_float((I32)((x >> (16 * i + 8)) & 15) - 8) >> 16) << (16 * i);
    }
#endif
    rows[0] = (even & 0xffff) | (odd << 16);
    rows[1] = (even >> 16) | (odd & 0xffff0000u);
  }
};

// Where the rows that row r of a packed step expands to lie in the bf16 tiles of that step.
template <class Weights>
constexpr int step_of(int r, int i) {
  return r / 8 + i / 2 * 2;
}
constexpr int row_of(int r, int i) { return r % 8 * 2 + i % 2; }

SPARSEC_INLINE U32 load_bits(const char* at) {
  U32 x;
  memcpy(&x, at, sizeof x);
  return x;
}

// A panel of `packed` steps as bf16; grouped scales are multiplied into the values, which rounds them.
template <class Weights>
static void expand_panel(const char* b, const float* scales, int packed, char* to) {
  for (int s = 0; s < packed; ++s, b += PAIR, to += Weights::STEPS * PAIR) {
    ask_ahead(b);
    for (int j = 0; j < 2; ++j) {
      const F32 scale = Weights::grouped ? load(scales + (s * 2 + j) * LANES) : splat(1.0f);
      for (int r = 0; r < ROWS; ++r) {
        U32 rows[Weights::COUNT];
        Weights::expand(load_bits(b + j * TILE + r * 64), rows);
        for (int i = 0; i < Weights::COUNT; ++i) {
          char* at = to + step_of<Weights>(r, i) * PAIR + j * TILE + row_of(r, i) * 64;
          if (Weights::grouped)
            rows[i] = ((U32)round_bf16((F32)(rows[i] << 16) * scale) >> 16) |
                      (U32)round_bf16((F32)(rows[i] & 0xffff0000u) * scale);
          memcpy(at, &rows[i], 64);
        }
      }
    }
  }
}
