"""Sizes as expressions over symbols, `2*s0 + 1`, read from files that nobody vouches for.

Text is parsed by `ast` and only integers, names, `+ - * // %`, unary minus, `max` and `min` are let through. Nothing is
ever evaluated by Python itself.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sparsec.runtime.errors import ArtifactError, InputError

MAX_TEXT = 1000
"""Longest expression accepted, in characters."""

LIMIT = 2**62
"""Sizes of this magnitude or more are refused: torch counts in 64 bits."""

_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_CALLS: dict[str, Callable[..., int]] = {"max": max, "min": min}

_Node = Callable[[Mapping[str, int]], int]


@dataclass(frozen=True)
class Expr:
    """A parsed size: `expr(env)` is its value, `symbols` the names that `env` must hold."""

    text: str
    symbols: frozenset[str]
    value: _Node

    def __call__(self, env: Mapping[str, int]) -> int:
        """Raises: InputError where it divides by zero or leaves 62 bits."""
        try:
            result = self.value(env)
            return _bounded(result)
        except ZeroDivisionError:
            raise InputError(f"the size {self.text} divides by zero for {_spell(env, self.symbols)}") from None
        except OverflowError:
            raise InputError(f"the size {self.text} is too large for {_spell(env, self.symbols)}") from None


@lru_cache(4096)
def parse(text: str) -> Expr:
    """A size from its text. Raises: ArtifactError for anything but a dimension expression."""
    if len(text) > MAX_TEXT:
        raise ArtifactError(f"a dimension expression has {len(text)} characters, at most {MAX_TEXT} are accepted")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ArtifactError(f"not a dimension expression: {text!r}") from None
    names = set[str]()
    try:
        node = _build(tree, names)
    except (ValueError, RecursionError):
        raise ArtifactError(f"not a dimension expression: {text!r}") from None
    return Expr(text, frozenset(names), node)


def _build(node: ast.expr, names: set[str]) -> _Node:
    match node:
        case ast.Constant(value=int(value)) if not isinstance(value, bool) and value < LIMIT:
            return lambda env: value
        case ast.Name(id=name):
            names.add(name)
            return lambda env: env[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _build(operand, names)
            return lambda env: -inner(env)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            function, a, b = _BINARY[type(op)], _build(left, names), _build(right, names)
            return lambda env: _bounded(function(a(env), b(env)))
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as args, keywords=[]) if name in _CALLS:
            choose, parts = _CALLS[name], [_build(arg, names) for arg in args]
            return lambda env: choose([part(env) for part in parts])
        case _:
            raise ValueError


def _bounded(value: int) -> int:
    # Checked at every step: a long product of products would otherwise grow without end.
    if not -LIMIT < value < LIMIT:
        raise OverflowError
    return value


def _spell(env: Mapping[str, int], names: frozenset[str]) -> str:
    return ", ".join(f"{name} = {env[name]}" for name in sorted(names)) or "any input"


def compile_dim(dim: Any) -> int | Expr:
    """A size as a plan holds it: an int stays one, a text is parsed. Raises: ArtifactError."""
    if isinstance(dim, bool) or not isinstance(dim, int | str):
        raise ArtifactError(f"a size is {dim!r}, neither an integer nor an expression")
    if isinstance(dim, int):
        if not -LIMIT < dim < LIMIT:
            raise ArtifactError(f"the size {dim} is too large")
        return dim
    expr = parse(dim)
    try:
        return expr if expr.symbols else expr({})
    except InputError as error:
        raise ArtifactError(str(error)) from None
