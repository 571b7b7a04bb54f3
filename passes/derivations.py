"""What of `main` follows from weights alone, and how it becomes a derived weight (`sparsec.ir.derived`)."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field

from sparsec.dialects.aten import AtenOp
from sparsec.dialects.builtin import Return
from sparsec.dialects.dist import Local
from sparsec.dialects.moe import Pack, PackBias, Scales
from sparsec.ir.core import Attr, Block, Func, Module, Op, Value
from sparsec.ir.derived import PLACEMENT, PREFIX, ROLE, Derivation, derivations, is_derivation
from sparsec.ir.equal import Key, ValueMap, clone_op, func_key
from sparsec.ir.types import Sym, TensorType
from sparsec.passes.row_slice import in_order

_STORED = ("param", "constant", "buffer", "derived")


@dataclass
class Deriver:
    """Takes values out of a module's `main` that follow from weights alone.

    Attributes:
        module: the module.
        count: how many values were taken out.
    """

    module: Module
    count: int = 0
    _dead: set[Op] = field(default_factory=set[Op])
    _replaced: set[Value] = field(default_factory=set[Value])
    _fixed: dict[Value, bool] = field(default_factory=dict[Value, bool])

    def __post_init__(self) -> None:
        main, funcs = self.module.main, self.module.funcs
        changed = {str(a["source"]) for a in main.result_attrs.values() if a.get("kind") == "mutation"}
        for arg in main.body.args:
            attrs = main.arg_attrs.get(arg, {})
            stored = attrs.get("kind") in _STORED and not attrs.get("zeros") and str(attrs.get("source")) not in changed
            self._fixed[arg] = stored and _is_static(arg)
        self._sources = {str(attrs["source"]) for attrs in main.arg_attrs.values() if "source" in attrs}
        self._functions: dict[Key, str] = {func_key(f): name for name, f in funcs.items() if is_derivation(f)}
        self._made = derivations(self.module)

    def is_fixed(self, value: Value) -> bool:
        """Whether a value of `main` follows from weights alone."""
        stack = [value]
        while stack:
            last = stack[-1]
            op = last.op
            if last in self._fixed:
                stack.pop()
            elif op is None or not _may_move(op):
                self._fixed[stack.pop()] = False
            elif (unknown := next((v for v in op.operands if v not in self._fixed), None)) is not None:
                stack.append(unknown)
            else:
                self._fixed[stack.pop()] = all(self._fixed[operand] for operand in op.operands) and _is_static(last)
        return self._fixed[value]

    def take(self, value: Value, ending: str = "", keep: Collection[Value] = ()) -> Value:
        """Compute a fixed value by a function of its own, and let an argument of `main` stand for it.

        Derived weights that it is computed of are computed in that function too.

        Args:
            ending: of the name of the weight.
            keep: derived weights that are read as they are instead.
        """
        main, ops = self.module.main, in_order([value])
        self._dead.update(ops)
        leaves = list(dict.fromkeys(v for op in ops for v in op.operands if v.op is None))
        self._replaced.update(leaves)
        function, of = self._function(value, ops, leaves, keep)
        named = tuple(name for name in of if name not in self._made and not name.startswith(PLACEMENT))
        source = self._free(PREFIX + pattern(named) + ending)
        arg = main.body.add_arg(value.type, re.sub(r"\W+", ".", source))
        main.arg_attrs[arg] = {"kind": "derived", "source": source, "function": function, "of": of}
        self._made[source] = Derivation(self.module.funcs[function], of)
        self._fixed[arg] = True
        for user in list(value.users):
            user.operands = tuple(arg if operand is value else operand for operand in user.operands)
        self.count += 1
        return arg

    def sweep(self) -> None:
        """Remove what nothing reads any more: ops that were taken out, weights that only they read, functions."""
        main = self.module.main
        for op in reversed(main.body.ops):
            if op in self._dead and not any(result.users for result in op.results):
                op.operands = ()
                op.block = None
        main.body.ops = [op for op in main.body.ops if op.block is not None]
        unread = {value for value in self._replaced if not value.users}
        main.body.args = [arg for arg in main.body.args if arg not in unread]
        for i, arg in enumerate(main.body.args):
            arg.index = i
        for value in unread:
            del main.arg_attrs[value]
        named = {str(attrs.get("function")) for attrs in main.arg_attrs.values()}
        for name in [name for name, func in self.module.funcs.items() if is_derivation(func) and name not in named]:
            del self.module.funcs[name]

    def _function(
        self, value: Value, ops: list[Op], leaves: list[Value], keep: Collection[Value]
    ) -> tuple[str, tuple[str, ...]]:
        """The name of a function that computes `value`, and of what; one that is equal is used again."""
        main = self.module.main
        sources = [str(main.arg_attrs[leaf]["source"]) for leaf in leaves]
        inner = {
            leaf: self._made[source]
            for leaf, source in zip(leaves, sources, strict=True)
            if source in self._made and leaf not in keep
        }
        takes = dict[str, Value]()  # source -> a value of its type and name
        for leaf, source in zip(leaves, sources, strict=True):
            if leaf in inner:
                for name, arg in zip(inner[leaf].of, inner[leaf].func.body.args, strict=True):
                    takes.setdefault(name, arg)
            else:
                takes.setdefault(source, leaf)
        body = Block([v.type for v in takes.values()], [v.name.rpartition(".")[2] for v in takes.values()])
        args = dict(zip(takes, body.args, strict=True))
        values: ValueMap = {leaf: args[s] for leaf, s in zip(leaves, sources, strict=True) if leaf not in inner}
        for leaf, made in inner.items():
            within: ValueMap = {arg: args[name] for name, arg in zip(made.of, made.func.body.args, strict=True)}
            for op in made.func.body.ops[:-1]:
                body.append(clone_op(op, within))
            (result,) = made.func.body.terminator.operands
            values[leaf] = within[result]
        for op in ops:
            body.append(clone_op(op, values))
        body.append(Return([values[value]]))
        func = Func("", body, {"role": ROLE})
        key = func_key(func)
        if key not in self._functions:
            func.name = self._functions[key] = self._free_function()
            self.module.funcs[func.name] = func
        return self._functions[key], tuple(takes)

    def _free_function(self) -> str:
        number = len(self._functions)
        while f"derive_{number}" in self.module.funcs:
            number += 1
        return f"derive_{number}"

    def _free(self, name: str) -> str:
        free, number = name, 1
        while free in self._sources:
            number += 1
            free = f"{name}#{number}"
        self._sources.add(free)
        return free


def _may_move(op: Op) -> bool:
    """Whether an op computes the same wherever and whenever it runs."""
    if isinstance(op, Pack | PackBias | Scales | Local):
        return True
    return isinstance(op, AtenOp) and op.pure and bool(op.operands) and not any(map(_is_open, op.attrs.values()))


def _is_open(attr: Attr) -> bool:
    return isinstance(attr, Sym) or (isinstance(attr, tuple) and any(map(_is_open, attr)))


def _is_static(value: Value) -> bool:
    return isinstance(value.type, TensorType) and all(isinstance(dim, int) for dim in value.type.shape)


def pattern(names: tuple[str, ...]) -> str:
    """Names as one, with `*` for the parts in which they differ: `layers.0.experts.*.up.weight`."""
    split = [name.split(".") for name in names]
    if len({len(parts) for parts in split}) > 1:
        shortest = min(map(len, split))
        split = [[*parts[:shortest], "*"] for parts in split]
    return ".".join(column[0] if len(set(column)) == 1 else "*" for column in zip(*split, strict=True))
