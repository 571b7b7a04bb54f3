"""Types of IR values: dtypes, symbolic dimensions, tensors, runtime integers and handles."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import TypeAlias


class DType(Enum):
    """Element type; the value is MLIR's spelling of it."""

    f64 = "f64"
    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    f8E4M3FN = "f8E4M3FN"
    f8E5M2 = "f8E5M2"
    i64 = "i64"
    i32 = "i32"
    i16 = "i16"
    i8 = "i8"
    ui8 = "ui8"
    i1 = "i1"
    c64 = "c64"

    @property
    def is_float(self) -> bool:
        return "f" in self.value  # complex is neither float nor integer

    @property
    def itemsize(self) -> int:
        """Bytes one element takes in memory (a bool takes a whole byte)."""
        digits = self.value.split("E")[0].lstrip("abcfiu")
        return max(1, int(digits) // 8)

    def __repr__(self) -> str:
        return self.value


class Sym(str):
    """A symbolic integer: a name (`s0`) or an expression over names (`s0*s1`).

    Names come from the front end and hold no `x`, which separates dimensions in text.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return self if self.isidentifier() else f"({self})"


Dim: TypeAlias = int | Sym

_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_CALLS: dict[str, Callable[..., int]] = {"max": max, "min": min}


@cache
def _expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _evaluate(node: ast.expr, env: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name):
            return env[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, env)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_evaluate(left, env), _evaluate(right, env))
        case ast.Call(func=ast.Name(id=name), args=args) if name in _CALLS:
            return _CALLS[name](*(_evaluate(arg, env) for arg in args))
        case _:
            raise ValueError(f"not a dimension expression: {ast.unparse(node)!r}")


def evaluate(dim: Dim, env: Mapping[str, int]) -> int:
    """The value of `dim` where `env` gives every symbol's; KeyError names a symbol that it lacks."""
    if isinstance(dim, int):
        return dim
    value = env.get(dim)
    return _evaluate(_expression(dim), env) if value is None else value


def symbols(dim: Dim) -> Iterator[str]:
    """The symbol names that `dim` mentions, in order, repeats included."""
    if isinstance(dim, Sym):
        calls = _CALLS
        for node in ast.walk(_expression(dim)):
            if isinstance(node, ast.Name) and node.id not in calls:
                yield node.id


def product(dims: tuple[Dim, ...]) -> Dim:
    """The number of elements of a shape, as an int where it is known."""
    known, symbolic = 1, list[str]()
    for dim in dims:
        if isinstance(dim, int):
            known *= dim
        else:
            symbolic.append(dim if dim.isidentifier() else f"({dim})")
    if not symbolic:
        return known
    if known == len(symbolic) == 1:
        return next(dim for dim in dims if isinstance(dim, Sym))
    return Sym("*".join([str(known), *symbolic] if known != 1 else symbolic))


@dataclass(frozen=True, slots=True)
class TensorType:
    """`tensor<s0x64xbf16>`: a dense tensor; its shape may hold symbols."""

    shape: tuple[Dim, ...]
    dtype: DType

    @property
    def rank(self) -> int:
        return len(self.shape)

    def __str__(self) -> str:
        return f"tensor<{''.join(f'{dim!r}x' for dim in self.shape)}{self.dtype.value}>"


@dataclass(frozen=True, slots=True)
class SymType:
    """`sym<s0>`: an integer known at run time; a value of this type binds its symbol."""

    expr: Sym

    def __str__(self) -> str:
        return f"sym<{self.expr}>"


@dataclass(frozen=True, slots=True)
class HandleType:
    """`handle`: an exchange between ranks that has begun and that another op ends (`sparsec.dialects.dist`)."""

    def __str__(self) -> str:
        return "handle"


HANDLE = HandleType()

Type: TypeAlias = TensorType | SymType | HandleType


def dims_of(type: Type) -> tuple[Dim, ...]:
    """The sizes that a type mentions."""
    if isinstance(type, HandleType):
        return ()
    return type.shape if isinstance(type, TensorType) else (type.expr,)
