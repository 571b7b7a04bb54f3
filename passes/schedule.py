"""Choose how each fused op runs, by ranges of the number of tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import inf
from typing import Any, ClassVar

from sparsec.dialects.moe import GatherGemm, GemmCombine, Group, RouteGroup
from sparsec.dialects.moe.common import known
from sparsec.ir.core import Module, Op
from sparsec.passes.base import Pass, PassContext, register
from sparsec.passes.chips import Chip, chip
from sparsec.passes.cost import invariance, ranges
from sparsec.passes.gradient_variants import gradient_variants
from sparsec.passes.variants import Gemm

INVARIANT_LOSS = 0.03
"""How much slower, as a share, kernels may be so that a row's bits do not depend on the batch."""


@register
@dataclass(frozen=True)
class ScheduleVariants(Pass):
    """Write the variants of every fused op for GPUs: for each range of token counts the family of kernels and the tile
    that the cost model finds fastest. Kernels for CPUs choose by themselves.

    A row gets the same bits in whatever batch it comes if all variants add its terms in one order. That is so where it
    makes no number of tokens slower by more than `invariant-loss`, a share; 0 asks for the fastest only.
    """

    name: ClassVar[str] = "schedule"

    invariant_loss: float = INVARIANT_LOSS  #: a share of the time; beyond any where the module says `invariant`

    def run(self, module: Module, ctx: PassContext) -> None:
        if ctx.target == "cpu":
            return
        on, most = chip(ctx.target), allowed_loss(module, self.invariant_loss)
        count = 0
        for op in module.walk():
            variants = gpu_variants(op, on, most)
            if variants and op.attrs.get("variants") != variants:
                op.attrs["variants"] = variants
                count += 1
        ctx.changed("scheduled ops", count)


def allowed_loss(module: Module, loss: float = INVARIANT_LOSS) -> float:
    """How much slower kernels of a module may be for one order of adding: anything where it asks for that."""
    return inf if module.attrs.get("invariant") else loss


def gpu_variants(op: Op, on: Chip, invariant_loss: float = INVARIANT_LOSS) -> tuple[dict[str, Any], ...]:
    """Variants of a fused op for a GPU; none for other ops.

    GEMMs: `kernel` (the family), `block_m, block_n, block_k, num_warps, num_stages, split` with `predicted_us` at the
    range's upper end and its `limiter`. `block_n` counts columns of the result (a gated up-projection loads two such
    blocks). Routers: `block_rows` tokens per program and `num_warps`.
    """
    if isinstance(op, RouteGroup | Group):
        return _router_variants(op)
    if not isinstance(op, GatherGemm | GemmCombine):
        return gradient_variants(op, on)
    gemm = gemm_of(op)
    orders = invariance(gemm, on, invariant_loss).orders
    return tuple(
        {
            **({} if range_.up_to is None else {"up_to": range_.up_to}),
            **asdict(range_.chosen.variant),
            "predicted_us": round(range_.chosen.made.us, 2),
            "limiter": range_.chosen.made.limiter,
        }
        for range_ in ranges(gemm, on, orders)
    )


def gemm_of(op: GatherGemm | GemmCombine) -> Gemm:
    """What the cost model needs to know of an op."""
    listed, dtype = op.tiles is not None, op.results[0].tensor.dtype
    if isinstance(op, GatherGemm):
        inner = known(op.x.tensor.shape[-1])
        parts = 1 if op.layout == "single" else 2
        return Gemm(
            "up", op.num_experts, op.k, inner, op.width, parts, dtype,
            packing=op.packing, transposed=op.up_transposed, listed=listed, activations=op.activations,
        )  # fmt: skip
    inner, columns, tail = known(op.h.tensor.shape[-1]), known(op.y.tensor.shape[-1]), op.tail is not None
    return Gemm(
        "down", op.num_experts, op.k, inner, columns, 1, dtype, 0 if op.k == 1 and not tail else 1,
        op.packing, op.down_transposed, tail=tail, listed=listed, activations=op.activations,
    )  # fmt: skip


def _router_variants(op: RouteGroup | Group) -> tuple[dict[str, Any], ...]:
    """One program for up to 64 tokens, of as many warps as leave each thread 16 lanes at most; more tokens by blocks.

    A single token takes one warp, in which no barrier costs anything. Where one program would have to go through more
    than 4096 lanes, or 2048 where rows are long, two launches of many programs are no slower
    (`codegen/triton/route.py` counts).
    """
    widths = [op.num_experts, *(value.tensor.shape[-1] for value in op.operands if value.tensor.rank)]
    widest = max(_power(width) for width in widths if isinstance(width, int))
    some, few = max(1, min(16, 1024 // widest)), max(1, min(64, (4096 if widest <= 128 else 2048) // widest))
    warps = {1: 1 if widest <= 512 else 4} | {some: 4} | ({few: 8} if few > some else {})
    ranges = ({"up_to": rows, "block_rows": rows, "num_warps": count} for rows, count in warps.items())
    return (*ranges, {"block_rows": some, "num_warps": 4})


def _power(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()
