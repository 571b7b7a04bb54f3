"""Our dtypes as torch's, and back. Torch is imported when first asked."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from sparsec.ir.types import DType

if TYPE_CHECKING:
    import torch


@cache
def _table() -> dict[DType, torch.dtype]:
    import torch

    return {
        DType.f64: torch.float64,
        DType.f32: torch.float32,
        DType.f16: torch.float16,
        DType.bf16: torch.bfloat16,
        DType.f8E4M3FN: torch.float8_e4m3fn,
        DType.f8E5M2: torch.float8_e5m2,
        DType.i64: torch.int64,
        DType.i32: torch.int32,
        DType.i16: torch.int16,
        DType.i8: torch.int8,
        DType.ui8: torch.uint8,
        DType.i1: torch.bool,
        DType.c64: torch.complex64,
    }


@cache
def _reverse() -> dict[torch.dtype, DType]:
    return {theirs: ours for ours, theirs in _table().items()}


def to_torch(dtype: DType) -> torch.dtype:
    return _table()[dtype]


def from_torch(dtype: torch.dtype) -> DType:
    """Raises: TypeError for a dtype that the IR has no name for (quantised, double complex)."""
    try:
        return _reverse()[dtype]
    except KeyError:
        raise TypeError(f"sparsec has no element type for {dtype}") from None
