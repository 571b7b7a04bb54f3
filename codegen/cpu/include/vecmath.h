// Functions of sixteen f32 lanes, within two units in the last place; NaN in, NaN out, infinities as IEEE 754 has them.
// The polynomials are minimax fits, made for this file.
#pragma once

#include "vec.h"

SPARSEC_INLINE F32 polynomial(F32, float c) { return splat(c); }
template <typename... Rest>
SPARSEC_INLINE F32 polynomial(F32 x, float c, Rest... rest) {  // c + x (c1 + x (c2 + ...))
  return fma(polynomial(x, rest...), x, splat(c));
}

SPARSEC_INLINE F32 scale_by_power(F32 x, F32 n) {  // x 2^n for whole n within +-250, subnormal results included
#if defined(__AVX512F__)
  return (F32)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  I32 power = as_bits(n + 12582912.0f) - as_bits(splat(12582912.0f));
  I32 half = power >> 1;
  return x * as_float((half + 127) << 23) * as_float((power - half + 127) << 23);
#endif
}

SPARSEC_INLINE F32 nearest_whole(F32 x) {  // for |x| < 2^22
#if defined(__AVX512F__)
  return (F32)_mm512_roundscale_ps((__m512)x, 0);
#else
  return (x + 12582912.0f) - 12582912.0f;
#endif
}

SPARSEC_INLINE F32 exp(F32 x) {
  x = select(x < -105.0f, splat(-105.0f), select(x > 90.0f, splat(90.0f), x));
  F32 n = nearest_whole(x * 1.44269504f);
  F32 r = fma(n, splat(-0.693359375f), x);  // ln 2 in two parts, the first exact in 10 bits
  r = fma(n, splat(2.12194440e-4f), r);
  F32 q = polynomial(r, 0.49999994f, 0.166665196f, 0.0416684002f, 0.00836885162f, 0.00138143253f);
  return scale_by_power(fma(r * r, q, r) + 1.0f, n);
}
SPARSEC_INLINE F32 exp2(F32 x) {
  x = select(x < -151.0f, splat(-151.0f), select(x > 129.0f, splat(129.0f), x));
  F32 n = nearest_whole(x);
  F32 r = (x - n) * 0.693147181f;
  F32 q = polynomial(r, 0.49999994f, 0.166665196f, 0.0416684002f, 0.00836885162f, 0.00138143253f);
  return scale_by_power(fma(r * r, q, r) + 1.0f, n);
}
SPARSEC_INLINE F32 expm1(F32 x) {
  F32 q = polynomial(x, 0.5f, 0.166666672f, 0.0416666605f, 0.00833314192f, 0.00138893048f, 1.99735834e-4f,
                     2.47908174e-5f);
  return select(abs(x) < 0.5f, fma(x * x, q, x), exp(x) - 1.0f);
}

SPARSEC_INLINE F32 log_parts(F32 x, F32* power) {  // log of the part of x > 0 within sqrt(1/2) .. sqrt(2), and its power of 2
  I32 subnormal = x < 1.17549435e-38f;
  I32 bits = as_bits(select(subnormal, x * 8388608.0f, x)) - 0x3f3504f3;
  *power = to_float((bits >> 23) - (subnormal & 23));
  F32 f = as_float((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
  F32 q = polynomial(f, 0.333333135f, -0.250000089f, 0.200021341f, -0.166680068f, 0.142192245f, -0.124051362f,
                     0.118903242f, -0.116796523f, 0.067465961f);
  return fma(f * f, fma(f, q, splat(-0.5f)), f);
}
SPARSEC_INLINE F32 log_edges(F32 x, F32 y) {  // y where x is positive and finite
  y = select(x == INFINITY_F32, x, y);
  y = select(x == 0.0f, splat(-INFINITY_F32), y);
  return select((x < 0.0f) | is_nan(x), splat(NAN_F32), y);
}
SPARSEC_INLINE F32 log(F32 x) {
  F32 power, part = log_parts(x, &power);
  return log_edges(x, fma(power, splat(0.693359375f), fma(power, splat(-2.12194440e-4f), part)));
}
SPARSEC_INLINE F32 log2(F32 x) {
  F32 power, part = log_parts(x, &power);
  return log_edges(x, power + fma(part, splat(1.44269502f), part * 1.92596299e-8f));
}
SPARSEC_INLINE F32 log1p(F32 x) {
  F32 u = x + 1.0f;
  F32 lost = select(x < 1.0f, x - (u - 1.0f), 1.0f - (u - x));  // what the sum rounded off
  F32 y = log(u) + select(u > 0.0f, lost, splat(0.0f)) / u;
  return select((u == INFINITY_F32) | (u == 0.0f), log(u), select(x == 0.0f, x, y));
}

SPARSEC_INLINE F32 rsqrt(F32 x) { return 1.0f / sqrt(x); }
SPARSEC_INLINE F32 sigmoid(F32 x) { return 1.0f / (1.0f + exp(-x)); }
SPARSEC_INLINE F32 silu(F32 x) { return x / (1.0f + exp(-x)); }
SPARSEC_INLINE F32 tanh(F32 x) {
  F32 s = x * x, size = abs(x);
  F32 q = polynomial(s, -0.333333313f, 0.133332059f, -0.0539467633f, 0.0217007045f, -0.00817740057f, 0.00214296393f);
  F32 far = 1.0f - 2.0f / (exp(size + size) + 1.0f);
  far = as_float(as_bits(far) | (as_bits(x) & (int32_t)INT32_MIN));
  return select(size < 0.625f, fma(x * s, q, x), far);
}
SPARSEC_INLINE F32 erf(F32 x) {
  F32 s = x * x, size = abs(x);
  F32 near = polynomial(s, 0.128379166f, -0.376126379f, 0.112837821f, -0.0268654004f, 0.00522094546f, -8.48282943e-4f,
                        1.12569527e-4f, -9.64152878e-6f);
  size = select(size > 4.0f, splat(4.0f), size);
  F32 q = polynomial(size, 1.1286943f, 0.634969532f, 0.106530868f, -0.0240100697f, 0.00375747751f, -3.50592134e-4f,
                     1.39624481e-5f);
  F32 far = 1.0f - exp(-size * q);
  far = as_float(as_bits(far) | (as_bits(x) & (int32_t)INT32_MIN));
  return select(size < 1.0f, fma(x, near, x), far);
}
SPARSEC_INLINE F32 gelu(F32 x) { return 0.5f * x * (1.0f + erf(x * 0.707106781f)); }
SPARSEC_INLINE F32 gelu_tanh(F32 x) { return 0.5f * x * (1.0f + tanh(0.797884561f * (x + 0.044715f * x * x * x))); }
SPARSEC_INLINE F32 softplus(F32 x) {  // log(1 + exp(x)), without overflow
  return select(x > 0.0f, x, splat(0.0f)) + log1p(exp(-abs(x)));
}

typedef double F64 __attribute__((vector_size(128)));

SPARSEC_INLINE F32 pow(F32 x, F32 y) {  // by the logarithm and the exponential in f64, so that no digit is lost
  typedef int64_t L64 __attribute__((vector_size(128)));
  F32 power, size = abs(x);
  I32 usual = (size > 0.0f) & (size < INFINITY_F32);
  I32 subnormal = size < 1.17549435e-38f;
  I32 bits = as_bits(select(usual, select(subnormal, size * 8388608.0f, size), splat(1.0f))) - 0x3f3504f3;
  power = to_float((bits >> 23) - (subnormal & usual & 23));
  F64 m = __builtin_convertvector(as_float((bits & 0x007fffff) + 0x3f3504f3), F64);
  F64 t = (m - 1.0) / (m + 1.0), s = t * t;
  F64 series = 1.0 / 13 + s * (1.0 / 15);
  for (int i = 11; i > 0; i -= 2) series = 1.0 / i + s * series;
  F64 exponent = (2.8853900817779268 * t * series + __builtin_convertvector(power, F64)) * __builtin_convertvector(y, F64);
  exponent = exponent < -160.0 ? F64{} - 160.0 : exponent > 130.0 ? F64{} + 130.0 : exponent;
  F64 whole = (exponent + 6755399441055744.0) - 6755399441055744.0;
  F64 r = (exponent - whole) * 0.69314718055994531, e = F64{} + 1.0 / 40320;
  const double factorials[] = {5040, 720, 120, 24, 6, 2, 1, 1};
  for (double f : factorials) e = e * r + 1.0 / f;
  L64 scale = ((L64)(whole + 6755399441055744.0) - (L64)(F64{} + 6755399441055744.0) + 1023) << 52;
  F32 value = __builtin_convertvector(e * (F64)scale, F32);

  I32 integer = (trunc(y) == y), even = trunc(y * 0.5f) * 2.0f == y;
  F32 edge = select((size > 0.0f) == (y > 0.0f), splat(INFINITY_F32), splat(0.0f));  // of 0 and of infinity
  value = select(usual, value, edge);
  value = select((as_bits(x) < 0) & integer & ~even, -value, value);
  value = select((x < 0.0f) & (x > -INFINITY_F32) & ~integer, splat(NAN_F32), value);
  I32 endless = abs(y) == INFINITY_F32;
  value = select(endless, select((size > 1.0f) == (y > 0.0f), splat(INFINITY_F32), splat(0.0f)), value);
  value = select(endless & (size == 1.0f), splat(1.0f), value);
  value = select(is_nan(x) | is_nan(y), splat(NAN_F32), value);
  return select((y == 0.0f) | (x == 1.0f), splat(1.0f), value);
}

