// Activations as int8, one scale for a row of x and one for each 128 values of an activated row: scale = largest / 127.
//
// 16 rows of them are tiles of 64 k's, and behind the tiles their scales: 16 f32 for each group of k's.
#pragma once
#include "quantised.h"

// Weights of a format that is multiplied by int8 activations. Two steps of 64 k's are a group.
template <class Format>
struct ByInt8 {
  template <class Elem>
  using Held = int8_t;
  static constexpr int STEPS = Format::COUNT / 2;
  static constexpr bool grouped = Format::grouped;
};

constexpr int GROUP_STEPS = 2, GROUP = 128;

// Which rows are multiplied: they differ in how many scales they have.
enum class Rows { given, activated };

// Bytes of the scales behind `steps` steps of 16 rows.
template <class Held>
constexpr int64_t scale_bytes(Rows rows, int64_t steps) {
  if (sizeof(Held) > 1) return 0;
  return (rows == Rows::given ? 1 : ceil_div(steps, GROUP_STEPS)) * ROWS * int64_t(sizeof(float));
}

SPARSEC_INLINE F32 load_some(const float* at, int count) { return load_f32(at, count); }
SPARSEC_INLINE F32 load_some(const bf16* at, int count) { return load_bf16(at, count); }

SPARSEC_INLINE int32_t largest_of(I32 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)x);
#else
  int32_t largest = x[0];
  for (int i = 1; i < LANES; ++i) largest = most(largest, int32_t(x[i]));
  return largest;
#endif
}

// The low byte of each lane.
SPARSEC_INLINE void put_bytes(char* at, I32 x) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)at, _mm512_cvtepi32_epi8((__m512i)x));
#else
  store_i8(at, x);
#endif
}

// `steps` steps of one row of a tile, 0 beyond `count` values. Each is value * 127 / largest, rounded, plus `offset`.
// A row that is not finite, or too small for that quotient to be, is zeros.
//
// Returns: largest / 127; for a row that is not finite inf or NaN, which makes a NaN of every sum.
template <class Elem>
static float quantise_row(const Elem* row, int64_t count, int64_t steps, int offset, char* to) {
  const int64_t whole = count / LANES * LANES;
  const int rest = int(count - whole);
  I32 bits = {};  // of absolute values, which are in the order of the values, inf and NaN last
  for (int64_t i = 0; i < whole; i += LANES) bits = max(bits, as_bits(load(row + i)) & 0x7fffffff);
  if (rest) bits = max(bits, as_bits(load_some(row + whole, rest)) & 0x7fffffff);
  const int32_t most_bits = largest_of(bits);
  float largest;
  memcpy(&largest, &most_bits, 4);
  const float factor = 127.0f / largest;
  const bool usable = largest < INFINITY_F32 && factor < INFINITY_F32;
  if (!usable || whole + (rest ? LANES : 0) < steps * 64)
    for (int64_t s = usable ? count / 64 : 0; s < steps; ++s) memset(to + s * TILE, offset, 64);
  if (usable) {
    const F32 ones = splat(12582912.0f + float(offset));  // 1.5 * 2^23: a sum's last place is 1
    auto put = [&](int64_t i, F32 v) { put_bytes(to + i / 64 * TILE + i % 64, as_bits(v * factor + ones)); };
    for (int64_t i = 0; i < whole; i += LANES) put(i, load(row + i));
    if (rest) put(whole, load_some(row + whole, rest));
  }
  return largest / 127.0f;
}
