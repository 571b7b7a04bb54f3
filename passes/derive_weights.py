"""Take what is computed from weights alone out of the model, to be computed once."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar

from sparsec.dialects.aten import AtenOp
from sparsec.dialects.builtin import Return
from sparsec.ir.core import Attr, Block, Func, Module, Op, Value
from sparsec.ir.derived import PREFIX, ROLE, is_derivation
from sparsec.ir.equal import Key, ValueMap, clone_op, func_key
from sparsec.ir.types import Sym, TensorType
from sparsec.passes.base import Pass, PassContext, register

_STORED = ("param", "constant", "buffer")


@register
@dataclass(frozen=True)
class DeriveWeights(Pass):
    """Make weights of `moe` ops that are computed from parameters alone (stacked experts, a transposed bank) arguments.

    Each such expression becomes a function, which equal layers share, and its result an argument of `main` of kind
    `derived` that names the function and what it is computed `of`. Operands of dense ops stay as they are.
    """

    name: ClassVar[str] = "derive-weights"

    def run(self, module: Module, ctx: PassContext) -> None:
        main = module.main
        taken = _Taken(module)
        for op in list(main.body.ops):
            for operand in dict.fromkeys(op.operands) if op.dialect == "moe" else ():
                if operand.op is not None and taken.is_fixed(operand):
                    taken.take(operand)
        if taken.count:
            _sweep(main, taken.dead)
            ctx.changed("weights derived", taken.count)


@dataclass
class _Taken:
    """What has been taken out of a module's `main`."""

    module: Module
    count: int = 0
    dead: set[Op] = field(default_factory=set[Op])
    fixed: dict[Value, bool] = field(default_factory=dict[Value, bool])

    def __post_init__(self) -> None:
        main, funcs = self.module.main, self.module.funcs
        changed = {str(a["source"]) for a in main.result_attrs.values() if a.get("kind") == "mutation"}
        for arg in main.body.args:
            attrs = main.arg_attrs.get(arg, {})
            stored = attrs.get("kind") in _STORED and not attrs.get("zeros") and str(attrs.get("source")) not in changed
            self.fixed[arg] = stored and _is_static(arg)
        self.sources = {str(attrs["source"]) for attrs in main.arg_attrs.values() if "source" in attrs}
        self.functions: dict[Key, str] = {func_key(f): name for name, f in funcs.items() if is_derivation(f)}

    def is_fixed(self, value: Value) -> bool:
        """Whether a value of `main` follows from weights alone."""
        stack = [value]
        while stack:
            last = stack[-1]
            op = last.op
            if last in self.fixed:
                stack.pop()
            elif op is None or not _may_move(op):
                self.fixed[stack.pop()] = False
            elif (unknown := next((v for v in op.operands if v not in self.fixed), None)) is not None:
                stack.append(unknown)
            else:
                self.fixed[stack.pop()] = all(self.fixed[operand] for operand in op.operands) and _is_static(last)
        return self.fixed[value]

    def take(self, value: Value) -> None:
        """Compute a value by a function of its own, and let an argument of `main` stand for it."""
        main, ops = self.module.main, _slice(value)
        self.dead.update(ops)
        leaves = list(dict.fromkeys(v for op in ops for v in op.operands if v.op is None))
        function = self._function(value, ops, leaves)
        of = tuple(str(main.arg_attrs[leaf]["source"]) for leaf in leaves)
        source = self._free(PREFIX + pattern(of))
        arg = main.body.add_arg(value.type, re.sub(r"\W+", ".", source))
        main.arg_attrs[arg] = {"kind": "derived", "source": source, "function": function, "of": of}
        self.fixed[arg] = True
        for user in list(value.users):
            user.operands = tuple(arg if operand is value else operand for operand in user.operands)
        self.count += 1

    def _function(self, value: Value, ops: list[Op], leaves: list[Value]) -> str:
        """The name of the function that computes `value` from `leaves`; one that is equal is used again."""
        body = Block([leaf.type for leaf in leaves], [leaf.name.rpartition(".")[2] for leaf in leaves])
        values: ValueMap = dict(zip(leaves, body.args, strict=True))
        for op in ops:
            body.append(clone_op(op, values))
        body.append(Return([values[value]]))
        func = Func("", body, {"role": ROLE})
        name = self.functions.setdefault(func_key(func), f"derive_{len(self.functions)}")
        if name not in self.module.funcs:
            func.name = name
            self.module.funcs[name] = func
        return name

    def _free(self, name: str) -> str:
        free, number = name, 1
        while free in self.sources:
            number += 1
            free = f"{name}#{number}"
        self.sources.add(free)
        return free


def _may_move(op: Op) -> bool:
    """Whether an op computes the same wherever and whenever it runs."""
    return isinstance(op, AtenOp) and op.pure and bool(op.operands) and not any(map(_is_open, op.attrs.values()))


def _is_open(attr: Attr) -> bool:
    return isinstance(attr, Sym) or (isinstance(attr, tuple) and any(map(_is_open, attr)))


def _is_static(value: Value) -> bool:
    return isinstance(value.type, TensorType) and all(isinstance(dim, int) for dim in value.type.shape)


def _slice(value: Value) -> list[Op]:
    """The ops behind a value, each after those whose results it reads."""
    done: dict[Op, None] = {}
    stack = [(value.op, False)]
    while stack:
        op, ready = stack.pop()
        if op is None or op in done:
            continue
        if ready:
            done[op] = None
        else:
            stack.append((op, True))
            stack += [(operand.op, False) for operand in reversed(op.operands)]
    return list(done)


def pattern(names: tuple[str, ...]) -> str:
    """Names as one, with `*` for the parts in which they differ: `layers.0.experts.*.up.weight`."""
    split = [name.split(".") for name in names]
    if len({len(parts) for parts in split}) > 1:
        shortest = min(map(len, split))
        split = [[*parts[:shortest], "*"] for parts in split]
    return ".".join(column[0] if len(set(column)) == 1 else "*" for column in zip(*split, strict=True))


def _sweep(main: Func, dead: set[Op]) -> None:
    """Remove what nothing reads any more: ops that were taken out, and the weights that only they read."""
    leaves = dict[Value, None]()
    for op in reversed(main.body.ops):
        if op in dead and not any(result.users for result in op.results):
            leaves |= dict.fromkeys(operand for operand in op.operands if operand.op is None)
            op.operands = ()
            op.block = None
    main.body.ops = [op for op in main.body.ops if op.block is not None]
    unread = {leaf for leaf in leaves if not leaf.users}
    main.body.args = [arg for arg in main.body.args if arg not in unread]
    for i, arg in enumerate(main.body.args):
        arg.index = i
    for leaf in unread:
        del main.arg_attrs[leaf]
