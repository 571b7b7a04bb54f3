// Sixteen f32 (or i32) lanes as one value, by the vector extensions that g++ and clang share: a processor with shorter
// registers holds them in several. A comparison gives a mask, I32 lanes of 0 or -1. Pointers need no alignment.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors wider than the target's are passed by inlining alone
#endif

#define SPARSEC_INLINE static inline __attribute__((always_inline, unused))

typedef float F32 __attribute__((vector_size(64)));
typedef int32_t I32 __attribute__((vector_size(64)));
typedef uint32_t U32 __attribute__((vector_size(64)));

constexpr int LANES = 16;
constexpr float INFINITY_F32 = __builtin_inff();
constexpr float NAN_F32 = __builtin_nanf("");

SPARSEC_INLINE F32 splat(float x) { return F32{} + x; }
SPARSEC_INLINE I32 splat(int32_t x) { return I32{} + x; }
SPARSEC_INLINE I32 lane_numbers() { return I32{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

SPARSEC_INLINE F32 as_float(I32 x) { return (F32)x; }  // the same bits
SPARSEC_INLINE I32 as_bits(F32 x) { return (I32)x; }
SPARSEC_INLINE F32 to_float(I32 x) { return __builtin_convertvector(x, F32); }
SPARSEC_INLINE I32 to_int(F32 x) {  // towards zero; what no i32 holds becomes the least i32, as on x86
  I32 fits = (x > -2147483904.0f) & (x < 2147483648.0f);
  I32 whole = __builtin_convertvector(fits ? x : splat(0.0f), I32);
  return fits ? whole : splat((int32_t)INT32_MIN);
}

SPARSEC_INLINE F32 select(I32 mask, F32 a, F32 b) { return mask ? a : b; }
SPARSEC_INLINE I32 select(I32 mask, I32 a, I32 b) { return mask ? a : b; }

SPARSEC_INLINE F32 abs(F32 x) { return as_float(as_bits(x) & 0x7fffffff); }
SPARSEC_INLINE I32 abs(I32 x) { return select(x < 0, (I32)(0u - (U32)x), x); }
SPARSEC_INLINE I32 is_nan(F32 x) { return x != x; }

// A NaN on either side is the result, as torch has it.
SPARSEC_INLINE F32 max(F32 a, F32 b) { return select((a > b) | is_nan(a), a, b); }
SPARSEC_INLINE F32 min(F32 a, F32 b) { return select((a < b) | is_nan(a), a, b); }
SPARSEC_INLINE I32 max(I32 a, I32 b) { return select(a > b, a, b); }
SPARSEC_INLINE I32 min(I32 a, I32 b) { return select(a < b, a, b); }

SPARSEC_INLINE F32 fma(F32 a, F32 b, F32 c) {  // a * b + c, rounded once where the processor can
#if defined(__AVX512F__)
  return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  union Halves { F32 whole; __m256 half[2]; } x = {a}, y = {b}, z = {c};
  x.half[0] = _mm256_fmadd_ps(x.half[0], y.half[0], z.half[0]);
  x.half[1] = _mm256_fmadd_ps(x.half[1], y.half[1], z.half[1]);
  return x.whole;
#else
  return a * b + c;
#endif
}

SPARSEC_INLINE F32 sqrt(F32 x) {
#if defined(__AVX512F__)
  return (F32)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX__)
  union Halves { F32 whole; __m256 half[2]; } y = {x};
  y.half[0] = _mm256_sqrt_ps(y.half[0]);
  y.half[1] = _mm256_sqrt_ps(y.half[1]);
  return y.whole;
#else
  F32 y = x;
  for (int i = 0; i < LANES; ++i) y[i] = __builtin_sqrtf(x[i]);
  return y;
#endif
}

SPARSEC_INLINE F32 round_even(F32 x) {  // to the nearest whole number, of two the even one
  F32 magic = as_float((as_bits(x) & (int32_t)INT32_MIN) | as_bits(splat(8388608.0f)));
  F32 whole = (x + magic) - magic;
  return select(abs(x) < 8388608.0f, as_float(as_bits(whole) | (as_bits(x) & (int32_t)INT32_MIN)), x);
}
SPARSEC_INLINE F32 floor(F32 x) {
  F32 whole = round_even(x);
  return select(whole > x, whole - 1.0f, whole);
}
SPARSEC_INLINE F32 ceil(F32 x) { return -floor(-x); }
SPARSEC_INLINE F32 trunc(F32 x) { return select(x < 0.0f, ceil(x), floor(x)); }

// Quotient and remainder of integers, rounded down. Lanes that divide by 0 give 0: padded lanes may hold anything.
SPARSEC_INLINE I32 floor_divide(I32 x, I32 y) {
  I32 divisor = select((y == 0) | (y == -1), splat(1), y);
  I32 quotient = x / divisor;
  I32 remainder = x - quotient * divisor;
  quotient += (remainder != 0) & ((remainder ^ divisor) < 0);
  return select(y == -1, (I32)(0u - (U32)x), select(y == 0, splat(0), quotient));
}
SPARSEC_INLINE I32 modulo(I32 x, I32 y) { return (I32)((U32)x - (U32)floor_divide(x, y) * (U32)y); }

// Integers in the order of the floats: -inf first, inf then NaN last, -0 and 0 alike.
SPARSEC_INLINE I32 order_key(F32 x) {
  I32 bits = as_bits(select(x == 0.0f, splat(0.0f), x));
  return select(is_nan(x), splat((int32_t)INT32_MAX), bits ^ ((bits >> 31) & 0x7fffffff));
}

// f32 rounded to the values of a narrower type, ties to even; NaN stays NaN.
SPARSEC_INLINE F32 round_bf16(F32 x) {
  U32 bits = (U32)x;
  U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  return select(is_nan(x), splat(NAN_F32), (F32)rounded);
}
SPARSEC_INLINE F32 round_f16(F32 x) {
  U32 bits = (U32)x, sign = bits & 0x80000000u;
  F32 normal = (F32)((bits + 0xfff + ((bits >> 13) & 1)) & 0xffffe000u);
  F32 tiny = (F32)((U32)((abs(x) + 0.5f) - 0.5f) | sign);  // 2^-24 is the last place of 0.5
  F32 infinite = (F32)(sign | 0x7f800000u);
  F32 y = select(abs(x) < 6.103515625e-05f, tiny, normal);
  y = select(abs(y) > 65504.0f, infinite, y);
  return select(is_nan(x), splat(NAN_F32), y);
}

// Rows of 16 in memory. With a count the lanes from there on are neither read (they come as 0) nor written.
typedef uint16_t U16 __attribute__((vector_size(32)));
typedef int64_t I64 __attribute__((vector_size(128)));
typedef int16_t I16 __attribute__((vector_size(32)));
typedef int8_t I8 __attribute__((vector_size(16)));
typedef uint8_t U8 __attribute__((vector_size(16)));

template <typename Memory>
SPARSEC_INLINE Memory load_lanes(const void* p, int count) {
  Memory x = {};
  if (count >= LANES)
    memcpy(&x, p, sizeof(Memory));
  else
    memcpy(&x, p, (size_t)count * (sizeof(Memory) / LANES));
  return x;
}
template <typename Memory>
SPARSEC_INLINE void store_lanes(void* p, Memory x, int count) {
  if (count >= LANES)
    memcpy(p, &x, sizeof(Memory));
  else
    memcpy(p, &x, (size_t)count * (sizeof(Memory) / LANES));
}

SPARSEC_INLINE F32 load_f32(const void* p, int count = LANES) { return load_lanes<F32>(p, count); }
SPARSEC_INLINE F32 load_bf16(const void* p, int count = LANES) {
  return (F32)(__builtin_convertvector(load_lanes<U16>(p, count), U32) << 16);
}
SPARSEC_INLINE F32 load_f16(const void* p, int count = LANES) {
  U32 bits = __builtin_convertvector(load_lanes<U16>(p, count), U32);
  U32 rest = (bits & 0x7fff) << 13;
  F32 scaled = (F32)rest * 0x1p112f;
  F32 special = (F32)(rest | 0x7f800000u);
  F32 size = select((I32)(rest >= 0x0f800000u), special, scaled);
  return (F32)((U32)size | ((bits & 0x8000) << 16));
}
SPARSEC_INLINE I32 load_i32(const void* p, int count = LANES) { return load_lanes<I32>(p, count); }
SPARSEC_INLINE I32 load_i64(const void* p, int count = LANES) {
  return __builtin_convertvector(load_lanes<I64>(p, count), I32);
}
SPARSEC_INLINE I32 load_i16(const void* p, int count = LANES) {
  return __builtin_convertvector(load_lanes<I16>(p, count), I32);
}
SPARSEC_INLINE I32 load_i8(const void* p, int count = LANES) {
  return __builtin_convertvector(load_lanes<I8>(p, count), I32);
}
SPARSEC_INLINE I32 load_ui8(const void* p, int count = LANES) {
  return __builtin_convertvector(load_lanes<U8>(p, count), I32);
}
SPARSEC_INLINE I32 load_i1(const void* p, int count = LANES) { return load_ui8(p, count) != 0; }

SPARSEC_INLINE void store_f32(void* p, F32 x, int count = LANES) { store_lanes(p, x, count); }
SPARSEC_INLINE void store_bf16(void* p, F32 x, int count = LANES) {
  store_lanes(p, __builtin_convertvector((U32)round_bf16(x) >> 16, U16), count);
}
SPARSEC_INLINE void store_f16(void* p, F32 x, int count = LANES) {
  F32 y = round_f16(x);
  U32 size = (U32)(abs(y) * 0x1p-112f) >> 13;
  size = (U32)select(abs(y) < INFINITY_F32, (I32)size, select(is_nan(y), splat(0x7e00), splat(0x7c00)));
  store_lanes(p, __builtin_convertvector(size | (((U32)y >> 16) & 0x8000), U16), count);
}
SPARSEC_INLINE void store_i32(void* p, I32 x, int count = LANES) { store_lanes(p, x, count); }
SPARSEC_INLINE void store_i64(void* p, I32 x, int count = LANES) {
  store_lanes(p, __builtin_convertvector(x, I64), count);
}
SPARSEC_INLINE void store_i16(void* p, I32 x, int count = LANES) {
  store_lanes(p, __builtin_convertvector(x, I16), count);
}
SPARSEC_INLINE void store_i8(void* p, I32 x, int count = LANES) {
  store_lanes(p, __builtin_convertvector(x, I8), count);
}
SPARSEC_INLINE void store_ui8(void* p, I32 x, int count = LANES) {
  store_lanes(p, __builtin_convertvector(x, U8), count);
}
SPARSEC_INLINE void store_i1(void* p, I32 x, int count = LANES) { store_ui8(p, x & 1, count); }

