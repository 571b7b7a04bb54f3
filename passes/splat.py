"""Values whose elements are all the same number, seen from the ops that make them."""

from __future__ import annotations

from typing import TypeAlias

from sparsec.ir.core import Op, Value
from sparsec.ir.types import DType
from sparsec.passes.rules import attr, negative, same_shape

Number: TypeAlias = bool | int | float

_SAME_ELEMENTS = frozenset(
    f"aten.{name}"
    for name in [
        "view",
        "reshape",
        "_unsafe_view",
        "unsqueeze",
        "squeeze.dim",
        "expand",
        "clone",
        "contiguous",
        "alias",
        "detach",
        "slice.Tensor",
        "transpose.int",
        "permute",
        "select.int",
    ]
)


def splat(value: Value, depth: int = 32) -> Number | None:
    """The number that every element of `value` certainly is; None where that is not known."""
    op = value.op
    if op is None or depth == 0:
        return None
    if op.name in _SAME_ELEMENTS:
        return splat(op.operands[0], depth - 1)
    if (number := _constant(op)) is not None:
        return _cast(number, value.tensor.dtype)
    if op.name in ("aten._to_copy", "aten.to.dtype", "aten.type_as"):
        inner = splat(op.operands[0], depth - 1)
        return None if inner is None else _cast(inner, value.tensor.dtype)
    if op.name in ("aten.bitwise_not", "aten.logical_not") and value.tensor.dtype is DType.i1:
        inner = splat(op.operands[0], depth - 1)
        return None if inner is None else not inner
    if op.name in ("aten.eq.Tensor", "aten.eq.Scalar"):
        left = splat(op.operands[0], depth - 1)
        right = splat(op.operands[1], depth - 1) if op.name.endswith("Tensor") else op.attrs["other"]
        return None if left is None or not isinstance(right, bool | int | float) else left == right
    if op.name in ("aten.sum.dim_IntList", "aten.amax", "aten.any.dim") and _counts_each(op):
        return _cast(1, value.tensor.dtype)
    if op.name == "aten.scatter.value" and _overwrites_all(op):
        return _cast(op.attrs["value"], value.tensor.dtype)  # type: ignore[arg-type]
    return None


def _constant(op: Op) -> Number | None:
    if op.name in ("aten.zeros_like", "aten.zeros", "aten.new_zeros"):
        return 0
    if op.name in ("aten.ones_like", "aten.ones", "aten.new_ones"):
        return 1
    if op.name == "aten.arange" and op.results[0].tensor.shape == (1,):
        return 0
    filled = op.attrs.get("fill_value") if op.name in ("aten.full_like", "aten.full", "aten.new_full") else None
    return filled if isinstance(filled, bool | int | float) else None


def _cast(number: Number, dtype: DType) -> Number | None:
    if dtype is DType.i1:
        return bool(number)
    if dtype.is_float or isinstance(number, int):
        return number
    return None  # a float as an integer: leave it to torch


def _overwrites_all(op: Op) -> bool:
    """Whether a scatter writes every element: its index is all of an axis, as a top-k that keeps every entry yields."""
    target, index = op.operands
    if not same_shape(target.tensor.shape, index.tensor.shape):
        return False
    axis = negative(attr(op, "dim"), target.tensor.rank)
    if target.tensor.shape[axis] == 1:
        return True  # the only index there is
    return _is_permutation(index, axis)


def _counts_each(op: Op) -> bool:
    """Whether ones for every number along an axis are added up: one_hot(a permutation).sum(-2)."""
    hot = op.operands[0].op
    while hot is not None and hot.name in ("aten._to_copy", "aten.to.dtype"):
        hot = hot.operands[0].op
    if hot is None or hot.name != "aten.one_hot":
        return False
    index, dim = hot.operands[0], attr(op, "dim")
    dims = dim if isinstance(dim, tuple) else (dim,)
    if len(dims) != 1 or not isinstance(dims[0], int) or negative(dims[0], index.tensor.rank + 1) != -2:
        return False
    size = index.tensor.shape[-1]
    return attr(hot, "num_classes") == size and (size == 1 or _is_permutation(index, -1))


def _is_permutation(index: Value, axis: int) -> bool:
    """Whether an index names everything along an axis once, as a top-k that keeps every entry does."""
    topk = index.op
    if topk is None or topk.name != "aten.topk" or index is not topk.results[1]:
        return False
    source = topk.operands[0].tensor
    along = negative(attr(topk, "dim"), source.rank)
    return along == axis and attr(topk, "k") == source.shape[axis] and same_shape(source.shape, index.tensor.shape)
