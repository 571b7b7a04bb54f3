"""One spelling for what can be said in several, and nothing that does nothing. Every rule is exact, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsec.ir.core import Attr, Block, Func, Module, Op, Value
from sparsec.ir.rewrite import Rewriter, rule
from sparsec.passes.base import Pass, PassContext, register
from sparsec.passes.rules import attr, is_pointwise, is_tensor, negative, same_shape, with_attrs
from sparsec.passes.splat import splat

MAX_INT = 2**63 - 1  # torch's "to the end" of a slice

_AXIS_OPS = (
    "aten.softmax.int",
    "aten.log_softmax.int",
    "aten.topk",
    "aten.sum.dim_IntList",
    "aten.mean.dim",
    "aten.amax",
    "aten.amin",
    "aten.max.dim",
    "aten.min.dim",
    "aten.argmax",
    "aten.argmin",
    "aten.logsumexp",
    "aten.gather",
    "aten.scatter.value",
    "aten.scatter.src",
    "aten.cumsum",
)


@register
@dataclass(frozen=True)
class Canonicalize(Pass):
    """Drop ops that change nothing, fold masks that hide nothing, count dimensions from the end."""

    name: ClassVar[str] = "canonicalize"

    def run(self, module: Module, ctx: PassContext) -> None:
        ctx.rewrite(module, RULES)


def _same_type(op: Op) -> bool:
    """Whether the only result has the type of the first operand."""
    first, result = op.operands[0].type, op.results[0].type
    return first == result or (
        is_tensor(op.operands[0])
        and is_tensor(op.results[0])
        and op.operands[0].tensor.dtype == op.results[0].tensor.dtype
        and same_shape(op.operands[0].tensor.shape, op.results[0].tensor.shape)
    )


def _escapes(value: Value) -> bool:
    """Whether a function returns this value, so that it must not become an alias of another."""
    return any(user.name == "func.return" for user in value.users)


def _drop(op: Op, rw: Rewriter) -> bool:
    """Let the first operand stand for the result, unless that would make an output an alias of an argument."""
    if not _same_type(op) or (op.operands[0].op is None and _escapes(op.results[0])):
        return False
    rw.replace(op, op.operands[:1])
    return True


def _guards_argument(op: Op) -> bool:
    """Whether an op keeps a result apart from an argument that others may write: an input or a buffer."""
    if not _returned(op.results[0]):
        return False
    value = op.operands[0]
    while value.op is not None and value.op.name in _KEEPS_LAYOUT:
        value = value.op.operands[0]
    func = value.owner.parent if isinstance(value.owner, Block) else None
    return isinstance(func, Func) and func.arg_attrs.get(value, {}).get("kind", "input") in ("input", "buffer")


@rule("aten.alias", "aten.detach", "aten.lift_fresh_copy")
def drop_alias(op: Op, rw: Rewriter) -> bool:
    """alias(x) -> x"""
    return _drop(op, rw)


@rule("aten._assert_tensor_metadata", "aten._assert_scalar", "aten._assert_async", "aten._assert_async.msg")
def drop_assertion(op: Op, rw: Rewriter) -> bool:
    """_assert...(x) -> nothing; the capture has checked what it could."""
    if any(result.users for result in op.results):
        return False
    rw.erase(op)
    return True


@rule("aten.dropout", "aten.feature_dropout", "aten.alpha_dropout")
def drop_idle_dropout(op: Op, rw: Rewriter) -> bool:
    """dropout(x) outside training -> x"""
    return (not attr(op, "train") or attr(op, "p") == 0) and _drop(op, rw)


@rule("aten.clone", "aten.contiguous")
def drop_clone(op: Op, rw: Rewriter) -> bool:
    """clone(x) -> x, unless something behind it can tell how x lies in memory, or it is a result of its own"""
    return not _layout_matters(op.results[0]) and not _guards_argument(op) and _drop(op, rw)


@rule("aten._to_copy", "aten.to.dtype")
def drop_cast(op: Op, rw: Rewriter) -> bool:
    """a cast to the type that the value has -> the value"""
    return not _guards_argument(op) and _drop(op, rw)


@rule("aten.type_as")
def name_cast(op: Op, rw: Rewriter) -> bool:
    """type_as(x, y) -> x cast to y's dtype, which needs no y"""
    value, other = op.operands
    if value.tensor.dtype == other.tensor.dtype:
        return _drop(op, rw)
    rw.replace_op(op, "aten._to_copy", [value], {"dtype": other.tensor.dtype})
    return True


@rule("aten.reshape", "aten.view", "aten._unsafe_view", "aten.expand")
def drop_reshape(op: Op, rw: Rewriter) -> bool:
    """a reshape to the shape that the value has -> the value"""
    return _drop(op, rw)


@rule("aten.view", "aten._unsafe_view")
def name_reshape(op: Op, rw: Rewriter) -> bool:
    """view(x) -> reshape(x): the same of values, wherever they lie"""
    rw.replace_op(op, "aten.reshape", op.operands, {"shape": op.attrs["size"]})
    return True


@rule("aten.reshape")
def merge_reshapes(op: Op, rw: Rewriter) -> bool:
    """reshape(reshape(x)) -> reshape(x)"""
    inner = op.operands[0].op
    if inner is None or inner.name != "aten.reshape":
        return False
    rw.replace_op(op, "aten.reshape", inner.operands, {"shape": op.results[0].tensor.shape})
    return True


@rule("aten.slice.Tensor")
def drop_slice(op: Op, rw: Rewriter) -> bool:
    """x[0:size:1] -> x"""
    start, end = attr(op, "start"), attr(op, "end")
    whole = start in (None, 0) and (end is None or (isinstance(end, int) and end >= 0)) and attr(op, "step") == 1
    return whole and _drop(op, rw)


@rule("aten.transpose.int")
def cancel_transposes(op: Op, rw: Rewriter) -> bool:
    """transpose(transpose(x, a, b), a, b) -> x"""
    inner = op.operands[0].op
    if inner is None or inner.name != op.name or _escapes(op.results[0]):
        return False
    rank = op.results[0].tensor.rank
    if _dims(op, ("dim0", "dim1"), rank) != _dims(inner, ("dim0", "dim1"), rank):
        return False
    rw.replace(op, inner.operands)
    return True


@rule("aten.select.int")
def reshape_only(op: Op, rw: Rewriter) -> bool:
    """select(x, d, 0) -> reshape(x), where d has no other element"""
    x = op.operands[0].tensor
    if x.shape[negative(attr(op, "dim"), x.rank)] != 1:
        return False
    rw.replace_op(op, "aten.reshape", op.operands, {"shape": op.results[0].tensor.shape})
    return True


@rule("aten.squeeze.dim")
def cancel_squeeze(op: Op, rw: Rewriter) -> bool:
    """squeeze(unsqueeze(x, d), d) -> x"""
    inner = op.operands[0].op
    if inner is None or inner.name != "aten.unsqueeze" or _escapes(op.results[0]):
        return False
    rank = op.operands[0].tensor.rank
    if _dims(op, ("dim",), rank) != _dims(inner, ("dim",), rank):
        return False
    rw.replace(op, inner.operands)
    return True


@rule("aten.mul.Scalar", "aten.div.Scalar")
def drop_times_one(op: Op, rw: Rewriter) -> bool:
    """x * 1 -> x"""
    return op.attrs["other"] == 1 and _drop(op, rw)


@rule("aten.mul.Tensor", "aten.div.Tensor")
def drop_times_ones(op: Op, rw: Rewriter) -> bool:
    """x * (a tensor of ones) -> x; (a tensor of ones) * x -> x"""
    left, right = op.operands
    if op.name == "aten.mul.Tensor" and splat(left) == 1 and right.type == op.results[0].type:
        op.operands = (right, left)
        return _drop(op, rw)
    return splat(right) == 1 and _drop(op, rw)


@rule("aten.add.Scalar", "aten.sub.Scalar")
def drop_plus_zero(op: Op, rw: Rewriter) -> bool:
    """x + 0 -> x for integers (-0.0 + 0 is 0.0); x - 0 -> x for all"""
    integer = not op.operands[0].tensor.dtype.is_float
    return op.attrs["other"] == 0 and (integer or op.name == "aten.sub.Scalar") and _drop(op, rw)


@rule("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def drop_empty_mask(op: Op, rw: Rewriter) -> bool:
    """masked_fill(x, a mask that is false everywhere) -> x, as in group-limited routing that keeps every group"""
    return splat(op.operands[1]) == 0 and _drop(op, rw)


@rule("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf")
def drop_decided_where(op: Op, rw: Rewriter) -> bool:
    """where(a mask that is the same everywhere, x, y) -> x or y"""
    decided = splat(op.operands[0])
    if decided is None or (op.name.endswith("ScalarOther") and not decided):
        return False
    if op.name.endswith("ScalarSelf") and decided:
        return False
    chosen = op.operands[2 if op.name == "aten.where.self" and not decided else 1]
    if chosen.type != op.results[0].type or _escapes(op.results[0]):
        return False
    rw.replace(op, [chosen])
    return True


@rule(*_AXIS_OPS)
def count_dims_from_the_end(op: Op, rw: Rewriter) -> bool:
    """dim = 1 of two dimensions -> dim = -1"""
    rank = op.operands[0].tensor.rank
    dim = attr(op, "dim")
    new: Attr
    if isinstance(dim, tuple):
        new = tuple(negative(int(item), rank) for item in dim)
    elif isinstance(dim, int) and not isinstance(dim, bool) and rank:
        new = negative(dim, rank)
    else:
        return False
    if new == dim:
        return False
    rw.replace_op(op, op.name, op.arguments, with_attrs(op, dim=new))
    return True


def _dims(op: Op, names: tuple[str, ...], rank: int) -> set[int]:
    return {negative(attr(op, name), rank) for name in names}


# Ops that see strides, and those that hand them on.
_SEES_LAYOUT = frozenset(
    {"aten.as_strided", "aten.view_as_complex", "aten.view_as_real", "aten.view.dtype", "aten._grouped_mm"}
)
_KEEPS_LAYOUT = frozenset(
    f"aten.{name}"
    for name in [
        "reshape",
        "expand",
        "transpose.int",
        "permute",
        "unsqueeze",
        "squeeze.dim",
        "slice.Tensor",
        "select.int",
        "alias",
        "detach",
    ]
)


def _returned(value: Value) -> bool:
    """Whether a function returns `value` or a view of it."""
    return any(
        user.name == "func.return" or (user.name in _KEEPS_LAYOUT and any(map(_returned, user.results)))
        for user in value.users
    )


def _layout_matters(value: Value) -> bool:
    """Whether an op that sees strides reads `value`, be it through ops that hand strides on."""
    seen, stack = set[Op](), list(value.users)
    while stack:
        op = stack.pop()
        if op in seen:
            continue
        seen.add(op)
        if op.name in _SEES_LAYOUT or op.dialect == "torch":
            return True
        if op.name in _KEEPS_LAYOUT or is_pointwise(op.name):
            stack += [user for result in op.results for user in result.users]
    return False


RULES = (
    drop_alias,
    drop_assertion,
    drop_idle_dropout,
    drop_clone,
    drop_cast,
    name_cast,
    drop_reshape,
    name_reshape,
    merge_reshapes,
    drop_slice,
    cancel_transposes,
    reshape_only,
    cancel_squeeze,
    drop_times_one,
    drop_times_ones,
    drop_plus_zero,
    drop_empty_mask,
    drop_decided_where,
    count_dims_from_the_end,
)
