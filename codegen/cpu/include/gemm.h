// Who multiplies tiles on this instruction set.
#pragma once
#include "gemm_int8.h"
#include "tile.h"
#if defined(SPARSEC_AMX)
#include "gemm_amx.h"
#include "gemm_avx512.h"
template <class Elem>
struct GemmOf {
  typedef Avx512<Elem> type;
};
template <>
struct GemmOf<bf16> {
  typedef AmxBf16 type;
};
template <>
struct GemmOf<int8_t> {
  typedef AmxInt8 type;
};
#elif defined(SPARSEC_AVX512)
#include "gemm_avx512.h"
template <class Elem>
struct GemmOf {
  typedef Avx512<Elem> type;
};
template <>
struct GemmOf<int8_t> {
  typedef Vnni type;
};
#else
#include "gemm_avx2.h"
template <class Elem>
struct GemmOf {
  typedef Avx2<Elem> type;
};
template <>
struct GemmOf<int8_t> {
  typedef Pairwise type;
};
#endif
