"""The choice between ways of computing a backward op: which there are for a chip, how they compare, what ranges share
one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from itertools import product
from typing import Any

from sparsec.diagnostics import CompileError
from sparsec.dialects.moe import BankGrad, HiddenGrad
from sparsec.ir.core import Op
from sparsec.ir.types import DType
from sparsec.passes.chips import CHIPS, Chip
from sparsec.passes.cost import Candidate, Range, fewest
from sparsec.passes.gradients import Bank, Gradient, Hidden, foresee, gradient_of
from sparsec.passes.variants import Family, Variant

FAMILIES: tuple[Family, ...] = ("tiles", "tma")
"""The families of their kernels, as of `codegen/triton/gradient_kernels.py`."""

FEW = 4
"""Binaries of one op: more are not worth compiling and loading for what they gain."""


def gradient_variants(op: Op, on: Chip) -> tuple[dict[str, Any], ...]:
    """Variants of `moe.hidden_grad` and `moe.bank_grad` as of `schedule.gpu_variants`, none for other ops.

    Of a bank's gradient block_m and block_n count its rows and columns, and block_k the rows that are added.
    """
    if not isinstance(op, HiddenGrad | BankGrad):
        return ()
    return tuple(
        {
            **({} if range_.up_to is None else {"up_to": range_.up_to}),
            **asdict(range_.chosen.variant),
            "predicted_us": round(range_.chosen.made.us, 2),
            "limiter": range_.chosen.made.limiter,
        }
        for range_ in gradient_ranges(gradient_of(op), on)
    )


def obstacle(kernel: Family, grad: Gradient, on: Chip) -> str:
    """Why a family cannot compute a backward op on a chip, or is not tried; "" if it can."""
    if kernel not in FAMILIES:
        return "there is no such family of kernels of gradients"
    if kernel == "tiles":
        return ""
    if not on.engine:
        return f"{on.name} has no copy engine for tensors"
    if grad.dtype is DType.f32:
        return "f32 is not multiplied by tensor cores"
    if any(row * grad.dtype.itemsize % 16 for row in grad.rows):
        return f"rows of {' and '.join(map(str, grad.rows))} elements: blocks of 16 bytes are needed"
    if isinstance(grad, Hidden):
        if grad.hidden % 64 or grad.out % 64:
            return f"sums of {grad.hidden} and {grad.out} terms: blocks of 64 are needed"
        if on is CHIPS["cuda:sm_100"] and grad.alternate:
            return "columns that alternate take more registers than Triton 3.6 leaves there"
    return ""


def gradient_candidates(grad: Gradient, on: Chip) -> Iterator[Variant]:
    """The variants that are tried: none of them spills on the chip, as Triton 3.6 compiles it."""
    for kernel in FAMILIES:
        if not obstacle(kernel, grad, on):
            yield from _hidden(kernel, grad, on) if isinstance(grad, Hidden) else _bank(kernel, grad, on)


def _hidden(kernel: Family, grad: Hidden, on: Chip) -> Iterator[Variant]:
    """A gated expert has three sums for each element, and parts columns that alternate in memory by moves."""
    if grad.dtype is DType.f32:  # no tensor cores
        yield Variant(kernel, 32, 32, 32, 8, 2)
        return
    if kernel == "tma":  # the region is taken a few columns at a time, by threads of a few rows
        for tile, stages in product([(128, 128, 8), (128, 64, 8), (64, 64, 4)], (3, 4)):
            m, n, warps = tile
            if (m == 128 or on is CHIPS["cuda:sm_90"]) and not (n == 128 and grad.parts == 2 and grad.heavy):
                yield Variant(kernel, m, n, 64, warps, stages)
        return
    few = many = 64
    if grad.parts == 2:
        few = 64 if on is CHIPS["cuda:sm_90"] and not grad.alternate else 32
        many = 64 if on.lanes == 64 else few
    yield Variant(kernel, 64, few, 64, 4, 3)
    yield Variant(kernel, 128, many, 64, 8, 3)


def _bank(kernel: Family, grad: Bank, on: Chip) -> Iterator[Variant]:
    if grad.dtype is DType.f32:
        yield Variant(kernel, 64, 64, 32, 8, 2)
        return
    tiles, depths, stages = [(64, 128, 4), (128, 128, 8)], [64], [3, 4]
    if on.wide:  # sums, but no operands, are in registers
        tiles, stages = [*tiles, (128, 256, 8), (256, 128, 8)], [3, 4, 5]
    elif on.lanes == 64:  # there, no asynchronous copies to keep under way
        tiles, depths, stages = [*tiles, (128, 256, 8)], [32, 64], [2, 3]
    for (m, n, warps), depth, deep in product(tiles, depths, stages):
        yield Variant(kernel, m, n, depth, warps, deep)


@cache
def gradient_ranked(grad: Gradient, tokens: int, on: Chip) -> tuple[Candidate, ...]:
    """All variants that fit the chip, the fastest for `tokens` tokens first. Raises: CompileError if none fits."""
    made = [(variant, foresee(grad, variant, tokens, on)) for variant in gradient_candidates(grad, on)]
    found = [Candidate(variant, prediction) for variant, prediction in made if prediction is not None]
    if not found:
        raise CompileError(f"no tile of the {grad} fits {on.name}")
    return tuple(sorted(found, key=lambda c: (c.made.us, _spare(c.variant))))


@cache
def gradient_ranges(grad: Gradient, on: Chip) -> tuple[Range, ...]:
    """The variants by ascending token count: as few as stay near the fastest of each bucket."""
    return fewest(lambda tokens: gradient_ranked(grad, tokens, on), _spare, FEW)


def _spare(variant: Variant) -> tuple[Any, ...]:
    """Of equals, that of small tiles, few warps and stages."""
    return variant.block_m * variant.block_n, variant.num_warps, variant.num_stages, str(variant)
