"""The capacity of experts as PyTorch operators: sort the pairs, count along each run of one expert, put them back."""

from __future__ import annotations

from sparsec.dialects.moe import Capacity
from sparsec.ir.core import Attr, Op, Value
from sparsec.ir.rewrite import Rewriter, rule
from sparsec.ir.types import Dim, DType, Sym, TensorType, product
from sparsec.passes.rules import factors


@rule("moe.capacity")
def spell_capacity(op: Op, rw: Rewriter) -> bool:
    """capacity -> sort.stable, searchsorted, scatter"""
    assert isinstance(op, Capacity)
    (tokens, k), dtype = op.ids.tensor.shape, op.ids.tensor.dtype
    experts, groups = op.num_experts, op.groups
    each = quotient(tokens, groups)
    pairs = product((each, k))
    slots_first = op.order == "slot" and k != 1

    def add(name: str, operands: list[Value], dtype: DType, size: tuple[Dim, ...], /, **attrs: Attr) -> Value:
        return rw.make(op, f"aten.{name}", operands, [TensorType(size, dtype)], attrs).result

    def flags(name: str, operands: list[Value], **attrs: Attr) -> Value:
        return add(name, operands, DType.i1, (groups, pairs), **attrs)

    split, turned, flat = (groups, each, k), (groups, k, each), (groups, pairs)
    arrival = op.ids
    if slots_first:
        arrival = add("reshape", [arrival], dtype, split, shape=split)
        arrival = add("transpose.int", [arrival], dtype, turned, dim0=1, dim1=2)
    arrival = add("reshape", [arrival], dtype, flat, shape=flat)
    outside = flags(
        "bitwise_or.Tensor", [flags("lt.Scalar", [arrival], other=0), flags("ge.Scalar", [arrival], other=experts)]
    )
    key = add("masked_fill.Scalar", [arrival, outside], dtype, flat, value=experts)
    types = [TensorType(flat, dtype), TensorType(flat, DType.i64)]
    ranked, places = rw.make(op, "aten.sort.stable", [key], types, {"stable": True, "dim": 1}).results
    first = add("searchsorted.Tensor", [ranked, ranked], DType.i64, flat)
    number = add("sub.Tensor", [add("arange", [], DType.i64, (pairs,), end=pairs), first], DType.i64, flat)
    late = flags("ge.Scalar", [number], other=op.capacity)
    late = flags("bitwise_and.Tensor", [late, flags("lt.Scalar", [ranked], other=experts)])
    late = flags("scatter.src", [late, places, late], dim=1)
    kept = add("masked_fill.Scalar", [arrival, late], dtype, flat, value=experts)
    if slots_first:
        kept = add("reshape", [kept], dtype, turned, shape=turned)
        kept = add("transpose.int", [kept], dtype, split, dim0=1, dim1=2)
    rw.replace(op, [add("reshape", [kept], dtype, (tokens, k), shape=(tokens, k))])
    return True


def quotient(dim: Dim, by: Dim) -> Dim:
    """`dim` divided by a size that divides it."""
    if by == 1:
        return dim
    number, left = factors(dim)
    divisor, parts = factors(by)
    rest = list(left)
    for part in parts:
        if part not in rest:
            return Sym(f"({dim})//({by})")
        rest.remove(part)
    if number % divisor:
        return Sym(f"({dim})//({by})")
    return product((number // divisor, *map(Sym, rest)))
