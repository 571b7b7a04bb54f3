"""Linear layers over a part of a tensor, in the way that PyTorch runs fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsec.ir.core import Module, Op, Value
from sparsec.ir.rewrite import Rewriter, rule
from sparsec.ir.types import TensorType, product
from sparsec.passes.base import Pass, PassContext, register

_GAPS = frozenset({"aten.slice.Tensor", "aten.select.int", "aten.transpose.int", "aten.permute", "aten.expand"})
_SAME_PLACES = frozenset({"aten.unsqueeze", "aten.squeeze.dim", "aten.alias", "aten.detach"})
_SAME_STRIDES = frozenset({"aten.clone", "aten._to_copy"})  # where the tensor is dense, size-1 axes included


@register
@dataclass(frozen=True)
class FlattenLinears(Pass):
    """Run `aten.linear` over a slice or transpose of three or more axes on its rows, as two.

    PyTorch multiplies a tensor whose leading axes are not one in memory with a copy of the weight for each of them:
    for the last token's logits that is all of the vocabulary's weight.
    """

    name: ClassVar[str] = "flatten-linears"

    def run(self, module: Module, ctx: PassContext) -> None:
        ctx.rewrite(module, (linear_of_rows,))


@rule("aten.linear")
def linear_of_rows(op: Op, rw: Rewriter) -> bool:
    """linear(a part of x) -> reshape(linear(reshape(a part of x)))"""
    x, *weights = op.operands
    if x.tensor.rank < 3 or not _has_gaps(x):
        return False
    result = op.results[0].tensor
    rows = product(x.tensor.shape[:-1])
    flat = rw.make(
        op,
        "aten.reshape",
        [x],
        [TensorType((rows, x.tensor.shape[-1]), x.tensor.dtype)],
        {"shape": (-1, x.tensor.shape[-1])},
    )
    made = rw.make(op, "aten.linear", [flat.results[0], *weights], [TensorType((rows, result.shape[-1]), result.dtype)])
    rw.replace_op(op, "aten.reshape", made.results, {"shape": result.shape})
    return True


def _has_gaps(value: Value) -> bool:
    """Whether a value may lie in memory such that its leading axes are not one."""
    while value.op is not None and value.op.name in _SAME_PLACES | _SAME_STRIDES:
        value = value.op.operands[0]
    return value.op is not None and value.op.name in _GAPS
