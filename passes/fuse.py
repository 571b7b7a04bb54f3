"""Turn routes and expert banks into the ops that become kernels: on a GPU three for a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsec.dialects.dist import Remap
from sparsec.dialects.moe import (
    Capacity,
    Experts,
    GatherGemm,
    GemmCombine,
    Group,
    GroupedLinear,
    Route,
    RouteGroup,
)
from sparsec.ir.core import Attr, Module, Op, Value
from sparsec.ir.equal import clone_block
from sparsec.ir.rewrite import Rewriter, Rule, rule
from sparsec.ir.types import TensorType
from sparsec.passes.base import Pass, PassContext, register

BANKS = (Experts, GroupedLinear)
"""Ops whose kernels go through the pairs expert by expert."""


def sorting(target: str) -> tuple[type[Experts | GroupedLinear], ...]:
    """Those whose pairs are sorted by another kernel; on a CPU the kernel of `moe.experts` sorts them itself."""
    return (GroupedLinear,) if target == "cpu" else BANKS


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
            readers = [user for user in op.ids.users if isinstance(user, BANKS) and user.ids is op.ids]
            banks = [user for user in readers if isinstance(user, sorting(ctx.target))]
            if not banks and readers:
                return False
            if not banks:
                # Where a capacity or an exchange comes between, the sort is of other ids than the router's.
                if not any(isinstance(user, Capacity | Remap) for user in op.ids.users):
                    ctx.missed(op, why="no expert bank reads the ids of this router directly")
                return False
            body = clone_block(op.body, {})
            new = RouteGroup([op.logits, *op.params], None, grouping(banks[0].num_experts, ctx.target), [body])
            rw.insert(new, op)
            _name(new)
            rw.replace(op, (new.ids, new.weights, *new.extras))
            return True

        ctx.rewrite(module, [fuse_route_group])


@register
@dataclass(frozen=True)
class FuseExperts(Pass):
    """Split `moe.experts` into its two GEMMs, and make `moe.grouped_linear` one, on the sort of a `moe.route_group` or
    one of its own. On a CPU `moe.experts` stays whole."""

    name: ClassVar[str] = "fuse-experts"

    def run(self, module: Module, ctx: PassContext) -> None:
        ctx.rewrite(module, bank_rules(ctx.target))


def bank_rules(target: str) -> list[Rule]:
    """The rules of `fuse-experts` for a target."""

    @rule("moe.experts")
    def split_experts(op: Op, rw: Rewriter) -> bool:
        """experts -> gather_gemm, gemm_combine"""
        assert isinstance(op, Experts)
        return _split(op, _sorted(op, rw, target), rw)

    @rule("moe.grouped_linear")
    def linear_as_combine(op: Op, rw: Rewriter) -> bool:
        """grouped_linear -> index_select of its rows in the order of experts, gemm_combine"""
        assert isinstance(op, GroupedLinear)
        return _combine(op, _sorted(op, rw, target), rw)

    return [linear_as_combine] if target == "cpu" else [split_experts, linear_as_combine]


def grouping(experts: int, target: str) -> dict[str, Attr]:
    """Attributes of an op that sorts pairs: on a GPU it lists the tiles too."""
    return {"num_experts": experts} if target == "cpu" else {"num_experts": experts, "listed": True}


def _split(op: Experts, sort: Group | RouteGroup, rw: Rewriter) -> bool:
    order, offsets, tiles = sort.order, sort.offsets, sort.tiles
    early = op.weight_on == "input"
    shared: dict[str, Attr] = {name: op.attrs[name] for name in ("layout", "up_transposed") if name in op.attrs}
    inputs = _trimmed(op.x, order, offsets, op.up, op.up_bias, op.weights if early else None, None, tiles)
    gemm = GatherGemm(inputs, None, {"k": op.k, **shared}, [clone_block(op.activation, {})])
    rw.insert(gemm, op)
    gemm.result.name = "h"
    attrs: dict[str, Attr] = {"down_transposed": True} if op.down_transposed else {}
    if early:
        attrs["weighted"] = False
    inputs = _trimmed(gemm.result, order, offsets, op.weights, op.down, op.down_bias, None, tiles, *op.tail_params)
    combine = GemmCombine(inputs, None, attrs, [clone_block(op.tail, {})] if op.tail is not None else [])
    rw.insert(combine, op)
    rw.replace(op, combine.results)
    return True


def _combine(op: GroupedLinear, sort: Group | RouteGroup, rw: Rewriter) -> bool:
    order, offsets, tiles = sort.order, sort.offsets, sort.tiles
    (tokens, k), columns = op.ids.tensor.shape, op.y.tensor.shape[-1]
    pairs, inner = order.tensor.shape[0], op.x.tensor.shape[-1]
    dtype = op.x.tensor.dtype
    flat = TensorType((pairs, inner), dtype)
    rows, at = op.x, order
    if op.x.tensor.rank == 3:
        rows = rw.make(op, "aten.reshape", [rows], [flat], {"shape": flat.shape}).result
    elif k != 1:
        at = rw.make(op, "aten.floor_divide.Scalar", [order], [order.type], {"other": k}).result
    rows = rw.make(op, "aten.index_select", [rows, at], [flat], {"dim": 0}).result
    attrs: dict[str, Attr] = {"down_transposed": True} if op.transposed else {}
    if op.weights is not None:
        combine = GemmCombine(_trimmed(rows, order, offsets, op.weights, op.w, op.bias, None, tiles), None, attrs)
        rw.insert(combine, op)
        rw.replace(op, combine.results)
        return True
    # Every pair is a token with one choice here: its sum over choices is the row itself.
    alone = TensorType((pairs, 1), op.ids.tensor.dtype)
    ids = rw.make(op, "aten.reshape", [op.ids], [alone], {"shape": alone.shape}).result
    attrs["weighted"] = False
    combine = GemmCombine(_trimmed(rows, order, offsets, ids, op.w, op.bias, None, tiles), None, attrs)
    rw.insert(combine, op)
    shape = (tokens, k, columns)
    rw.replace(op, rw.make(op, "aten.reshape", combine.results, [TensorType(shape, dtype)], {"shape": shape}).results)
    return True


def _sorted(op: Experts | GroupedLinear, rw: Rewriter, target: str) -> Group | RouteGroup:
    """The op that sorts the pairs of a bank."""
    route = op.ids.op
    if isinstance(route, RouteGroup) and route.ids is op.ids and route.num_experts == op.num_experts:
        return route
    group = Group([op.ids], None, grouping(op.num_experts, target))
    rw.insert(group, op)
    _name(group)
    return group


def _name(sort: Group | RouteGroup) -> None:
    sort.order.name, sort.offsets.name = "order", "offsets"
    if sort.tiles is not None:
        sort.tiles.name = "tiles"


def _trimmed(*operands: Value | None) -> list[Value | None]:
    """Operands without the absent ones at the end."""
    given = list(operands)
    while given[-1] is None:
        given.pop()
    return given
