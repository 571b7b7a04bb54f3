// What this processor can do at most: bytes read from memory and multiply-adds from registers, by number of threads.
//
//     roof THREADS BUFFER_BYTES    ->    one line: GB/s, then TFLOP/s, best of several passes
//
// Multiply-adds are those of the fastest unit that it was compiled for: AMX, AVX512-bf16, AVX512 or AVX2.

#include <immintrin.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

std::atomic<uint64_t> sink;  // keeps results alive

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Seconds from the moment that all threads are there until the last is done.
template <class Body>
double together(int threads, Body body) {
  std::atomic<int> waiting{threads};
  std::vector<double> start(threads), end(threads);
  auto run = [&](int thread) {
    waiting.fetch_sub(1);
    while (waiting.load() > 0) {
    }
    start[thread] = now();
    body(thread);
    end[thread] = now();
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
  run(0);
  for (auto& other : others) other.join();
  return *std::max_element(end.begin(), end.end()) - *std::min_element(start.begin(), start.end());
}

#if defined(__AVX512F__)
using Words = __m512i;
Words load(const char* from) { return _mm512_load_si512(from); }
#else
using Words = __m256i;
Words load(const char* from) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(from)); }
#endif

// The bytes of a range added up, 256 at a time; `ahead` is how far the software prefetch runs (0: none).
uint64_t read(const char* from, size_t bytes, size_t ahead) {
  Words sums[4] = {};
  for (size_t i = 0; i < bytes; i += 256) {
    if (ahead) {
      for (int line = 0; line < 4; ++line) _mm_prefetch(from + i + ahead + line * 64, _MM_HINT_T1);
    }
    for (size_t part = 0; part < 256 / sizeof(Words); ++part) sums[part % 4] += load(from + i + part * sizeof(Words));
  }
  Words sum = sums[0] + sums[1] + sums[2] + sums[3];
  return static_cast<uint64_t>(sum[0]);
}

double bandwidth(int threads, size_t bytes) {
  constexpr size_t huge = size_t{2} << 20;
  size_t each = bytes / threads / huge * huge;
  void* mapped = mmap(nullptr, each * threads + 2 * huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return 0;
  char* base = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(mapped) + huge - 1) & ~(huge - 1));
  madvise(base, each * threads, MADV_HUGEPAGE);
  together(threads, [&](int thread) { memset(base + each * thread, 1, each); });
  double best = 0;
  for (size_t ahead : {size_t{0}, size_t{4096}, size_t{8192}, size_t{16384}}) {
    for (int pass = 0; pass < 3; ++pass) {
      double seconds = together(threads, [&](int thread) { sink += read(base + each * thread, each, ahead); });
      best = std::max(best, each * threads / seconds);
    }
  }
  munmap(mapped, each * threads + 2 * huge);
  return best;
}

#if defined(__AVX512F__)
using Vec = __m512;
Vec splat(float value) { return _mm512_set1_ps(value); }
struct Fma {
  static constexpr double flops = 2 * 16;
  static Vec step(Vec sum, Vec factor) { return _mm512_fmadd_ps(factor, factor, sum); }
};
#else
using Vec = __m256;
Vec splat(float value) { return _mm256_set1_ps(value); }
struct Fma {
  static constexpr double flops = 2 * 8;
  static Vec step(Vec sum, Vec factor) { return _mm256_fmadd_ps(factor, factor, sum); }
};
#endif

#if defined(__AVX512BF16__)
struct Dot {
  static constexpr double flops = 2 * 32;
  static Vec step(Vec sum, Vec factor) { return _mm512_dpbf16_ps(sum, (__m512bh)factor, (__m512bh)factor); }
};
#endif

template <class Unit>
struct Vectors {
  static constexpr double flops = 12 * Unit::flops;
  static void run(int64_t turns) {
    Vec sums[12], factor = splat(1e-3f);
    for (auto& sum : sums) sum = splat(0);
    for (int64_t turn = 0; turn < turns; ++turn) {
#pragma GCC unroll 12
      for (int i = 0; i < 12; ++i) sums[i] = Unit::step(sums[i], factor);
      asm volatile("" : "+x"(factor));  // the product is not to be taken out of the loop
    }
    for (int i = 1; i < 12; ++i) sums[0] += sums[i];
    uint64_t bits;
    memcpy(&bits, &sums[0], sizeof bits);
    sink += bits;
  }
};

#if defined(__AMX_BF16__)
struct Tiles {
  static constexpr double flops = 4.0 * 2 * 16 * 16 * 32;
  static void run(int64_t turns) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t columns[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) config.columns[tile] = 64, config.rows[tile] = 16;
    asm volatile("ldtilecfg %0" ::"m"(config));
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t turn = 0; turn < turns; ++turn) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
  }
};
#endif

template <class Kernel>
double rate(int threads) {
  int64_t turns = 1000;
  while (together(threads, [&](int) { Kernel::run(turns); }) < 0.03) turns *= 2;
  double best = 0;
  for (int pass = 0; pass < 8; ++pass) {
    double seconds = together(threads, [&](int) { Kernel::run(turns); });
    best = std::max(best, threads * turns * Kernel::flops / seconds);
  }
  return best;
}

double peak(int threads) {
  double best = rate<Vectors<Fma>>(threads);
#if defined(__AVX512BF16__)
  best = std::max(best, rate<Vectors<Dot>>(threads));
#endif
#if defined(__AMX_BF16__)
  constexpr int permission = 0x1023, tile_data = 18;
  if (syscall(SYS_arch_prctl, permission, tile_data) == 0) best = std::max(best, rate<Tiles>(threads));
#endif
  return best;
}

}  // namespace

int main(int count, char** words) {
  if (count != 3) return 2;
  int threads = std::atoi(words[1]);
  size_t bytes = std::strtoull(words[2], nullptr, 10);
  if (threads < 1 || bytes < size_t(threads) << 22) return 2;
  std::printf("%.3f %.4f\n", bandwidth(threads, bytes) / 1e9, peak(threads) / 1e12);
}
