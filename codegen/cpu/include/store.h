// Elements of the two types that banks may have, to and from f32 vectors.
#pragma once
#include "vec.h"

struct bf16 {
  uint16_t bits;
};

SPARSEC_INLINE float float_of(float value) { return value; }
SPARSEC_INLINE float float_of(bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  memcpy(&wide, &bits, 4);
  return wide;
}

SPARSEC_INLINE F32 load(const float* at) { return load_f32(at); }
SPARSEC_INLINE F32 load(const bf16* at) { return load_bf16(at); }

SPARSEC_INLINE void store(float* at, F32 v, int count = LANES) { store_f32(at, v, count); }
SPARSEC_INLINE void store(bf16* at, F32 v, int count = LANES) {
#if defined(__AVX512BF16__)
  store_lanes(at, (U16)_mm512_cvtneps_pbh((__m512)v), count);
#else
  store_bf16(at, v, count);
#endif
}

// 32 lanes, a whole cache line of bf16, past the cache: nobody reads it soon.
SPARSEC_INLINE void stream(float* at, F32 low, F32 high) {
  store(at, low);
  store(at + LANES, high);
}
SPARSEC_INLINE void stream(bf16* at, F32 low, F32 high) {
#if defined(__AVX512BF16__)
  _mm512_stream_si512((__m512i*)at, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#else
  store(at, low);
  store(at + LANES, high);
#endif
}

// What was streamed can be read by other cores after this, and a barrier.
SPARSEC_INLINE void publish() {
#if defined(__AVX512BF16__)
  _mm_sfence();
#endif
}

// scale * row, each product rounded to the row's type, into `steps` tiles: 64 bytes of each, `stride` bytes apart. Zeros
// follow the row.
template <class Elem>
static void scale_into(const Elem* row, float scale, int64_t count, int64_t steps, char* to, int64_t stride) {
  constexpr int64_t S = 64 / sizeof(Elem);
  for (int64_t s = 0; s < steps; ++s) {
    Elem part[S] = {};
    const int64_t left = count - s * S < S ? count - s * S : S;
    if (left > 0) memcpy(part, row + s * S, sizeof(Elem) * left);
    for (int64_t i = 0; i < S; i += LANES) store((Elem*)(to + s * stride) + i, scale * load(part + i));
  }
}
