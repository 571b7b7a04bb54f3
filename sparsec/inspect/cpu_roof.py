"""What this machine's memory and arithmetic units reach, measured by PyTorch in half a second: a roof for CPUs."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from sparsec.ir.types import DType

NUMBERS = 1 << 25
"""f32 numbers whose sum is timed: more than caches hold."""

SIDE = 1024
"""Rows and columns of the matrices whose product is timed."""

RUNS = 6


@cache
def measured() -> tuple[float, dict[DType | None, float]]:
    """Bytes/s of reading, and flops/s of a matrix product by element type, on PyTorch's threads."""
    numbers = torch.ones(NUMBERS)
    rates = dict[DType | None, float]()
    for dtype in (DType.f32, DType.bf16):
        left = torch.ones(SIDE, SIDE, dtype=getattr(torch, {"f32": "float32", "bf16": "bfloat16"}[dtype.value]))
        rates[dtype] = 2 * SIDE**3 / _least(partial(torch.mm, left, left))
    return numbers.nbytes / _least(numbers.sum), {**rates, None: rates[DType.f32]}


def _least(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of a few runs."""
    taken = list[float]()
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)
