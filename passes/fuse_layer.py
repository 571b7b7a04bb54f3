"""Turn a route and the experts that it feeds into one op, for targets that run both in one kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsec.dialects.dist import DispatchWait
from sparsec.dialects.moe import Experts, Layer, Route
from sparsec.ir.core import Module, Op, Value
from sparsec.ir.equal import clone_block
from sparsec.ir.opdef import OpDef
from sparsec.ir.rewrite import Rewriter, rule
from sparsec.passes.base import Pass, PassContext, register


@register
@dataclass(frozen=True)
class FuseLayer(Pass):
    """On a CPU, fuse `moe.route` with the first `moe.experts` that reads its ids and weights into `moe.layer`.

    What reads the route in front of these experts is moved behind them.
    """

    name: ClassVar[str] = "fuse-layer"

    def run(self, module: Module, ctx: PassContext) -> None:
        if ctx.target != "cpu":
            return

        @rule("moe.experts")
        def fuse_layer(op: Op, rw: Rewriter) -> bool:
            """route, experts -> layer"""
            assert isinstance(op, Experts)
            route = op.ids.op
            if not isinstance(route, Route) or op.ids is not route.ids or op.weights is not route.weights:
                if isinstance(route, DispatchWait):  # the router runs where tokens are, the experts elsewhere
                    return False
                source = f"from {route.name}" if route is not None else "as arguments"
                ctx.missed(op, why=f"the experts' ids and weights come {source}, not both from one router")
                return False
            if op.x.tensor.shape[0] != route.logits.tensor.shape[0]:
                ctx.missed(op, why=f"the router has {route.logits.type} for rows, the experts {op.x.type}")
                return False
            rest = [op.x, *(value for value in op.bank_operands() if value is not None), *op.tail_params]
            if not _move_readers(route, op, rest):
                ctx.missed(op, why="the experts depend on more of their router than its ids and weights")
                return False
            inputs = [op.x, route.logits, *op.bank_operands(), *route.params, *op.tail_params]
            while inputs[-1] is None:
                inputs.pop()
            regions = [clone_block(region, {}) for region in (*route.regions, *op.regions)]
            new = Layer(inputs, None, op.attrs, regions)
            rw.insert(new, op)
            rw.replace(route, (new.ids, new.weights, *new.extras))
            rw.replace(op, (new.y,))
            return True

        for func in module.funcs.values():
            for op in list(func.body.ops):
                if isinstance(op, Experts) and ctx.rewriter.apply(fuse_layer, op):
                    ctx.rewriter.flush()
                    ctx.changed(str(fuse_layer))


def _move_readers(route: Op, experts: Op, operands: list[Value]) -> bool:
    """Move what depends on `route` from in front of `experts` to behind them.

    Returns: False, with nothing moved, where one of `operands` depends on it too, or an op must keep its place.
    """
    block = route.block
    assert block is not None
    first, last = block.ops.index(route), block.ops.index(experts)
    between, late, found = block.ops[first + 1 : last], dict[Op, None](), set(route.results)
    for op in between:
        if any(value in found for inner in op.walk() for value in inner.operands):
            late[op] = None
            found.update(op.results)
    if any(value in found for value in operands) or not all(isinstance(op, OpDef) and op.pure for op in late):
        return False
    block.ops[first + 1 : last + 1] = [*(op for op in between if op not in late), experts, *late]
    return True
