"""One form for routers that choose and weigh alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsec.dialects.moe import Route
from sparsec.ir.core import Attr, Block, Module, Op, Value
from sparsec.ir.rewrite import Rewriter, rule
from sparsec.ir.types import DType, TensorType
from sparsec.passes.base import Pass, PassContext, register
from sparsec.passes.canonicalize import drop_reshape, drop_slice
from sparsec.passes.router_spelling import RULES as SPELLING
from sparsec.passes.rules import attr, is_pointwise, negative, same_shape, with_attrs
from sparsec.passes.splat import splat


@register
@dataclass(frozen=True)
class CanonicalizeRouters(Pass):
    """Write lookups, masks and views of routers in one way; in `moe.route`, normalise what is chosen after the choice.

    In front of `raise-route` it makes lookups row-local (`p[arange(T)[:, None], ids]` is a gather). In the regions of
    `moe.route` a softmax over all experts that is renormalised over the chosen becomes a softmax over the chosen. The
    rules that work in regions are exact in exact arithmetic: they may change the last bits of weights, and which of two
    experts of equal score is chosen.
    """

    name: ClassVar[str] = "canonicalize-routers"

    def run(self, module: Module, ctx: PassContext) -> None:
        ctx.rewrite(module, (*SPELLING, drop_reshape, drop_slice, *RULES))


def _in_route(op: Op) -> bool:
    return isinstance(op.block, Block) and isinstance(op.block.parent, Route)


def _only(value: Value, *users: Op) -> bool:
    """Whether nothing but `users` reads a value."""
    return set(value.users) <= set(users)


def _along_last(op: Op) -> bool:
    dim = attr(op, "dim")
    dims = dim if isinstance(dim, tuple) else (dim,)
    return len(dims) == 1 and isinstance(dims[0], int) and negative(dims[0], op.operands[0].tensor.rank) == -1


@rule("aten.gather")
def value_of_topk(op: Op, rw: Rewriter) -> bool:
    """gather(x, indices of topk(x)) -> values of topk(x)"""
    x, index = op.operands
    top = index.op
    if top is None or top.name != "aten.topk" or index is not top.results[1] or top.operands[0] is not x:
        return False
    if not _along_last(op) or not _along_last(top):
        return False
    rw.replace(op, top.results[:1])
    return True


@rule("aten.gather")
def value_of_scatter(op: Op, rw: Rewriter) -> bool:
    """gather(f(scatter(x, i, v)), i) -> f(v) for a pointwise f; for a softmax, where x is -inf everywhere"""
    outer, index = op.operands
    chain = list[Op]()
    at = outer.op
    while at is not None and at.name != "aten.scatter.src":
        if len(at.operands) != 1 or not (is_pointwise(at.name) or at.name == "aten.softmax.int"):
            return False
        chain.append(at)
        at = at.operands[0].op
    if at is None or not _in_route(op) or at.operands[1] is not index or not _along_last(op) or not _along_last(at):
        return False
    base, _, value = at.operands
    if not same_shape(value.tensor.shape, index.tensor.shape) or not _distinct(index):
        return False
    for step in chain:
        if step.name == "aten.softmax.int" and not (_along_last(step) and splat(base) == float("-inf")):
            return False
        if step.name == "aten.softmax.int" and step.operands[0] is not at.results[0]:
            return False
    for step in reversed(chain):
        type = TensorType(value.tensor.shape, step.results[0].tensor.dtype)
        value = rw.make(op, step.name, [value], [type], step.attrs).results[0]
    rw.replace(op, [value])
    return True


def _distinct(index: Value) -> bool:
    """Whether the indices of a row certainly differ from each other."""
    op = index.op
    if index.tensor.shape[-1] == 1:
        return True
    while op is not None and op.name == "aten.slice.Tensor":
        op = op.operands[0].op
    return op is not None and op.name in ("aten.topk", "aten.sort", "aten.argsort")


@rule("aten.div.Tensor")
def softmax_of_chosen(op: Op, rw: Rewriter) -> bool:
    """w / sum(w) of w, i = topk(softmax(z)) -> softmax(v) of v, i = topk(z)"""
    chosen, total = op.operands
    top = chosen.op
    if not _in_route(op) or attr(op, "rounding_mode") is not None or total is chosen:
        return False
    if top is None or top.name != "aten.topk" or chosen is not top.results[0] or not _best_along_last(top):
        return False
    path = _sum_of(total, chosen)
    scores = top.operands[0].op
    if path is None or scores is None or scores.name != "aten.softmax.int" or not _along_last(scores):
        return False
    if not _only(chosen, op, path[0]) or not _only(scores.results[0], top):
        return False
    if not all(_only(one.results[0], other) for one, other in zip(path, [*path[1:], op], strict=True)):
        return False
    logits, type = scores.operands[0], top.results[0].tensor
    if logits.tensor.dtype != type.dtype:
        wide = TensorType(logits.tensor.shape, type.dtype)
        logits = rw.make(scores, "aten._to_copy", [logits], [wide], {"dtype": type.dtype}).results[0]
    new = rw.make(top, "aten.topk", [logits], [result.type for result in top.results], top.attrs)
    weights = rw.make(op, "aten.softmax.int", new.results[:1], [type], {"dim": -1})
    weights.results[0].name = op.results[0].name
    rw.replace(op, weights.results)
    for gone in reversed(path):
        rw.erase(gone)
    rw.replace(top, new.results)
    rw.erase(scores)
    return True


def _best_along_last(top: Op) -> bool:
    return _along_last(top) and bool(attr(top, "largest"))


def _sum_of(total: Value, values: Value) -> list[Op] | None:
    """The ops from `values` to their sum along the last axis, which stays with one lane."""
    path = list[Op]()
    at = total.op
    while at is not None and at.name in ("aten.unsqueeze", "aten.reshape", "aten.expand"):
        path.append(at)
        at = at.operands[0].op
    if at is None or at.name != "aten.sum.dim_IntList" or at.operands[0] is not values or not _along_last(at):
        return None
    if attr(at, "dtype") not in (None, values.tensor.dtype):
        return None
    rows = (*values.tensor.shape[:-1], 1)
    if not same_shape(total.tensor.shape, rows) and not same_shape(total.tensor.shape, values.tensor.shape):
        return None
    return [at, *reversed(path)]


@rule("aten.sort", "aten.sort.stable", "aten.argsort", "aten.argsort.stable")
def topk_of_sort(op: Op, rw: Rewriter) -> bool:
    """the first k of sort(x) -> topk(x, k)"""
    x = op.operands[0]
    slices = [user for result in op.results for user in result.users]
    if not _in_route(op) or not _along_last(op) or not slices:
        return False
    known = [end for user in slices if (end := _head(user)) > 0]
    size = x.tensor.shape[-1]
    if len(known) != len(slices) or not isinstance(size, int) or max(known) >= size:
        return False
    k, shape = max(known), x.tensor.shape[:-1]
    types = [TensorType((*shape, k), x.tensor.dtype), TensorType((*shape, k), DType.i64)]
    attrs: dict[str, Attr] = {"k": k} if attr(op, "descending") else {"k": k, "largest": False}
    top = rw.make(op, "aten.topk", [x], types, attrs)
    for result, new in zip(op.results, top.results[-len(op.results) :], strict=True):
        result.replace_by(new)
    rw.erase(op)
    return True


def _head(op: Op) -> int:
    """How many of the first elements of each row an op takes; 0 if it takes others."""
    if op.name != "aten.slice.Tensor" or not _along_last(op) or attr(op, "start") not in (None, 0):
        return 0
    end = attr(op, "end")
    return end if isinstance(end, int) and attr(op, "step") == 1 else 0


@rule("aten.softmax.int")
def cast_in_front(op: Op, rw: Rewriter) -> bool:
    """softmax(z, dtype=d) -> softmax(z cast to d), where the dtypes differ"""
    wanted = attr(op, "dtype")
    if wanted is None or not _in_route(op):
        return False
    value = op.operands[0]
    if value.tensor.dtype != wanted:
        type = TensorType(value.tensor.shape, wanted)
        value = rw.make(op, "aten._to_copy", [value], [type], {"dtype": wanted}).results[0]
    attrs: dict[str, Attr] = {name: item for name, item in with_attrs(op).items() if name != "dtype"}
    rw.replace_op(op, op.name, [value], attrs)
    return True


RULES = (value_of_topk, value_of_scatter, softmax_of_chosen, topk_of_sort, cast_in_front)
