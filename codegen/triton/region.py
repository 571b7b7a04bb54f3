"""A region's ops as lines of Triton, one op a line: routers on row tiles, activations on accumulators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

from sparsec.codegen.triton.tile import FLOATS, INTEGERS, NARROW, Names, Tile, known_sizes, unsupported
from sparsec.ir.core import Attr, Block, Op, Value
from sparsec.ir.types import Dim, DType, Sym

Rule: TypeAlias = Callable[["RegionCode", Op], "str | tuple[str, ...] | Tile"]
"""Gives the text of each result, or the operand that the result is."""

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register how to write aten ops."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES["aten." + name] = function
        return function

    return register


class RegionCode:
    """Writes one region.

    Args:
        names: variables in use.
        rounds: whether to round results to f16 and bf16 where the graph says so. Routers do, so that ids come out as
            in eager; an activation is computed in f32 throughout, which is no less exact.
    """

    def __init__(self, names: Names, rounds: bool) -> None:
        self.names, self.rounds = names, rounds
        self.lines: list[str] = []
        self.tiles: dict[Value, Tile] = {}
        self.row_dim: Dim = 0
        self._last_comment = ""

    def run(self, block: Block, args: Sequence[Tile]) -> tuple[Tile, ...]:
        """Write every op of `block`, whose first argument has the rows; what it yields.

        Raises: CompileError naming an op that has no rule.
        """
        self.row_dim = block.args[0].tensor.shape[0]
        self.tiles.update(zip(block.args, args, strict=True))
        for op in block.ops[:-1]:
            self._write(op)
        return tuple(self.tiles[value] for value in block.terminator.operands)

    def tile(self, op: Op, i: int) -> Tile:
        """Operand `i`. Raises: CompileError if it is absent or a list."""
        argument = op.arguments[i] if i < len(op.arguments) else None
        if not isinstance(argument, Value):
            raise unsupported(op, f"operand {i} is not one tensor")
        return self.tiles[argument]

    def result(self, op: Op, i: int = 0) -> Tile:
        """The type of result `i` as a tile without text."""
        type = op.results[i].tensor
        if type.dtype not in FLOATS | INTEGERS | {DType.i1}:
            raise unsupported(op, f"element type {type.dtype} is not computed in a kernel")
        # With a fixed number of tokens a size of that number may be something else: rows come only from rows.
        rows = bool(type.shape) and type.shape[0] == self.row_dim
        if rows and not isinstance(self.row_dim, Sym):
            rows = any(self.tiles[v].rows for v in op.operands) if op.operands else len(type.shape) > 1
        return Tile("", known_sizes(type, rows, op), rows, type.dtype)

    def call(self, helper: str, *args: object) -> str:
        """A call of a function of `tiles.py`."""
        return f"{helper}({', '.join(map(str, args))})"

    def guarded(self, tile: Tile, axis: int, fill: str) -> str:
        """`tile` with `fill` in its padded lanes along `axis`."""
        size = tile.size(axis)
        if tile.lanes[axis - tile.rows] == size:
            return tile.text
        return self.call("guard", tile.text, axis, size, fill)

    def _write(self, op: Op) -> None:
        write = RULES.get(op.name)
        if write is None:
            raise unsupported(op, "it is not among the row-local ops that kernels are built of")
        self._comment(op)
        texts = write(self, op)
        if isinstance(texts, Tile):
            self.tiles[op.results[0]] = texts
            return
        texts = (texts,) if isinstance(texts, str) else texts
        variables = list[str]()
        for i, result in enumerate(op.results):
            tile = self.result(op, i)
            variables.append(self.names.of(result) if result.users else "_")
            self.tiles[result] = Tile(variables[-1], tile.sizes, tile.rows, tile.dtype)
        if self.rounds and len(op.results) == 1:
            texts = (rounded(texts[0], op.results[0].tensor.dtype),)
        self.lines.append(f"{', '.join(variables)} = {', '.join(texts)}")

    def _comment(self, op: Op) -> None:
        comment = f"# {op.loc}  {op.loc.source}".rstrip() if op.loc else ""
        if comment and comment != self._last_comment:
            self.lines.append(comment)
            self._last_comment = comment


def rounded(text: str, dtype: DType) -> str:
    """An f32 expression rounded to a narrow element type."""
    return f"({text}).to({NARROW[dtype]}).to(tl.float32)" if dtype in NARROW else text


def attr(op: Op, name: str, default: Attr) -> Attr:
    return op.attrs.get(name, default)


def integer(op: Op, name: str, default: int) -> int:
    """An attribute that must be known. Raises: CompileError."""
    value = op.attrs.get(name, default)
    if not isinstance(value, int):
        raise unsupported(op, f"attribute '{name}' is {value!r}, not an integer")
    return value


def literal(op: Op, value: Attr) -> str:
    """A number as Triton takes it. Raises: CompileError."""
    if not isinstance(value, bool | int | float):
        raise unsupported(op, f"{value!r} is not a number")
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)


def operand(code: RegionCode, op: Op, i: int, name: str) -> str:
    """Operand `i`, or the number that stands in its place."""
    if i < len(op.arguments):
        return numeric(code.tile(op, i))
    return literal(op, op.attrs.get(name))


def numeric(tile: Tile) -> str:
    """A tile's text where a number is needed: a bool counts as 0 or 1."""
    return f"{tile.text}.to(tl.int32)" if tile.dtype is DType.i1 else tile.text


def converted(text: str, source: DType, target: DType) -> str:
    """The registers of one element type as those of another."""
    if target is DType.i1:
        return text if source is DType.i1 else f"{text} != 0"
    if target in FLOATS:
        return text if source in FLOATS else f"{text}.to(tl.float32)"
    return text if source in INTEGERS else f"{text}.to(tl.int32)"
