"""A module of the IR, of any phase, as the record that `sparsec.inspect.dataflow` reads.

One that is placed on several devices is recorded as the whole model: banks have all experts, and tokens do not travel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

import torch

from sparsec.dialects.dtypes import to_torch
from sparsec.dialects.kernel import Launch
from sparsec.dialects.moe import ExpertBank, GatherGemm, GemmCombine, Layer, bytes_of
from sparsec.frontend.blocks import Call, Family, Record
from sparsec.frontend.blocks import Value as Seen
from sparsec.inspect.dataflow import innermost
from sparsec.ir.core import Func, Module, Op, Value
from sparsec.ir.derived import derivations, leaves_of, placement_tables
from sparsec.ir.types import Sym, TensorType, evaluate, symbols

_LENGTH = 7  # stands for every size that is not fixed, but for the batch


def record_module(module: Module) -> Record:
    """Operators of `main`, with kernels in the place of their launches, and the layers that their scopes tell of."""
    return _Reader(module).record


class _Reader:
    def __init__(self, module: Module) -> None:
        self.module, self.record = module, Record()
        self.sizes = dict[str, int]()
        self.members = dict[str, Family]()
        self.sent = dict[Value, tuple[Seen, ...]]()
        main = module.main
        self._fix_sizes(main)
        args, packed, spread = dict[Value, Seen](), _packed(module), _spread(module)
        for arg in main.body.args:
            attrs = main.arg_attrs.get(arg, {})
            kind, source = attrs.get("kind", "input"), str(attrs.get("source", ""))
            weight = kind in ("param", "derived")
            if arg in packed:
                args[arg] = replace(packed[arg], param=source if packed[arg].shape else "")
            else:
                args[arg] = self._seen(arg, param=source if weight else "", input=kind == "input")
            if arg in spread:
                args[arg] = _whole(args[arg], spread[arg], arg)
            if args[arg].param:
                self.record.parameters[source] = args[arg]
        results = self._read(main, args, "")
        self.record.returned = set(results)
        self.record.families = list(self.members.values())

    def _fix_sizes(self, main: Func) -> None:
        """One sequence of a few tokens: the leading size of ids [B, S] and of features [B, S, H] is the batch."""
        for arg in main.body.args:
            if main.arg_attrs.get(arg, {}).get("kind", "input") != "input" or not isinstance(arg.type, TensorType):
                continue
            shape, first = arg.type.shape, not self.sizes
            rows = len(shape) - arg.type.dtype.is_float
            for i, dim in enumerate(shape):
                for name in symbols(dim):
                    self.sizes.setdefault(name, 1 if i == 0 and rows > 1 else _LENGTH)
            if first and shape:
                sizes = [self._size(dim) for dim in (shape[:-1] if arg.type.dtype.is_float else shape)]
                self.record.tokens, self.record.batch = torch.Size(sizes).numel(), self._size(shape[0])

    def _size(self, dim: int | Sym) -> int:
        return evaluate(dim, self.sizes | {name: _LENGTH for name in symbols(dim) if name not in self.sizes})

    def _seen(self, value: Value, param: str = "", input: bool = False) -> Seen:
        if not isinstance(value.type, TensorType):
            return Seen((), torch.int64, param, input)
        return Seen(tuple(map(self._size, value.type.shape)), to_torch(value.type.dtype), param, input)

    def _read(self, func: Func, values: dict[Value, Seen], scope: str) -> list[Seen]:
        """Note the ops of a function; a kernel's run in the scope of its launch."""
        for op in func.body.ops[:-1]:
            place = scope or innermost(*(loc.scope for loc in (op.loc, *op.loc.origins) if loc.scope))
            self._enter(place)
            if isinstance(op, Launch):
                inputs = [values[value] for value in dict.fromkeys(v for v in op.inputs if v is not None)]
                callee = self.module.funcs[op.callee]
                inner = self._read(callee, dict(zip(callee.body.args, inputs, strict=True)), place)
                values |= zip(op.results, inner, strict=True)
            elif op.dialect == "dist":
                values |= zip(op.results, self._travelled(op, values), strict=True)
            else:
                values |= {result: self._seen(result) for result in op.results}
                self.record.calls += self._calls(op, values, place)
        return [values[value] for value in func.body.terminator.operands]

    def _travelled(self, op: Op, values: dict[Value, Seen]) -> tuple[Seen, ...]:
        """What an op on several devices gives where tokens do not travel: what it was given."""
        given = [values[value] for value in op.operands]
        if op.name in ("dist.remap", "dist.local"):
            return (given[0],)
        if op.name in ("dist.dispatch_wait", "dist.combine_wait"):
            return self.sent[op.operands[0]]
        self.sent[op.results[0]] = tuple(given[:3] if op.name == "dist.dispatch_start" else given[:1])
        return (self._seen(op.results[0]),)

    def _calls(self, op: Op, values: dict[Value, Seen], scope: str) -> Iterator[Call]:
        """An op as calls: one, but for a layer its route and its experts."""
        dialect, packet, *_ = op.name.split(".")
        attrs = dict(op.attrs)
        if dialect == "moe" and isinstance(k := getattr(op, "k", None), int):
            attrs["k"] = k
        if isinstance(op, Layer):
            chosen = (op.ids, op.weights)
            banks = [value for value in op.bank_operands() if value is not None]
            parts: list[tuple[str, Sequence[Value], Sequence[Value]]] = [
                ("route", (op.logits, *op.router_params), (*chosen, *op.extras)),
                ("experts", (op.x, *chosen, *banks, *op.tail_params), (op.y,)),
            ]
        else:
            parts = [(packet, op.operands, op.results)]
        for name, reads, makes in parts:
            operands, results = tuple(map(values.__getitem__, reads)), tuple(map(values.__getitem__, makes))
            yield Call(f"{dialect}.{name}", scope, operands, attrs, results, is_view=_is_view(op.name))

    def _enter(self, scope: str) -> None:
        """A numbered part of a scope is a member of a container."""
        for container, member in _members(scope):
            if member not in self.members:
                family = self.members[member] = Family(container, (member,))
                self.record.calls.append(Call("block", member, (), {}, (), family=family))


def _spread(module: Module) -> dict[Value, int]:
    """The arguments of `main` that are a rank's part of a bank, and how many experts there are in all."""
    tables, made = placement_tables(module), derivations(module)
    found = dict[Value, int]()
    for arg, attrs in module.main.arg_attrs.items():
        leaves = leaves_of(str(attrs.get("source")), made) if attrs.get("kind") == "derived" else ()
        if (table := next((tables[leaf] for leaf in leaves if leaf in tables), None)) is not None:
            found[arg] = table.experts
    return found


def _whole(part: Seen, experts: int, arg: Value) -> Seen:
    """A bank of all experts, of which `part` is what one rank holds."""
    if not part.shape:
        return part
    slots = arg.tensor.shape[0]
    assert isinstance(slots, int)
    stored = None if part.stored is None else part.stored // slots * experts
    return replace(part, shape=(experts, *part.shape[1:]), stored=stored)


def _packed(module: Module) -> dict[Value, Seen]:
    """Packed banks among the arguments of `main`, as they were before; scales count as bytes of their bank."""
    found = dict[Value, Seen]()
    for op in module.main.body.ops:
        values, inner = dict[Value, Value](), op
        if isinstance(op, Launch):
            body = module.funcs[op.callee].body
            given = dict.fromkeys(value for value in op.inputs if value is not None)
            values, inner = dict(zip(body.args, given, strict=True)), body.ops[0]
        if not isinstance(inner, ExpertBank | GatherGemm | GemmCombine) or inner.packing == "plain":
            continue
        for name, shape in inner.plain_shapes().items():
            bank: Value | None = getattr(inner, name)
            scale: Value | None = getattr(inner, f"{name}_scale", None)
            if bank is None:
                continue
            parts = [part for part in (bank, scale) if part is not None]
            stored = sum(bytes_of(part.type, {}) for part in parts)
            narrow = inner.packing in ("int4", "mxfp4") and scale is not None
            dtype = getattr(torch, "int4", torch.uint8) if narrow else to_torch(bank.tensor.dtype)
            found[values.get(bank, bank)] = Seen(shape, dtype, stored=stored)
            if scale is not None:
                found[values.get(scale, scale)] = Seen((), torch.float32)
    return found


def _members(scope: str) -> Iterator[tuple[str, str]]:
    parts = scope.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal() and i:
            yield ".".join(parts[:i]), ".".join(parts[: i + 1])


@cache
def _is_view(name: str) -> bool:
    """Whether torch's schema of an `aten` op says that its result shares memory with an operand."""
    dialect, packet, *overload = name.split(".")
    op = getattr(torch.ops.aten, packet, None) if dialect == "aten" else None
    return op is not None and getattr(op, overload[0] if overload else "default").is_view
