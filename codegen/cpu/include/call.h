// How the runtime calls a kernel. `sparsec.runtime.native` mirrors this struct.
#pragma once
#include <stdint.h>

extern "C" {

struct Call {
  int64_t tokens;
  const void* const* in;  // operands in the op's order, null where one is left out; contiguous
  void* const* out;       // results in the op's order; contiguous
  void* scratch;          // sparsec_scratch(tokens, threads) bytes, on a 64-byte boundary
  int32_t threads;
  // The thread pool that PyTorch runs on (GOMP_parallel and GOMP_barrier); null: one thread.
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
  void (*barrier)(void);
};
}

#define SPARSEC_EXPORT extern "C" __attribute__((visibility("default")))
