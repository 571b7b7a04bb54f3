"""The data of the IR: values, ops, blocks, functions, modules.

SSA: a value is defined once, by an op or as a block argument, and knows its users. A region is one block. Ops that
take optional or grouped operands (`aten.cat([%a, %b])`, `aten.index.Tensor(%x, [none, %i])`) keep a flat tuple of
operands, and the grouping beside it in `segments`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias, Union

from sparsec.ir.loc import UNKNOWN, Loc
from sparsec.ir.types import DType, Sym, TensorType, Type

Attr: TypeAlias = bool | int | float | str | DType | Sym | Sequence["Attr"] | Mapping[str, "Attr"] | None
"""What an attribute can hold. Sequences are stored as tuples, mappings as dicts with string keys."""

Argument: TypeAlias = Union["Value", tuple["Value | None", ...], None]
"""One argument of an op: a value, `none`, or a bracketed list of both."""

Segments: TypeAlias = tuple[int | tuple[int, ...], ...]
"""How flat operands form arguments: 1 a value, 0 `none`, a tuple of those a list."""


class Value:
    """What an op yields or a block receives."""

    __slots__ = ("index", "name", "owner", "type", "users")

    def __init__(self, type: Type, owner: Op | Block, index: int, name: str = "") -> None:
        self.type, self.owner, self.index, self.name = type, owner, index, name
        self.users: dict[Op, int] = {}  # user -> how many of its operands this value is

    @property
    def op(self) -> Op | None:
        """The op that defines this value; None for a block argument."""
        return self.owner if isinstance(self.owner, Op) else None

    @property
    def tensor(self) -> TensorType:
        """Its type, where only a tensor makes sense. Raises: TypeError."""
        if not isinstance(self.type, TensorType):
            raise TypeError(f"%{self.name} is {self.type}, not a tensor")
        return self.type

    def replace_by(self, other: Value) -> None:
        """Make every user of this value use `other`, which takes over the name if it has none."""
        if other is self:
            return
        for user in list(self.users):
            user.operands = tuple(other if operand is self else operand for operand in user.operands)
        other.name = other.name or self.name

    def __repr__(self) -> str:
        return f"%{self.name or '?'}: {self.type}"


class Op:
    """One operation. Dialects subclass it (`sparsec.ir.opdef.OpDef`); this class holds the data that all share."""

    __slots__ = ("_operands", "attrs", "block", "loc", "name", "regions", "results", "segments")

    def __init__(
        self,
        name: str,
        operands: Iterable[Value] = (),
        result_types: Iterable[Type] = (),
        attrs: Mapping[str, Attr] | None = None,
        regions: Iterable[Block] = (),
        loc: Loc = UNKNOWN,
        segments: Segments | None = None,
    ) -> None:
        self.name, self.loc, self.segments = name, loc, segments
        self.attrs: dict[str, Attr] = dict(attrs or {})
        self.results = tuple(Value(type, self, i) for i, type in enumerate(result_types))
        self.regions = tuple(regions)
        for region in self.regions:
            region.parent = self
        self.block: Block | None = None
        self._operands: tuple[Value, ...] = ()
        self.operands = tuple(operands)

    @property
    def operands(self) -> tuple[Value, ...]:
        return self._operands

    @operands.setter
    def operands(self, operands: tuple[Value, ...]) -> None:
        for old in self._operands:
            if old.users[self] == 1:
                del old.users[self]
            else:
                old.users[self] -= 1
        for new in operands:
            new.users[self] = new.users.get(self, 0) + 1
        self._operands = operands

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """The operands, with holes and lists in place."""
        if self.segments is None:
            return self._operands
        flat = iter(self._operands)
        return tuple(
            tuple(next(flat) if one else None for one in segment)
            if isinstance(segment, tuple)
            else (next(flat) if segment else None)
            for segment in self.segments
        )

    @property
    def result(self) -> Value:
        """The only result. Raises: ValueError if there are more or none."""
        (only,) = self.results
        return only

    @property
    def dialect(self) -> str:
        return self.name.partition(".")[0]

    def walk(self) -> Iterator[Op]:
        """This op, then the ops of its regions, in order."""
        yield self
        for region in self.regions:
            for op in list(region.ops):
                yield from op.walk()

    def erase(self) -> None:
        """Take this op out of its block. Raises: ValueError if a result is still used."""
        if any(result.users for result in self.results):
            raise ValueError(f"'{self.name}' ({self.loc}) is erased while its results are used")
        for op in self.walk():
            op.operands = ()
        if self.block is not None:
            self.block.ops.remove(self)
            self.block = None

    def __repr__(self) -> str:
        return f"<{self.name} at {self.loc}>"


def flatten(arguments: Sequence[Argument]) -> tuple[tuple[Value, ...], Segments | None]:
    """Operands and segments of structured arguments; segments are None where every argument is one value."""
    flat, segments = list[Value](), list[int | tuple[int, ...]]()
    for argument in arguments:
        if isinstance(argument, tuple):
            flat += [value for value in argument if value is not None]
            segments.append(tuple(int(value is not None) for value in argument))
        else:
            flat += [argument] if argument is not None else []
            segments.append(int(argument is not None))
    return tuple(flat), None if all(segment == 1 for segment in segments) else tuple(segments)


class Block:
    """A list of ops with arguments; the last op is the terminator (`func.return` or `moe.yield`)."""

    __slots__ = ("args", "ops", "parent")

    def __init__(self, arg_types: Iterable[Type] = (), names: Iterable[str] = ()) -> None:
        self.args: list[Value] = []
        self.ops: list[Op] = []
        self.parent: Op | Func | None = None
        names = list(names)
        for i, type in enumerate(arg_types):
            self.add_arg(type, names[i] if i < len(names) else "")

    def add_arg(self, type: Type, name: str = "") -> Value:
        value = Value(type, self, len(self.args), name)
        self.args.append(value)
        return value

    def remove_arg(self, value: Value) -> None:
        """Drop an unused argument. Raises: ValueError if it is used."""
        if value.users:
            raise ValueError(f"argument %{value.name} is still used")
        self.args.remove(value)
        for i, arg in enumerate(self.args):
            arg.index = i

    def append(self, op: Op) -> Op:
        op.block = self
        self.ops.append(op)
        return op

    def insert_before(self, anchor: Op, op: Op) -> Op:
        op.block = self
        self.ops.insert(self.ops.index(anchor), op)
        return op

    @property
    def terminator(self) -> Op:
        return self.ops[-1]

    def walk(self) -> Iterator[Op]:
        for op in list(self.ops):
            yield from op.walk()


class Func:
    """A function: a name, one block, and attributes for itself and for each argument and result.

    Argument attributes say where a value comes from: `{kind = "input"}`, `{kind = "param", source = "lm_head.weight"}`,
    `{kind = "buffer", source = ...}`, `{kind = "constant", source = ...}`; a buffer with `zeros = true` starts as zeros
    and is no part of the weights; `{kind = "derived", ...}` is computed of others (`sparsec.ir.derived`). Result
    attributes: `{kind = "output"}` or `{kind = "mutation", source = ...}` for the new value of a buffer.
    """

    __slots__ = ("arg_attrs", "attrs", "body", "loc", "name", "result_attrs")

    def __init__(self, name: str, body: Block, attrs: Mapping[str, Attr] | None = None, loc: Loc = UNKNOWN) -> None:
        self.name, self.body, self.loc = name, body, loc
        body.parent = self
        self.attrs: dict[str, Attr] = dict(attrs or {})
        self.arg_attrs: dict[Value, dict[str, Attr]] = {}
        self.result_attrs: dict[int, dict[str, Attr]] = {}

    @property
    def result_types(self) -> tuple[Type, ...]:
        return tuple(value.type for value in self.body.terminator.operands)


class Module:
    """Functions by name: `main` is the model, the others are kernels and what computes derived weights.

    Attributes say phase, version, target.
    """

    __slots__ = ("attrs", "funcs")

    def __init__(self, funcs: Iterable[Func] = (), attrs: Mapping[str, Attr] | None = None) -> None:
        self.funcs: dict[str, Func] = {func.name: func for func in funcs}
        self.attrs: dict[str, Attr] = dict(attrs or {})

    @property
    def main(self) -> Func:
        return self.funcs["main"]

    def walk(self) -> Iterator[Op]:
        for func in list(self.funcs.values()):
            yield from func.body.walk()
