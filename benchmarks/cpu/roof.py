"""The roof: what memory and arithmetic units of this processor can do, measured."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu import machine
from benchmarks.shapes import Shape

SOURCE = Path(__file__).with_name("roof.cpp")
OPTIONS = {
    "avx2": "-mavx2",
    "fma": "-mfma",
    "avx512f": "-mavx512f",
    "avx512_bf16": "-mavx512bf16",
    "amx_tile": "-mamx-tile",
    "amx_bf16": "-mamx-bf16",
}  #: compiler options by the processor's flags
BYTES = {"bf16": 2.0, "int8": 1.0, "int4": 0.5 + 4 / 128}  #: of a weight in memory


@dataclass
class Roof:
    """The best of all measurements so far, by number of threads."""

    how: str
    gbps: dict[int, float] = field(default_factory=dict)
    tflops: dict[int, float] = field(default_factory=dict)

    def least_ms(self, shape: Shape, tokens: int, hit: float, threads: int, kind: str = "bf16") -> float:
        """The larger of the time for the arithmetic and the time to read each of `hit` experts once, milliseconds."""
        arithmetic = shape.flops(tokens) / (self.tflops[threads] * 1e12)
        reading = hit * shape.parameters * BYTES[kind] / (self.gbps[threads] * 1e9)
        return max(arithmetic, reading) * 1e3

    def json(self) -> dict[str, Any]:
        rates = {
            str(n): {"gbps": round(self.gbps[n], 2), "tflops": round(self.tflops[n], 3)} for n in sorted(self.gbps)
        }
        return {"how": self.how, "threads": rates}


class Meter:
    """Measures the roof, as often as asked: by a C++ program compiled here, by PyTorch where there is no compiler."""

    def __init__(self, threads: Sequence[int]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._program, how = _build(Path(self._folder.name))
        self.roof = Roof(how)
        self._threads = threads

    def measure(self) -> Roof:
        """Measure once more; the best counts."""
        room = machine.free_bytes() // 4
        size = max(256 << 20, min(4 * machine.cache_bytes(), room or 1 << 30))
        for threads in self._threads:
            gbps, tflops = _run(self._program, threads, size) if self._program else _by_torch(threads)
            self.roof.gbps[threads] = max(gbps, self.roof.gbps.get(threads, 0.0))
            self.roof.tflops[threads] = max(tflops, self.roof.tflops.get(threads, 0.0))
        return self.roof


def _build(folder: Path) -> tuple[Path | None, str]:
    flags = machine.cpu_flags()
    compiler = machine.compiler()
    if compiler is None or not {"avx2", "fma"} <= flags:
        reason = "no C++ compiler" if compiler is None else "a processor without AVX2"
        return None, f"estimated by PyTorch's sum and matmul ({reason}): the roof may be higher"
    options = [option for flag, option in OPTIONS.items() if flag in flags]
    program = folder / "roof"
    command = [compiler, "-O2", "-std=c++17", "-pthread", *options, str(SOURCE), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), "no message").split("error")[-1]
        return None, f"estimated by PyTorch's sum and matmul (the C++ program failed{first}): the roof may be higher"
    units = {"amx_bf16": "AMX bf16", "avx512_bf16": "AVX512 bf16", "avx512f": "AVX512 f32"}
    unit = next((name for flag, name in units.items() if flag in flags), "AVX2 f32")
    return program, f"{unit} from registers; reads of huge pages with software prefetch"


def _run(program: Path, threads: int, size: int) -> tuple[float, float]:
    """(GB/s, TFLOP/s)."""
    command = [str(program), str(threads), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    gbps, tflops = map(float, done.stdout.split())
    return gbps, tflops


def _by_torch(threads: int) -> tuple[float, float]:
    """(GB/s, TFLOP/s)."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        numbers = torch.ones(1 << 26)
        left = torch.ones(1024, 1024, dtype=torch.bfloat16)
        best = [_best(numbers.sum), _best(lambda: left @ left)]
    finally:
        torch.set_num_threads(before)
    return numbers.nbytes / best[0] / 1e9, 2 * 1024**3 / best[1] / 1e12


def _best(run: Any) -> float:
    """The least seconds of a few runs."""
    taken = list[float]()
    for _ in range(6):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)
