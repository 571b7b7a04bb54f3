"""The family `fp8`: tiles whose products are those of tensor cores for e4m3, of rows that a launch in front rounded.

A step takes 128 of the inner dimension, the sum of which is multiplied by the scales of the weights' block and of each
row, and added to the others in f32. A row's sum is taken so whatever the batch that it comes in. Where there is no such
instruction the same kernel multiplies in f16, which holds the values too.
"""

from __future__ import annotations

from sparsec.codegen.triton import combine, experts
from sparsec.codegen.triton.gemm import GroupedGemm
from sparsec.codegen.triton.launch import Wiring
from sparsec.codegen.triton.rounding import Behind, Bytes
from sparsec.codegen.triton.tile import unsupported
from sparsec.dialects.moe import GatherGemm, GemmCombine
from sparsec.ir.core import Func


def up(func: Func, op: GatherGemm, gemm: GroupedGemm, wiring: Wiring) -> Behind:
    """The up-projection. Raises: CompileError for rows that are not to be rounded."""
    return _narrow(experts.Tiles(func, op, gemm, wiring), func, wiring)


def down(func: Func, op: GemmCombine, gemm: GroupedGemm, wiring: Wiring) -> Behind:
    """The down-projection. Raises: CompileError for rows that are not to be rounded."""
    return _narrow(combine.Tiles(func, op, gemm, wiring), func, wiring)


def _narrow(tiles: experts.Tiles | combine.Tiles, func: Func, wiring: Wiring) -> Behind:
    """Tiles that read bytes and scales."""
    if tiles.gemm.op.activations != "fp8":
        raise unsupported(tiles.gemm.op, "the family 'fp8' multiplies rows that are rounded, these stay as they are")
    rounding = Bytes(func, tiles.gemm, wiring)
    tiles.name, tiles.parameters = f"{func.name}_fp8", [*rounding.instead(tiles.parameters)]
    return Behind(rounding, tiles)
