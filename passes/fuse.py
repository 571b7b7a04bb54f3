"""Turn routes and expert banks into the three ops that become kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsec.dialects.moe import Experts, GatherGemm, GemmCombine, Group, Route, RouteGroup
from sparsec.ir.core import Attr, Module, Op
from sparsec.ir.equal import clone_block
from sparsec.ir.rewrite import Rewriter, rule
from sparsec.passes.base import Pass, PassContext, register


@register
@dataclass(frozen=True)
class FuseRouteGroup(Pass):
    """Fuse `moe.route` with the sort by expert that its banks need.

    Banks of one size share the sort; if a route feeds banks of several sizes, the first one's is fused.
    """

    name: ClassVar[str] = "fuse-route-group"

    def run(self, module: Module, ctx: PassContext) -> None:
        @rule("moe.route")
        def fuse_route_group(op: Op, rw: Rewriter) -> bool:
            assert isinstance(op, Route)
            banks = [user for user in op.ids.users if isinstance(user, Experts) and user.ids is op.ids]
            if not banks:
                ctx.missed(op, why="no expert bank reads the ids of this router directly")
                return False
            body = clone_block(op.body, {})
            attrs = {"num_experts": banks[0].num_experts}
            new = RouteGroup([op.logits, *op.params], None, attrs, [body])
            rw.insert(new, op)
            for result, name in zip((new.order, new.offsets), ("order", "offsets"), strict=True):
                result.name = name
            rw.replace(op, (new.ids, new.weights, *new.extras))
            return True

        ctx.rewrite(module, [fuse_route_group])


@register
@dataclass(frozen=True)
class FuseExperts(Pass):
    """Split `moe.experts` into its two GEMMs, on the sort of a `moe.route_group` or one of its own."""

    name: ClassVar[str] = "fuse-experts"

    def run(self, module: Module, ctx: PassContext) -> None:
        ctx.rewrite(module, [split_experts])


@rule("moe.experts")
def split_experts(op: Op, rw: Rewriter) -> bool:
    """experts -> gather_gemm, gemm_combine"""
    assert isinstance(op, Experts)
    route = op.ids.op
    if isinstance(route, RouteGroup) and route.ids is op.ids and route.num_experts == op.num_experts:
        order, offsets = route.order, route.offsets
    else:
        group = Group([op.ids], None, {"num_experts": op.num_experts})
        rw.insert(group, op)
        order, offsets = group.results
        order.name, offsets.name = "order", "offsets"
    shared: dict[str, Attr] = {name: op.attrs[name] for name in ("layout", "up_transposed") if name in op.attrs}
    up_bias = [op.up_bias] if op.up_bias is not None else []
    gemm = GatherGemm(
        [op.x, order, offsets, op.up, *up_bias],
        None,
        {"k": op.k, **shared},
        [clone_block(op.activation, {})],
    )
    rw.insert(gemm, op)
    gemm.result.name = "h"
    down_bias = [op.down_bias] if op.down_bias is not None else []
    attrs = {"down_transposed": True} if op.down_transposed else {}
    combine = GemmCombine([gemm.result, order, offsets, op.weights, op.down, *down_bias], None, attrs)
    rw.insert(combine, op)
    rw.replace(op, combine.results)
    return True
