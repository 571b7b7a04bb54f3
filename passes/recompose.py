"""Undo what torch.compile takes apart before it hands a graph over, so that passes see one spelling of it.

torch.export keeps `aten.linear` and `aten.softmax.int`; AOT autograd gives the products, transposes and reshapes that
PyTorch makes of them. Every rule is exact: PyTorch computes the one by the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsec.ir.core import Attr, Module, Op, Value
from sparsec.ir.rewrite import Rewriter, rule
from sparsec.ir.types import DType
from sparsec.passes.base import Pass, PassContext, register
from sparsec.passes.rules import attr, same_shape


@register
@dataclass(frozen=True)
class Recompose(Pass):
    """Make linear layers, softmaxes, log-sigmoids and `where` of the ops that PyTorch decomposes them into."""

    name: ClassVar[str] = "recompose"

    def run(self, module: Module, ctx: PassContext) -> None:
        ctx.rewrite(module, RULES)


def _transposed(value: Value) -> Value | None:
    """The matrix of known size that a value is the transpose of."""
    op = value.op
    if op is None or value.tensor.rank != 2 or not all(isinstance(dim, int) for dim in value.tensor.shape):
        return None
    swaps = (
        op.name in ("aten.t", "aten.numpy_T", "aten.mT")
        or (op.name == "aten.transpose.int" and (attr(op, "dim0") - attr(op, "dim1")) % 2 == 1)
        or (op.name == "aten.permute" and [dim % 2 for dim in attr(op, "dims")] == [1, 0])
    )
    return op.operands[0] if swaps else None


@rule("aten.mm", "aten.matmul")
def linear_of_product(op: Op, rw: Rewriter) -> bool:
    """mm(x, t(w)) -> linear(x, w)"""
    x, right = op.operands
    weight = _transposed(right)
    if weight is None or x.tensor.rank < 2:
        return False
    rw.replace_op(op, "aten.linear", [x, weight])
    return True


@rule("aten.addmm")
def linear_of_addmm(op: Op, rw: Rewriter) -> bool:
    """addmm(b, x, t(w)) -> linear(x, w, b)"""
    bias, x, right = op.operands
    weight = _transposed(right)
    if weight is None or bias.tensor.rank != 1 or attr(op, "beta") != 1 or attr(op, "alpha") != 1:
        return False
    if bias.tensor.shape[0] != weight.tensor.shape[0]:  # one number for all columns
        return False
    rw.replace_op(op, "aten.linear", [x, weight, bias])
    return True


@rule("aten.reshape")
def linear_of_rows(op: Op, rw: Rewriter) -> bool:
    """reshape(linear(reshape(x))) -> linear(x), where the rows are flattened and put back"""
    linear = op.operands[0].op
    if linear is None or linear.name != "aten.linear" or len(linear.results[0].users) != 1:
        return False
    flat = linear.operands[0].op
    if flat is None or flat.name != "aten.reshape":
        return False
    x, rows, result = flat.operands[0].tensor, linear.operands[0].tensor, op.results[0].tensor
    columns = linear.results[0].tensor.shape[-1]
    if x.rank < 2 or x.shape[-1] != rows.shape[-1] or not same_shape((*x.shape[:-1], columns), result.shape):
        return False
    rw.replace_op(op, "aten.linear", [flat.operands[0], *linear.operands[1:]])
    return True


@rule("aten._softmax", "aten._log_softmax")
def name_softmax(op: Op, rw: Rewriter) -> bool:
    """_softmax(x) -> softmax.int(x); one that widens to f32 says so by its dtype"""
    attrs: dict[str, Attr] = {"dim": attr(op, "dim")}
    if attr(op, "half_to_float"):
        attrs["dtype"] = DType.f32
    rw.replace_op(op, f"aten.{op.name.removeprefix('aten._')}.int", op.operands, attrs)
    return True


@rule("aten.log_sigmoid_forward")
def name_log_sigmoid(op: Op, rw: Rewriter) -> bool:
    """log_sigmoid_forward(x) -> log_sigmoid(x), where nobody reads what is kept for a backward"""
    result, buffer = op.results
    if buffer.users:
        return False
    new = rw.make(op, "aten.log_sigmoid", op.operands, [result.type])
    result.replace_by(new.results[0])
    rw.erase(op)
    return True


@rule("aten.unbind.int")
def name_where(op: Op, rw: Rewriter) -> bool:
    """unbind(nonzero(x), 1) -> nonzero_numpy(x), which is `torch.where(x)`"""
    places = op.operands[0].op
    if places is None or places.name != "aten.nonzero" or attr(op, "dim") not in (1, -1):
        return False
    rw.replace_op(op, "aten.nonzero_numpy", places.operands)
    return True


@rule("torch.prims.convert_element_type")
def name_cast(op: Op, rw: Rewriter) -> bool:
    """convert_element_type(x) -> _to_copy(x)"""
    rw.replace_op(op, "aten._to_copy", op.operands, {"dtype": op.results[0].tensor.dtype})
    return True


RULES = (linear_of_product, linear_of_addmm, linear_of_rows, name_softmax, name_log_sigmoid, name_where, name_cast)
