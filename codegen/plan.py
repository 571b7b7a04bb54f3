"""IR ops as steps of a runtime plan: slots, argument trees, liveness. Knows nothing about kernels' code."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sparsec.dialects.aten import AtenOp, is_tensor, overload
from sparsec.ir.core import Argument, Attr, Block, Op, Value
from sparsec.ir.opdef import OpDef
from sparsec.ir.types import DType, Sym, SymType, TensorType, dims_of
from sparsec.ir.verify import is_unbacked
from sparsec.runtime.plan import Call, Exchange, Free, Json, Launch, Step, Tensor

_VIEWS = (
    "alias chunk detach diagonal expand narrow permute reshape select slice split split_with_sizes squeeze t "
    "transpose unbind unflatten unfold unsqueeze view view_as"
)
VIEWS = frozenset(_VIEWS.split())
"""Operators whose results may share their operand's memory."""


class Slots:
    """Numbers the values of one block and turns its ops into steps."""

    def __init__(self, kept: Iterable[Value] = ()) -> None:
        """`kept` values are never freed (parameters, buffers)."""
        self.of: dict[Value, int] = {}
        self.steps: list[Step] = []
        self._kept = set(kept)

    def define(self, value: Value) -> int:
        """The slot of a new value."""
        return self.of.setdefault(value, len(self.of))

    def emit(self, block: Block, in_place: Mapping[Op, Value] | None = None) -> None:
        """Turn every op of `block` but the terminator into steps, and free each value after its last use.

        Args:
            in_place: ops that may write the result over this buffer, their first operand.
        """
        last = _last_uses(block)
        for op in block.ops[:-1]:
            if op.name == "kernel.alloc":
                continue
            if op.name == "kernel.launch":
                self._launch(op)
            elif op.dialect == "dist":
                self._exchange(op)
            else:
                assert isinstance(op, AtenOp), op.name
                self._call(op, in_place is not None and op in in_place)
            dying = {*op.operands, *op.results} - self._kept
            free = sorted(self.of[value] for value in dying if value in self.of and last.get(value, op) is op)
            if free:
                self.steps.append(Free(free))

    def _launch(self, op: Any) -> None:
        ins = [None if value is None else self.of[value] for value in op.inputs]
        self.steps.append(Launch(op.callee, ins, [self.define(value) for value in op.results]))

    def _exchange(self, op: Op) -> None:
        name: Any = op.name.partition(".")[2]
        ins = [self.of[value] for value in op.operands]
        types = [tensor(value.type) if isinstance(value.type, TensorType) else None for value in op.operands]
        assert isinstance(op, OpDef)
        attrs = constants({**op.fields().defaults, **op.attrs})
        outs = [self.define(value) for value in op.results]
        self.steps.append(Exchange(name, attrs, ins, outs, types, self._binds(op)))

    def _call(self, op: AtenOp, in_place: bool) -> None:
        target = op.target
        positional, keywords = list[Json](), dict[str, Json]()
        order = [param.name for param in target._schema.arguments if not param.kwarg_only]
        for param, given in op.bound():
            tree = self._operand(given) if is_tensor(param) else attribute(given)  # type: ignore[arg-type]
            if len(positional) < len(order) and order[len(positional)] == param.name:
                positional.append(tree)
            else:
                keywords[param.name] = tree
        for param in target._schema.arguments:
            # A factory creates where the program runs; all others follow their operands.
            if param.name == "device" and (not op.operands or not param.has_default_value()):
                keywords["device"] = {"device": True}
        name = _full_name(op.name)
        if in_place:
            base, _, variant = name.rpartition(".")
            name = f"{base}_.{variant}"
        outs: list[int | None] = [self.define(value) for value in op.results]
        self.steps.append(Call(name, positional, keywords, outs, self._binds(op)))

    def _operand(self, given: Argument | Attr) -> Json:
        if isinstance(given, Value):
            return {"slot": self.of[given]}
        if isinstance(given, tuple):
            return [self._operand(item) for item in given]
        return None

    def _binds(self, op: Op) -> list[tuple[int, int, str]]:
        """The symbols that a result gives a value to: those of the kind that no input's shape decides (`u0`)."""
        binds = list[tuple[int, int, str]]()
        for value in op.results:
            if isinstance(value.type, SymType):
                dims = [(-1, value.type.expr)]
            else:
                dims = [(axis, dim) for axis, dim in enumerate(dims_of(value.type)) if isinstance(dim, Sym)]
            binds += [(self.of[value], axis, str(dim)) for axis, dim in dims if is_unbacked(dim)]
        return binds


def tensor(type: TensorType) -> Tensor:
    """A tensor type as a plan holds it."""
    return Tensor(tuple(str(dim) if isinstance(dim, Sym) else dim for dim in type.shape), type.dtype.value)


def attribute(attr: Attr) -> Json:
    """An attribute as an argument tree."""
    if isinstance(attr, Sym):
        return {"dim": str(attr)}
    if isinstance(attr, DType):
        return {"dtype": attr.value}
    if isinstance(attr, float) and not math.isfinite(attr):
        return {"float": str(attr)}
    if isinstance(attr, list | tuple):
        return [attribute(item) for item in attr]
    return attr


def constants(attrs: Mapping[str, Attr], but: Sequence[str] = ()) -> dict[str, Json]:
    """An op's attributes as plain JSON for a kernel entry."""
    return {name: _plain(attr) for name, attr in attrs.items() if name not in but}


def _plain(attr: Attr) -> Json:
    if isinstance(attr, DType):
        return attr.value
    if isinstance(attr, Sym):
        return str(attr)
    if isinstance(attr, Mapping):
        return {str(name): _plain(item) for name, item in attr.items()}
    if isinstance(attr, list | tuple):
        return [_plain(item) for item in attr]
    return attr


def _full_name(name: str) -> str:
    """`aten.linear` -> `aten.linear.default`; `torch.mylib.op.out` -> `mylib.op.out`."""
    parts = name.split(".")
    parts = parts[1:] if parts[0] == "torch" else parts
    return ".".join(parts if len(parts) == 3 else [*parts, "default"])


def _last_uses(block: Block) -> dict[Value, Op]:
    return {operand: op for op in block.ops for operand in op.operands}


def in_place_updates(block: Block, updates: Mapping[Value, Value]) -> dict[Op, Value]:
    """Ops that may write a buffer's new value over the old one.

    Args:
        updates: buffer (an argument of the block) -> its new value.

    Returns: op -> buffer, where the op makes the new value out of the buffer, torch has its in-place form, and nothing
        reads the buffer's old value at or after it.
    """
    position = {op: i for i, op in enumerate(block.ops)}
    found = dict[Op, Value]()
    for buffer, new in updates.items():
        op = new.op
        if op is None or not isinstance(op, AtenOp) or op.operands[:1] != (buffer,):
            continue
        base, _, variant = _full_name(op.name).rpartition(".")
        if overload(f"{base}_.{variant}") is None or new.type != buffer.type or op.operands.count(buffer) != 1:
            continue
        readers = _readers(buffer) - {op}
        if all(reader.block is block and position[reader] < position[op] for reader in readers):
            found[op] = buffer
    return found


def _readers(value: Value) -> set[Op]:
    """Every op that may read the memory of `value`, through views too."""
    readers, queue = set[Op](), [value]
    while queue:
        for user in queue.pop().users:
            if user not in readers:
                readers.add(user)
                if user.name.split(".")[1] in VIEWS:
                    queue += user.results
    return readers
