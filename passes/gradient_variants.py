"""Tiles of backward kernels by chip: the largest that compile without spilled registers there."""

from __future__ import annotations

from typing import Any

from sparsec.dialects.moe import BankGrad, HiddenGrad
from sparsec.ir.core import Op
from sparsec.ir.types import DType
from sparsec.passes.chips import CHIPS, Chip

Variant = dict[str, Any]


def gradient_variants(op: Op, on: Chip) -> tuple[Variant, ...]:
    """Variants of `moe.hidden_grad` and `moe.bank_grad`, none for other ops.

    `block_m, block_n, block_k, num_warps, num_stages`; of a bank's gradient block_m and block_n count its rows and
    columns, and block_k the rows that are added.
    """
    match op:
        case HiddenGrad():
            return _hidden(op, on)
        case BankGrad() if op.rows.tensor.dtype is DType.f32:  # no matrix cores
            return (_variant(64, 64, 32, 8, 2),)
        case BankGrad():
            return (_variant(128, 128, 64, 8, 3),)
        case _:
            return ()


def _hidden(op: HiddenGrad, on: Chip) -> tuple[Variant, ...]:
    """A gated expert has three sums for each element, and parts columns that alternate in memory by moves."""
    if op.x.tensor.dtype is DType.f32:
        return (_variant(32, 32, 32, 4, 2),)
    few = many = 64
    if op.layout != "single":
        few = 64 if on is CHIPS["cuda:sm_90"] and op.layout == "concat" else 32  # as Triton 3.6 compiles it
        many = 64 if on.lanes == 64 else few
    up_to = max(1, 64 * op.num_experts // op.k)  # as many tokens give an expert 64 rows
    return ({"up_to": up_to, **_variant(64, few, 64, 4, 3)}, _variant(128, many, 64, 8, 3))


def _variant(m: int, n: int, k: int, warps: int, stages: int) -> Variant:
    return {"block_m": m, "block_n": n, "block_k": k, "num_warps": warps, "num_stages": stages}
