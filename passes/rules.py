"""What rules of several passes ask about ops: attributes with their defaults, dims, sizes, splats."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from sparsec.dialects import aten
from sparsec.ir.core import Attr, Op, Value
from sparsec.ir.types import Dim, Sym, TensorType, Type, product


@cache
def default(name: str, parameter: str) -> Any:
    """The default that torch's schema gives a parameter of an op; None where it has none."""
    for param in aten.parameters(name):
        if param.name == parameter and param.has_default_value():
            value = param.default_value
            return tuple(value) if isinstance(value, list) else value
    return None


def attr(op: Op, name: str) -> Any:
    """An attribute of an `aten` op, or its default."""
    return op.attrs[name] if name in op.attrs else default(op.name, name)


def with_attrs(op: Op, **changes: Attr) -> dict[str, Attr]:
    """The attributes of an `aten` op with changes, less those that equal their default."""
    merged = {**op.attrs, **changes}
    return {
        name: value
        for name, value in merged.items()
        if name not in changes or value is None or value != default(op.name, name) or default(op.name, name) is None
    }


@cache
def is_pointwise(name: str) -> bool:
    """Whether an op computes each element of its result from the elements at the same place (after broadcasting)."""
    import torch

    found = aten.overload(name)
    if found is None or found._schema.is_mutable or aten.is_random(found):
        return False
    return torch.Tag.pointwise in found.tags or name in _POINTWISE


_POINTWISE = frozenset(
    f"aten.{name}"
    for name in [
        "masked_fill.Scalar",
        "masked_fill.Tensor",
        "_to_copy",
        "to.dtype",
        "type_as",
        "clone",
        "alias",
        "detach",
        "log_sigmoid",
        "softplus",
        "clamp",
        "clamp.Tensor",
        "clamp_min",
        "clamp_max",
        "where.self",
        "where.ScalarSelf",
        "where.ScalarOther",
        "where.Scalar",
        "__and__.Tensor",
        "__or__.Tensor",
        "__xor__.Tensor",
        "pow.Tensor_Scalar",
        "fill.Scalar",
        "fill.Tensor",
        "copy",
        "floor_divide",
        "floor_divide.Scalar",
        "remainder.Scalar",
        "remainder.Tensor",
        "isfinite",
        "isinf",
        "isnan",
        "silu",
        "gelu",
        "relu",
        "mish",
        "elu",
        "hardtanh",
    ]
)


def is_tensor(value: Value) -> bool:
    return isinstance(value.type, TensorType)


def negative(dim: int, rank: int) -> int:
    """A dimension counted from the end."""
    return dim - rank if dim >= 0 else dim


@cache
def factors(dim: Dim) -> tuple[int, tuple[str, ...]]:
    """A size as a number times sorted symbolic factors, so that `s0*s1` and `s1*s0` are seen to be one."""
    if isinstance(dim, int):
        return dim, ()
    number, symbolic = 1, list[str]()
    stack: list[ast.expr] = [ast.parse(dim, mode="eval").body]
    while stack:
        node = stack.pop()
        match node:
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                stack += [left, right]
            case ast.Constant(value=int(value)):
                number *= value
            case _:
                symbolic.append(ast.unparse(node))
    return number, tuple(sorted(symbolic))


def same_size(a: Sequence[Dim], b: Sequence[Dim]) -> bool:
    """Whether two lists of dimensions certainly have the same number of elements."""
    return factors(product(tuple(a))) == factors(product(tuple(b)))


def same_shape(a: Sequence[Dim], b: Sequence[Dim]) -> bool:
    """Whether two shapes are certainly equal."""
    return len(a) == len(b) and all(x == y or factors(x) == factors(y) for x, y in zip(a, b, strict=True))


@cache
def substitute(dim: Dim, old: Dim, new: Sym) -> Dim:
    """`dim` with the size `old` called `new`: `2*(s0*s1)` with `s0*s1 -> t` is `2*t`. Ints are never renamed.

    In a sum or a quotient each part is renamed for itself.
    """
    if isinstance(dim, int) or isinstance(old, int):
        return dim
    number, left = factors(dim)
    by, parts = factors(old)
    rest = list(left)
    if parts and number % by == 0 and all(part in rest for part in parts):
        for part in parts:
            rest.remove(part)
        return product((number // by, *(Sym(part) for part in rest), new)) if rest or number != by else new
    match ast.parse(dim, mode="eval").body:
        case ast.BinOp(left=a, op=ast.Add() | ast.Sub() | ast.FloorDiv() as sign, right=b):
            c, d = (ast.parse(str(substitute(Sym(ast.unparse(side)), old, new)), mode="eval").body for side in (a, b))
            return Sym(ast.unparse(ast.BinOp(c, sign, d)).replace(" ", ""))
        case _:
            return dim


def renamers(old: Dim, new: Sym) -> tuple[Callable[[Type], Type], Callable[[Attr], Attr]]:
    """What `clone_op` maps types and attributes with, to call the size `old` `new`, as of `substitute`."""

    def map_type(type: Type) -> Type:
        if not isinstance(type, TensorType):
            return type
        return TensorType(tuple(substitute(dim, old, new) for dim in type.shape), type.dtype)

    def map_attr(value: Attr) -> Attr:
        if isinstance(value, Sym):
            return substitute(value, old, new)
        return tuple(map_attr(item) for item in value) if isinstance(value, tuple) else value

    return map_type, map_attr
