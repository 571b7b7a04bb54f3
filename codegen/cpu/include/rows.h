// What mixes the elements of a row: sums, extremes, softmax, top-k, gather and scatter. A row is an array on the stack,
// f32 or i32 (booleans as 0 and -1), with room for whole vectors; behind its last element may be anything.
//
// <O, N, I>: an axis of N elements, with O elements in the axes before it and I in those after.
#pragma once
#include "vecmath.h"

// Each multiplication and addition of a router rounds on its own, as PyTorch's do: equal scores stay equal.
#if defined(__clang__)
#define SPARSEC_UNFUSED
#define SPARSEC_UNFUSED_BODY _Pragma("clang fp contract(off)")
#else
#define SPARSEC_UNFUSED __attribute__((optimize("fp-contract=off")))
#define SPARSEC_UNFUSED_BODY
#endif

constexpr int in_vectors(int n) { return (n + LANES - 1) / LANES * LANES; }

typedef float F32x8 __attribute__((vector_size(32)));
typedef float F32x4 __attribute__((vector_size(16)));
typedef int32_t I32x8 __attribute__((vector_size(32)));
typedef int32_t I32x4 __attribute__((vector_size(16)));

SPARSEC_INLINE float sum_of(F32 x) {
  F32x8 a, b;
  memcpy(&a, &x, 32), memcpy(&b, (const char*)&x + 32, 32);
  a += b;
  F32x4 c, d;
  memcpy(&c, &a, 16), memcpy(&d, (const char*)&a + 16, 16);
  c += d;
  return (c[0] + c[2]) + (c[1] + c[3]);
}
SPARSEC_INLINE int32_t greatest_of(I32 x) {
  I32x8 a, b;
  memcpy(&a, &x, 32), memcpy(&b, (const char*)&x + 32, 32);
  a = a > b ? a : b;
  I32x4 c, d;
  memcpy(&c, &a, 16), memcpy(&d, (const char*)&a + 16, 16);
  c = c > d ? c : d;
  const int32_t e = c[0] > c[2] ? c[0] : c[2], f = c[1] > c[3] ? c[1] : c[3];
  return e > f ? e : f;
}
SPARSEC_INLINE int32_t least_of(I32 x) { return ~greatest_of(~x); }

SPARSEC_INLINE F32 load_row(const float* x) { return load_f32(x); }
SPARSEC_INLINE I32 load_row(const int32_t* x) { return load_i32(x); }
SPARSEC_INLINE void store_row(float* x, F32 v) { store_f32(x, v); }
SPARSEC_INLINE void store_row(int32_t* x, I32 v) { store_i32(x, v); }

template <int N>
SPARSEC_INLINE I32 inside(int i) {  // which lanes of the vector at i hold one of N elements
  return lane_numbers() < N - i;
}

// Calls line(to, x) for each line along an axis. `M` elements come out of each; lines that are not laid end to end in
// whole vectors are copied.
template <int O, int N, int I, int M, class To, class From, class Line>
SPARSEC_INLINE void each_line(To* to, const From* x, Line line) {
  if constexpr (O == 1 && I == 1) {
    line(to, x);
  } else {
    for (int o = 0; o < O; ++o)
      for (int i = 0; i < I; ++i) {
        alignas(64) From from[in_vectors(N)] = {};
        alignas(64) To made[in_vectors(M)] = {};
        for (int n = 0; n < N; ++n) from[n] = x[(o * N + n) * I + i];
        line(made, from);
        for (int m = 0; m < M; ++m) to[(o * M + m) * I + i] = made[m];
      }
  }
}

template <int N>
SPARSEC_INLINE float line_sum(const float* x) {
  F32 sum = {};
  for (int i = 0; i < N; i += LANES) sum += select(inside<N>(i), load_f32(x + i), splat(0.0f));
  return sum_of(sum);
}
template <int N>
SPARSEC_INLINE int32_t line_sum(const int32_t* x) {
  int32_t sum = 0;
  for (int i = 0; i < N; ++i) sum += x[i];
  return sum;
}
template <int O, int N, int I, class T>
SPARSEC_INLINE void sum(T* to, const T* x) {
  each_line<O, N, I, 1>(to, x, [](T* one, const T* line) { *one = line_sum<N>(line); });
}
template <int O, int N, int I>
SPARSEC_INLINE void mean(float* to, const float* x) {
  each_line<O, N, I, 1>(to, x, [](float* one, const float* line) { *one = line_sum<N>(line) / N; });
}
template <int O, int N, int I, class T>
SPARSEC_INLINE void product(T* to, const T* x) {
  each_line<O, N, I, 1>(to, x, [](T* one, const T* line) {
    T all = 1;
    for (int i = 0; i < N; ++i) all *= line[i];
    *one = all;
  });
}
template <int N>
SPARSEC_INLINE float line_max(const float* x) {
  F32 top = splat(-INFINITY_F32);
  for (int i = 0; i < N; i += LANES) top = max(select(inside<N>(i), load_f32(x + i), splat(-INFINITY_F32)), top);
  float most = top[0];
  for (int i = 1; i < LANES; ++i) most = top[i] > most || top[i] != top[i] ? top[i] : most;
  return most;
}

// Integers in the order of the elements; none is the least i32, which stands for what is not there.
SPARSEC_INLINE I32 rank_of(F32 x, bool greatest) { return max(order_key(x) ^ (greatest ? 0 : -1), splat(-INT32_MAX)); }
SPARSEC_INLINE I32 rank_of(I32 x, bool greatest) { return max(x ^ (greatest ? 0 : -1), splat(-INT32_MAX)); }

template <int N, bool GREATEST, class T>
SPARSEC_INLINE void line_ranks(int32_t* ranks, const T* x) {
  for (int i = 0; i < N; i += LANES)
    store_i32(ranks + i, select(inside<N>(i), rank_of(load_row(x + i), GREATEST), splat((int32_t)INT32_MIN)));
}
template <int N>
SPARSEC_INLINE int line_first_greatest(const int32_t* ranks) {  // of equals the first
  I32 top = load_i32(ranks);
  for (int i = LANES; i < N; i += LANES) top = max(top, load_i32(ranks + i));
  const int32_t best = greatest_of(top);
  I32 place = splat(N);
  for (int i = 0; i < N; i += LANES) place = min(place, select(load_i32(ranks + i) == best, lane_numbers() + i, splat(N)));
  return least_of(place);
}
// The greatest or least along an axis, NaN before all others, and where it is; of equals the first.
template <int O, int N, int I, bool GREATEST, class T>
SPARSEC_INLINE void place_of_extreme(int32_t* to, const T* x) {
  each_line<O, N, I, 1>(to, x, [](int32_t* one, const T* line) {
    alignas(64) int32_t ranks[in_vectors(N)];
    if constexpr (GREATEST) {
      line_ranks<N, true>(ranks, line);
    } else {
      line_ranks<N, false>(ranks, line);
      for (int i = 0; i < N; ++i) ranks[i] = line[i] != line[i] ? INT32_MAX : ranks[i];
    }
    *one = line_first_greatest<N>(ranks);
  });
}
template <int O, int N, int I, bool GREATEST, class T>
SPARSEC_INLINE void extreme(T* to, const T* x) {
  alignas(64) int32_t place[in_vectors(O * I)] = {};
  place_of_extreme<O, N, I, GREATEST>(place, x);
  for (int o = 0; o < O; ++o)
    for (int i = 0; i < I; ++i) to[o * I + i] = x[(o * N + place[o * I + i]) * I + i];
}
template <int O, int N, int I>
SPARSEC_INLINE void any(int32_t* to, const int32_t* x) {
  each_line<O, N, I, 1>(to, x, [](int32_t* one, const int32_t* line) {
    int32_t all = 0;
    for (int i = 0; i < N; ++i) all |= line[i];
    *one = all;
  });
}
template <int O, int N, int I>
SPARSEC_INLINE void all(int32_t* to, const int32_t* x) {
  each_line<O, N, I, 1>(to, x, [](int32_t* one, const int32_t* line) {
    int32_t every = -1;
    for (int i = 0; i < N; ++i) every &= line[i];
    *one = every;
  });
}

template <int O, int N, int I>
SPARSEC_INLINE void softmax(float* to, const float* x) {
  each_line<O, N, I, N>(to, x, [](float* made, const float* line) {
    const float top = line_max<N>(line);
    F32 total = {};
    for (int i = 0; i < N; i += LANES) {
      const F32 e = select(inside<N>(i), exp(load_f32(line + i) - top), splat(0.0f));
      store_f32(made + i, e);
      total += e;
    }
    const float all = sum_of(total);
    for (int i = 0; i < N; i += LANES) store_f32(made + i, load_f32(made + i) / all);
  });
}
template <int N>
SPARSEC_INLINE float line_logsumexp(const float* x) {
  const float top = line_max<N>(x), base = top == INFINITY_F32 || top == -INFINITY_F32 ? 0.0f : top;
  F32 total = {};
  for (int i = 0; i < N; i += LANES) total += select(inside<N>(i), exp(load_f32(x + i) - base), splat(0.0f));
  return log(splat(sum_of(total)))[0] + base;
}
template <int O, int N, int I>
SPARSEC_INLINE void logsumexp(float* to, const float* x) {
  each_line<O, N, I, 1>(to, x, [](float* one, const float* line) { *one = line_logsumexp<N>(line); });
}
template <int O, int N, int I>
SPARSEC_INLINE void log_softmax(float* to, const float* x) {
  each_line<O, N, I, N>(to, x, [](float* made, const float* line) {
    const float top = line_max<N>(line);
    F32 total = {};
    for (int i = 0; i < N; i += LANES) total += select(inside<N>(i), exp(load_f32(line + i) - top), splat(0.0f));
    const float rest = log(splat(sum_of(total)))[0];
    for (int i = 0; i < N; i += LANES) store_f32(made + i, load_f32(line + i) - top - rest);
  });
}
// Norms of order 1 and 2, and the one of order infinity.
template <int O, int N, int I, int ORDER>
SPARSEC_INLINE void norm(float* to, const float* x) {
  each_line<O, N, I, 1>(to, x, [](float* one, const float* line) {
    alignas(64) float sizes[in_vectors(N)];
    for (int i = 0; i < N; i += LANES) {
      const F32 v = load_f32(line + i);
      store_f32(sizes + i, ORDER == 2 ? v * v : abs(v));
    }
    if constexpr (ORDER == 0)
      *one = line_max<N>(sizes);
    else
      *one = ORDER == 2 ? sqrt(splat(line_sum<N>(sizes)))[0] : line_sum<N>(sizes);
  });
}
template <int N>
SPARSEC_INLINE float line_squares(const float* x, float mean) {  // sum of the squared distances from `mean`
  F32 total = {};
  for (int i = 0; i < N; i += LANES) {
    const F32 d = load_f32(x + i) - mean;
    total += select(inside<N>(i), d * d, splat(0.0f));
  }
  return sum_of(total);
}
template <int O, int N, int I>
SPARSEC_INLINE void variance(float* to, const float* x, float divisor) {
  each_line<O, N, I, 1>(to, x, [divisor](float* one, const float* line) {
    *one = line_squares<N>(line, line_sum<N>(line) / N) / divisor;
  });
}
template <int O, int N, int I>
SPARSEC_INLINE void layer_norm(float* to, const float* x, float eps) {
  each_line<O, N, I, N>(to, x, [eps](float* made, const float* line) {
    const float mean = line_sum<N>(line) / N;
    const float scale = 1.0f / sqrt(splat(line_squares<N>(line, mean) / N + eps))[0];
    for (int i = 0; i < N; i += LANES) store_f32(made + i, (load_f32(line + i) - mean) * scale);
  });
}
template <int O, int N, int I>
SPARSEC_INLINE void rms_norm(float* to, const float* x, float eps) {
  each_line<O, N, I, N>(to, x, [eps](float* made, const float* line) {
    const float scale = 1.0f / sqrt(splat(line_squares<N>(line, 0.0f) / N + eps))[0];
    for (int i = 0; i < N; i += LANES) store_f32(made + i, load_f32(line + i) * scale);
  });
}
// Running sums in f64, as PyTorch's own on a CPU.
SPARSEC_INLINE double running(float) { return 0.0; }
SPARSEC_INLINE int32_t running(int32_t) { return 0; }
template <int O, int N, int I, bool SUM, class T>
SPARSEC_INLINE void cumulate(T* to, const T* x) {
  each_line<O, N, I, N>(to, x, [](T* made, const T* line) {
    auto so_far = running(T()) + (SUM ? 0 : 1);
    for (int i = 0; i < N; ++i) {
      so_far = SUM ? so_far + line[i] : so_far * line[i];
      made[i] = (T)so_far;
    }
  });
}

// The K greatest or least in order, of equals the first ones first; NaN is the greatest.
template <int N, int K, bool GREATEST, class T>
SPARSEC_INLINE void line_top_k(int32_t* to, const T* x) {
  alignas(64) int32_t ranks[in_vectors(N)];
  line_ranks<N, GREATEST>(ranks, x);
  if constexpr (K <= 32) {
    for (int k = 0; k < K; ++k) {
      to[k] = line_first_greatest<N>(ranks);
      ranks[to[k]] = INT32_MIN;
    }
  } else {  // merge sort of rank and place in one number
    int64_t first[N], second[N], *from = first, *into = second;
    for (int i = 0; i < N; ++i) from[i] = ((int64_t)ranks[i] * ((int64_t)1 << 32)) - i;
    for (int width = 1; width < N; width *= 2) {
      for (int begin = 0; begin < N; begin += 2 * width) {
        const int middle = begin + width < N ? begin + width : N, end = begin + 2 * width < N ? begin + 2 * width : N;
        int a = begin, b = middle;
        for (int i = begin; i < end; ++i) {
          const bool left = b >= end || (a < middle && from[a] > from[b]);
          into[i] = left ? from[a] : from[b];
          a += left, b += !left;
        }
      }
      int64_t* const done = into;
      into = from, from = done;
    }
    for (int k = 0; k < K; ++k) to[k] = (int32_t)(0 - (uint32_t)from[k]);
  }
}
template <int O, int N, int I, int K, bool GREATEST, class T>
SPARSEC_INLINE void top_k(int32_t* to, const T* x) {
  each_line<O, N, I, K>(to, x, [](int32_t* places, const T* line) { line_top_k<N, K, GREATEST>(places, line); });
}

// to[o, m, i] = x[o, index[o, m, i], i]. A number out of range takes the nearest element.
template <int O, int N, int I, int M, class T>
SPARSEC_INLINE void gather(T* to, const T* x, const int32_t* index) {
  for (int o = 0; o < O; ++o)
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < I; ++i) {
        const int at = (o * M + m) * I + i, n = index[at] < 0 ? 0 : index[at] < N ? index[at] : N - 1;
        to[at] = x[(o * N + n) * I + i];
      }
}
SPARSEC_INLINE void put(float* to, float value, bool add) { *to = add ? *to + value : value; }
SPARSEC_INLINE void put(int32_t* to, int32_t value, bool add) { *to = add ? *to + value : value; }
// to[o, index[o, m, i], i] = values[o, m, i], in order; numbers out of range put nothing.
template <int O, int N, int I, int M, bool ADD, class T>
SPARSEC_INLINE void scatter(T* to, const int32_t* index, const T* values) {
  for (int o = 0; o < O; ++o)
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < I; ++i) {
        const int at = (o * M + m) * I + i;
        if (index[at] >= 0 && index[at] < N) put(to + (o * N + index[at]) * I + i, values[at], ADD);
      }
}
template <int V, int CLASSES>
SPARSEC_INLINE void one_hot(int32_t* to, const int32_t* index) {
  for (int v = 0; v < V; ++v)
    for (int c = 0; c < CLASSES; ++c) to[v * CLASSES + c] = index[v] == c;
}
// The place in a table of `size` numbers: from its end for a negative number, within it for any.
SPARSEC_INLINE int64_t place_in(int32_t index, int64_t size) {
  const int64_t at = index < 0 ? index + size : index;
  return at < 0 ? 0 : at < size ? at : size - 1;
}
