"""A region over one row as C++: values are arrays on the stack, ops element by element in a row are one loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TypeAlias

from sparsec.codegen.cpu.lanes import KINDS, NARROW, Kind, Lanes, Names, kind_of, number, unsupported
from sparsec.codegen.cpu.nonlinear import RULES
from sparsec.codegen.cpu.pointwise import CONSTANTS, SAME, constant
from sparsec.codegen.cpu.straight import Comments, pointwise
from sparsec.ir.core import Block, Op, Value
from sparsec.ir.types import Dim, DType, Sym

LANES = 16
MOST_BYTES = 256 << 10
"""Most bytes of stack that a row's arrays may take."""

LIKE = frozenset({"aten.type_as", "aten.to.other"})
"""Ops that take only the element type of their second operand."""


@dataclass(frozen=True)
class Row:
    """A value of the region.

    Args:
        name: the array that holds it; empty for a number that is known and for what is still in memory.
        sizes: the tensor's sizes without the axis of rows.
        rows: whether the tensor has that axis.
        dtype: element type in the graph.
        value: the number that all elements are.
        pointer: C++ of the address of an operand that has not been read.
    """

    name: str
    sizes: tuple[int, ...]
    rows: bool
    dtype: DType
    value: bool | int | float = 0
    pointer: str = ""

    @property
    def kind(self) -> Kind:
        return KINDS[self.dtype]

    @property
    def volume(self) -> int:
        return prod(self.sizes)

    @property
    def rank(self) -> int:
        """Number of axes, that of the rows included."""
        return len(self.sizes) + self.rows

    def axis(self, op: Op, dim: int) -> int:
        """A dimension counted from either end, as an index of `sizes`. Raises: CompileError if it counts rows."""
        axis = dim % max(1, self.rank) - self.rows
        if axis < 0:
            raise unsupported(op, "it works along the axis of the tokens")
        return axis

    def around(self, axis: int, count: int = 1) -> tuple[int, int, int]:
        """Elements before `count` axes, along them, and behind them."""
        return prod(self.sizes[:axis]), prod(self.sizes[axis : axis + count]), prod(self.sizes[axis + count :])


RowRule: TypeAlias = Callable[["RowCode", Op], "Row | tuple[Row, ...]"]
"""How to write an aten op that mixes the elements of a row, or moves them: what its results are."""


def registry() -> tuple[dict[str, RowRule], Callable[..., Callable[[RowRule], RowRule]]]:
    """Rules by op, and a decorator that adds one for the ops it names."""
    rules = dict[str, RowRule]()

    def rule(*names: str) -> Callable[[RowRule], RowRule]:
        def register(function: RowRule) -> RowRule:
            rules.update(dict.fromkeys((f"aten.{name}" for name in names), function))
            return function

        return register

    return rules, rule


class RowCode:
    """Writes one region.

    Args:
        names: variables in use.
        rules: how to write ops that are not computed element by element.
        rounds: whether to round results to f16 and bf16 where the graph says so. Routers do, so that ids come out as
            in eager.
    """

    def __init__(self, names: Names, rules: Mapping[str, RowRule], rounds: bool) -> None:
        self.names, self.rules, self.rounds = names, rules, rounds
        self.lines: list[str] = []
        self.values: dict[Value, Row] = {}
        self.bytes = 0
        self.labels: dict[str, str] = {}  # address -> what to call what is there
        self._read: dict[str, str] = {}  # address -> the array that holds what is there
        self._comments = Comments()
        self._row_dim: Dim = 0
        self._loop = _Loop()

    def run(self, block: Block, args: Sequence[Row]) -> tuple[Row, ...]:
        """Write every op of `block`, whose first argument has the rows; what it yields, in arrays.

        Raises: CompileError naming an op that has no rule.
        """
        self._row_dim = block.args[0].tensor.shape[0]
        self.values.update(zip(block.args, args, strict=True))
        for op in block.ops[:-1]:
            if any(result.users for result in op.results):
                self._write(op)
        rows = tuple(self.array(self.values[value]) for value in block.terminator.operands)
        self._end_loop()
        if self.bytes > MOST_BYTES:
            raise unsupported(None, f"the region keeps {self.bytes >> 10} KiB of a row, more than fit on the stack")
        return rows

    def row(self, op: Op, i: int) -> Row:
        """Operand `i`. Raises: CompileError if it is absent or a list."""
        argument = op.arguments[i] if i < len(op.arguments) else None
        if not isinstance(argument, Value):
            raise unsupported(op, f"operand {i} is not one tensor")
        return self.values[argument]

    def operand(self, op: Op, i: int, kind: Kind | None = None) -> Row:
        """Operand `i` in an array of its own kind, or of `kind`."""
        row = self.row(op, i)
        return self.array(row) if kind in (None, row.kind) else self.converted(row, kind)

    def result(self, op: Op, i: int = 0) -> Row:
        """The type of result `i`, without an array. Raises: CompileError for sizes that only a run gives."""
        value = op.results[i]
        kind_of(op, value)
        type = value.tensor
        # With a fixed number of tokens a size of that number may be something else: rows come only from rows.
        rows = bool(type.shape) and type.shape[0] == self._row_dim
        if rows and not isinstance(self._row_dim, Sym):
            rows = any(self.values[v].rows for v in op.operands) if op.operands else len(type.shape) > 1
        return Row("", known_sizes(op, type.shape[1:] if rows else type.shape), rows, type.dtype)

    def new(self, op: Op, i: int = 0, dtype: DType | None = None) -> Row:
        """A new array for result `i`; with `dtype` for what becomes the result."""
        row = self.result(op, i)
        row = replace(row, dtype=dtype or row.dtype, name=self.names.of(op.results[i]))
        self.declare(row)
        return row

    def declare(self, row: Row) -> None:
        room = -(-row.volume // LANES) * LANES
        self.bytes += 4 * room
        self.lines.append(f"alignas(64) {row.kind.element} {row.name}[{max(LANES, room)}] = {{}};")

    def array(self, row: Row) -> Row:
        """`row` in an array: read if it is in memory, filled if it is one number. Ends the loop that makes it."""
        if row.name in self._loop.arrays:
            self._end_loop()
        if row.name:
            return row
        if row.pointer in self._read:
            return replace(row, name=self._read[row.pointer], pointer="")
        made = replace(row, name=self.names.fresh(self.labels.get(row.pointer, "constant")), pointer="")
        self._end_loop()
        self.declare(made)
        if not row.pointer:
            self.lines += vectors(made.volume, f"store_row({made.name}{{at}}, splat({number(row.value, row.kind)}));")
        else:
            self.lines += read(made, row.pointer)
            self._read[row.pointer] = made.name
        return made

    def converted(self, row: Row, kind: Kind) -> Row:
        """`row` in an array of another kind."""
        dtype = {Kind.number: DType.f32, Kind.integer: DType.i64, Kind.mask: DType.i1}[kind]
        if not row.name and not row.pointer:
            return self.array(replace(row, dtype=dtype))
        row = self.array(row)
        self._end_loop()
        made = replace(row, name=self.names.fresh(f"{row.name}_{kind.name}"), dtype=dtype)
        self.declare(made)
        text = Lanes(f"load_row({row.name}{{at}})", row.dtype).vector(kind)
        self.lines += vectors(made.volume, f"store_row({made.name}{{at}}, {text});")
        return made

    def rounded(self, row: Row) -> Row:
        """The same array, rounded to its element type."""
        if self.rounds and row.dtype in NARROW:
            text = f"store_f32({row.name}{{at}}, {NARROW[row.dtype]}(load_f32({row.name}{{at}})));"
            self.lines += vectors(row.volume, text)
        return row

    def copy(
        self, to: Row, source: Row, sizes: Sequence[int], strides: Sequence[int], start: int = 0,
        into: Sequence[int] | None = None, into_start: int = 0,
    ) -> None:  # fmt: skip
        """Lines that copy elements: `sizes` of them, `strides` apart from `start` on in the source, to places `into`
        apart from `into_start` on (one after the other unless it is given)."""
        into = packed(sizes) if into is None else into
        axes = [axis for axis, size in enumerate(sizes) if size != 1]
        variables = [self.names.fresh(f"a{axis}") for axis in axes]
        indent = ""
        for variable, axis in zip(variables, axes, strict=True):
            self.lines.append(f"{indent}for (int {variable} = 0; {variable} < {sizes[axis]}; ++{variable})")
            indent += "  "
        places = [
            _place(begin, variables, [steps[axis] for axis in axes])
            for begin, steps in ((into_start, into), (start, strides))
        ]
        self.lines.append(f"{indent}{to.name}[{places[0]}] = {source.name}[{places[1]}];")

    def comment(self, op: Op) -> None:
        self.lines += self._comments.of(op.loc)

    def _write(self, op: Op) -> None:
        result = op.results[0]
        if op.name in CONSTANTS and result.tensor.dtype in KINDS:
            self.values[result] = replace(self.result(op), value=constant(op))
            return
        if op.name in SAME and self.row(op, len(op.arguments) - 1).dtype is result.tensor.dtype:
            given = self.row(op, len(op.arguments) - 1)
            if given.sizes == self.result(op).sizes:
                self.values[result] = given
                return
        if op.name in RULES or op.name in SAME:
            self._write_lanes(op)
            return
        write = self.rules.get(op.name)
        if write is None:
            raise unsupported(op, "it is not among the row-local ops that kernels are built of")
        made = write(self, op)
        for value, row in zip(op.results, made if isinstance(made, tuple) else (made,), strict=True):
            self.values[value] = row

    def _write_lanes(self, op: Op) -> None:
        """An op element by element: a line of the open loop, or of a new one."""
        result, volume = self.result(op), self.result(op).volume
        arguments = op.arguments[:1] if op.name in LIKE else op.arguments
        rows = [self.spread(self.values[a], result) if isinstance(a, Value) else None for a in arguments]
        if volume != self._loop.volume:
            self._end_loop()
        self._loop.volume = volume
        operands = [None if row is None else self._lanes(row, volume) for row in rows]
        self._loop.lines += self._comments.of(op.loc)
        text, kind = pointwise(op, operands, self.rounds), kind_of(op, op.results[0])
        array = self.names.of(op.results[0])
        variable = self.names.fresh(f"{array}_i")
        self._loop.lines.append(f"const {kind.vector} {variable} = {text};")
        self.values[op.results[0]] = replace(result, name=array)
        self._loop.arrays[array] = variable
        self._loop.made[op.results[0]] = replace(result, name=array)

    def _lanes(self, row: Row, volume: int) -> Lanes:
        """A row's elements within the open loop."""
        if not row.name:
            return Lanes("", row.dtype, row.value)
        if row.name not in self._loop.arrays:
            variable = self.names.fresh(f"{row.name}_i")
            text = f"splat({row.name}[0])" if row.volume == 1 and volume != 1 else f"load_row({row.name}{{at}})"
            self._loop.lines.append(f"const {row.kind.vector} {variable} = {text};")
            self._loop.arrays[row.name] = variable
        return Lanes(self._loop.arrays[row.name], row.dtype)

    def spread(self, row: Row, result: Row) -> Row:
        """`row` as an operand of an op whose result is `result`: its elements side by side with the result's."""
        sizes = row.sizes
        while len(sizes) > len(result.sizes) and sizes[0] == 1:
            sizes = sizes[1:]
        sizes = (1,) * (len(result.sizes) - len(sizes)) + sizes
        if row.pointer or (row.name in self._loop.arrays and row.volume != result.volume):
            row = self.array(row)
        if not row.name or prod(sizes) in (1, result.volume):
            return row
        if any(size not in (1, wanted) for size, wanted in zip(sizes, result.sizes, strict=True)):
            raise unsupported(None, f"sizes {row.sizes} do not fit {result.sizes}")
        row = self.array(row)
        self._end_loop()
        made = replace(row, name=self.names.fresh(f"{row.name}_wide"), sizes=result.sizes, rows=result.rows)
        self.declare(made)
        steps = [0 if size == 1 else step for size, step in zip(sizes, packed(sizes), strict=True)]
        self.copy(made, row, result.sizes, steps)
        return made

    def _end_loop(self) -> None:
        loop, self._loop = self._loop, _Loop()
        if not loop.made:
            return
        ops = {value.op for value in loop.made}
        kept = [row for value, row in loop.made.items() if any(self._escapes(value, ops))]
        for row in kept:
            self.declare(row)
        body = [*loop.lines, *(f"store_row({row.name}{{at}}, {loop.arrays[row.name]});" for row in kept)]
        self.lines += vectors(loop.volume, *body)

    def _escapes(self, value: Value, ops: set[Op | None]) -> Iterator[bool]:
        """Whether a value is read outside of the loop; a view of it that is read counts."""
        name = self.values[value].name
        for user in value.users:
            if user not in ops:
                same = user.results and user.results[0] in self.values and self.values[user.results[0]].name == name
                yield from self._escapes(user.results[0], ops) if same else (True,)


class _Loop:
    """The loop that ops element by element are being added to; `{at}` in its lines stands for where it is."""

    def __init__(self) -> None:
        self.volume = 0
        self.lines: list[str] = []
        self.arrays: dict[str, str] = {}  # array -> the variable that holds its lanes
        self.made: dict[Value, Row] = {}


def vectors(volume: int, *body: str) -> list[str]:
    """Lines that run for each sixteen elements; `{at}` becomes the offset."""
    if volume <= LANES:
        return ["{", *(f"  {line.replace('{at}', '')}" for line in body), "}"]
    head = f"for (int i = 0; i < {volume}; i += LANES) {{"
    return [head, *(f"  {line.replace('{at}', ' + i')}" for line in body), "}"]


def read(row: Row, pointer: str) -> list[str]:
    """Lines that read a row's elements from memory."""
    load = f"load_{row.dtype.value}((const char*){pointer}"
    if row.volume <= LANES:
        return [f"store_row({row.name}, {load}, {row.volume}));"]
    body = f"store_row({row.name} + i, {load} + i * {row.dtype.itemsize}, {row.volume} - i));"
    return [f"for (int i = 0; i < {row.volume}; i += LANES)", f"  {body}"]


def known_sizes(op: Op | None, shape: Sequence[Dim]) -> tuple[int, ...]:
    known = tuple(size for size in shape if isinstance(size, int))
    if len(known) != len(shape) or 0 in known:
        raise unsupported(op, f"sizes {tuple(shape)} are not all known and positive")
    return known


def packed(sizes: Sequence[int]) -> list[int]:
    """How far apart the elements of each axis are, one after the other."""
    return [prod(sizes[axis + 1 :]) for axis in range(len(sizes))]


def _place(start: int, variables: Sequence[str], strides: Sequence[int]) -> str:
    terms = [v if s == 1 else f"{v} * {s}" for v, s in zip(variables, strides, strict=True) if s]
    return " + ".join([*([str(start)] if start or not terms else []), *terms])
