"""Choose how each fused op runs, by ranges of the number of tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from sparsec.dialects.moe import GatherGemm, GemmCombine, Group, RouteGroup
from sparsec.ir.core import Module, Op
from sparsec.ir.types import DType
from sparsec.passes.base import Pass, PassContext, register
from sparsec.passes.chips import Chip, chip
from sparsec.passes.cost import Gemm, best

BUCKETS = (1, 16, 64, 256, 1024, 4096)
MANY = 16384  # tokens that stand for all larger numbers


@register
@dataclass(frozen=True)
class ScheduleVariants(Pass):
    """Write the variants of every fused op for GPUs: the tiles that the cost model finds fastest for each range of
    token counts. Kernels for CPUs choose by themselves."""

    name: ClassVar[str] = "schedule"

    def run(self, module: Module, ctx: PassContext) -> None:
        if ctx.target == "cpu":
            return
        on = chip(ctx.target)
        count = 0
        for op in module.walk():
            variants = gpu_variants(op, on)
            if variants and op.attrs.get("variants") != variants:
                op.attrs["variants"] = variants
                count += 1
        ctx.changed("scheduled ops", count)


def gpu_variants(op: Op, on: Chip) -> tuple[dict[str, Any], ...]:
    """Variants of a fused op for a GPU; none for other ops.

    GEMMs: `block_m, block_n, block_k, num_warps, num_stages` with `predicted_us` at the range's upper end and its
    `limiter`. `block_n` counts columns of the result (a gated up-projection loads two such blocks). Routers:
    `block_rows` tokens per program and `num_warps`.
    """
    if isinstance(op, RouteGroup | Group):
        return _router_variants(op)
    if not isinstance(op, GatherGemm | GemmCombine):
        return ()
    gemm, found = _gemm(op), list[dict[str, Any]]()
    for tokens in (*BUCKETS, MANY):
        tile, made = best(gemm, tokens, on)
        variant = {
            **({} if tokens == MANY else {"up_to": tokens}),
            **asdict(tile),
            "predicted_us": round(made.us, 2),
            "limiter": made.limiter,
        }
        if found and all(found[-1][key] == value for key, value in asdict(tile).items()):
            found.pop()  # the same tile for this range too
        found.append(variant)
    return tuple(found)


def _gemm(op: GatherGemm | GemmCombine) -> Gemm:
    if isinstance(op, GatherGemm):
        inner = op.up.tensor.shape[1 if op.up_transposed else 2]
        parts = 1 if op.layout == "single" else 2
        assert isinstance(inner, int)
        size = op.x.tensor.dtype.itemsize
        return Gemm(op.num_experts, op.k, inner, op.width, parts, op.x.tensor.dtype, op.width * size)
    inner, columns = op.h.tensor.shape[-1], op.y.tensor.shape[-1]
    assert isinstance(inner, int) and isinstance(columns, int)
    size = op.h.tensor.dtype.itemsize
    partial = 2 * columns * DType.f32.itemsize  # written by the GEMM, read by the sum over slots
    alone = op.k == 1 and op.tail is None
    row_bytes = inner * size + (columns * size if alone else partial)
    return Gemm(op.num_experts, op.k, inner, columns, 1, op.h.tensor.dtype, row_bytes)


def _router_variants(op: RouteGroup | Group) -> tuple[dict[str, Any], ...]:
    """A few tokens: one program routes and sorts them all. Else programs of as many rows as registers hold."""
    widths = [op.num_experts, *(value.tensor.shape[-1] for value in op.operands if value.tensor.rank)]
    widest = max(_power(width) for width in widths if isinstance(width, int))
    few, many = max(4, min(16, 4096 // widest)), max(4, min(32, 4096 // widest))
    warps = 8 if widest >= 128 else 4  # 4 would spill registers
    return ({"up_to": few, "block_rows": few, "num_warps": warps}, {"block_rows": many, "num_warps": warps})


def _power(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()
