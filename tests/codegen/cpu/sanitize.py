"""Runs the C++ of a kernel as a program of its own under gcc's or clang's sanitizers.

    y, ids = sanitize.run(source, "avx2", tokens=5, ins=[x, None, w], outs=[((5, 64), torch.float32), ...], threads=3)

Operands and results lie in blocks of exactly their size and scratch memory in one of what the kernel asks for, so that
a read or write beyond any of them is found; results and scratch start as bytes 255 (not a number, in floats). Threads
are pthreads, which `thread` understands as it does not understand libgomp's.
"""

from __future__ import annotations

import atexit
import math
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sparsec.codegen.cpu import compiler
from sparsec.runtime import isa as processor

MEMORY = "address,undefined"
RACES = "thread"
TIMEOUT = 300.0

Result = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a result."""

_MAIN = r"""
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace harness {
pthread_barrier_t gate;
void barrier() { pthread_barrier_wait(&gate); }

struct Start { void (*body)(void*); void* data; };
void* enter(void* start) {
  ((Start*)start)->body(((Start*)start)->data);
  return nullptr;
}
void parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  Start start = {body, data};
  pthread_t* others = (pthread_t*)malloc(threads * sizeof(pthread_t));
  pthread_barrier_init(&gate, nullptr, threads);
  for (unsigned i = 1; i < threads; ++i) pthread_create(&others[i], nullptr, enter, &start);
  body(data);
  for (unsigned i = 1; i < threads; ++i) pthread_join(others[i], nullptr);
  pthread_barrier_destroy(&gate);
  free(others);
}

void* block(long size) {
  void* memory = malloc(size);
  memset(memory, 255, size);
  return memory;
}
bool move(const char* name, void* memory, long size, bool out) {
  FILE* file = fopen(name, out ? "wb" : "rb");
  if (!file) return false;
  const long done = out ? fwrite(memory, 1, size, file) : fread(memory, 1, size, file);
  return fclose(file) == 0 && done == size;
}
}  // namespace harness

// Arguments: tokens, threads, number of operands, their sizes in bytes (-1: left out), sizes of the results.
int main(int count, char** arguments) {
  using namespace harness;
#ifdef SPARSEC_AMX
  if (syscall(SYS_arch_prctl, 0x1023, 18)) _exit(90);
#endif
  const long tokens = atol(arguments[1]);
  const int threads = atoi(arguments[2]), ins = atoi(arguments[3]), outs = count - 4 - ins;
  const void** in = (const void**)malloc(ins * sizeof(void*));
  void** out = (void**)malloc(outs * sizeof(void*));
  char name[32];
  for (int i = 0; i < ins; ++i) {
    const long size = atol(arguments[4 + i]);
    void* memory = size < 0 ? nullptr : block(size);
    snprintf(name, sizeof name, "in%d", i);
    if (memory && !move(name, memory, size, false)) _exit(91);
    in[i] = memory;
  }
  for (int i = 0; i < outs; ++i) out[i] = block(atol(arguments[4 + ins + i]));
  const int64_t size = sparsec_scratch(tokens, threads);
  void* scratch = nullptr;
  if (size < 0 || posix_memalign(&scratch, 64, size)) _exit(92);
  memset(scratch, 255, size);
  const bool many = threads > 1;
  const Call call = {tokens, in, out, scratch, threads, many ? parallel : nullptr, many ? barrier : nullptr};
  for (int again = 0; again < 2; ++again)  // what the first launch leaves in its scratch memory must not matter
    if (sparsec_run(&call)) _exit(93);
  for (int i = 0; i < outs; ++i) {
    snprintf(name, sizeof name, "out%d", i);
    if (!move(name, out[i], atol(arguments[4 + ins + i]), true)) _exit(94);
    free(out[i]);
  }
  for (int i = 0; i < ins; ++i) free((void*)in[i]);
  free(scratch), free(in), free(out);
  return 0;
}
"""
_FAILURES = {
    90: "the kernel does not allow AMX",
    91: "an operand could not be read",
    92: "sparsec_scratch returned nonsense",
    93: "sparsec_run refused",
    94: "a result could not be written",
}


class SanitizerFailed(AssertionError):
    """A sanitizer found something, or the program failed; holds its report."""


def run(
    source: str,
    isa: str,
    *,
    tokens: int,
    ins: Sequence[Tensor | None],
    outs: Sequence[Result],
    threads: int = 1,
    sanitizers: str = MEMORY,
) -> list[Tensor]:
    """Run a kernel twice in a row and return what the second launch left.

    Raises: SanitizerFailed; CompilerFailed if the source does not compile.
    """
    program = _built(source, isa, sanitizers)
    sizes = [-1 if tensor is None else tensor.numel() * tensor.itemsize for tensor in ins]
    wanted = [math.prod(shape) * dtype.itemsize for shape, dtype in outs]
    with tempfile.TemporaryDirectory(prefix="sparsec-sanitize-") as folder:
        for i, tensor in enumerate(ins):
            if tensor is not None:
                Path(folder, f"in{i}").write_bytes(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        numbers = map(str, (tokens, threads, len(ins), *sizes, *wanted))
        status, text = compiler.run([*_unmoved(), str(program), *numbers], folder, TIMEOUT)
        if status != 0:
            raise SanitizerFailed(f"{_FAILURES.get(status or 0, f'status {status}')}\n{text}")
        raw = [bytearray(Path(folder, f"out{i}").read_bytes()) for i in range(len(outs))]
    return [
        (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(shape)
        for data, (shape, dtype) in zip(raw, outs, strict=True)
    ]


@cache
def missing(isa: str, sanitizers: str = MEMORY) -> str:
    """Why programs for an instruction set cannot run under these sanitizers here; "" if they can."""
    if isa not in processor.processor():
        return f"this processor has no {isa}"
    if isa not in compiler.isas():
        return f"there is no compiler that knows {isa}"
    empty = 'extern "C" int32_t sparsec_run(const struct Call*) { return 0; }\n'
    empty += 'extern "C" int64_t sparsec_scratch(int64_t, int32_t) { return 0; }\n'
    abi = Path(compiler.__file__).with_name("include") / "call.h"
    try:
        run(abi.read_text().replace("#pragma once", "") + empty, isa, tokens=1, ins=[], outs=[], sanitizers=sanitizers)
    except (compiler.CompilerFailed, SanitizerFailed) as error:
        return f"-fsanitize={sanitizers} does not work: {str(error).splitlines()[-1]}"
    return ""


@cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="sparsec-sanitized-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def _built(source: str, isa: str, sanitizers: str) -> Path:
    kept = [flag for flag in compiler.flags(isa) if flag not in ("-O3", "-shared", "-fPIC") and "-Wl" not in flag]
    place = _folder() / str(len(list(_folder().iterdir())))
    place.mkdir()
    (place / "kernel.cpp").write_text(source + _MAIN)
    options = ["-O1", "-g", "-fno-omit-frame-pointer", "-pthread", f"-fsanitize={sanitizers}"]
    if "undefined" in sanitizers:
        options += ["-fno-sanitize-recover=all", "-fno-sanitize=vptr"]
    command = [*compiler.find().command, *kept, *options, "-o", "kernel", "kernel.cpp"]
    status, text = compiler.run(command, str(place))
    if status != 0:
        raise compiler.CompilerFailed(text)
    return place / "kernel"


@cache
def _unmoved() -> tuple[str, ...]:
    """A prefix that switches address randomisation off, which older sanitizers cannot have everywhere."""
    setarch = shutil.which("setarch")
    return (setarch, "-R") if setarch and compiler.run([setarch, "-R", "true"])[0] == 0 else ()
