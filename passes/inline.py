"""Put the body of each called function in the place of its calls."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from sparsec.dialects.builtin import Call
from sparsec.ir.core import Attr, Block, Func, Module, Op
from sparsec.ir.equal import ValueMap, clone_op
from sparsec.ir.types import Dim, HandleType, Sym, SymType, TensorType, Type, dims_of, evaluate, symbols
from sparsec.passes.base import Pass, PassContext, register

_UNBACKED = re.compile(r"\bu(\d+)\b")


@register
@dataclass(frozen=True)
class Inline(Pass):
    """Replace every `moe.call` by the body of the function that it calls, and drop functions that nobody calls then.

    Blocks that a model repeats are captured once; running after `raise-experts`, this pass copies what has become of
    them into every layer, under the layer's own module path.
    """

    name: ClassVar[str] = "inline"

    def run(self, module: Module, ctx: PassContext) -> None:
        block, ops, called = module.main.body, list[Op](), dict[str, int]()
        fresh = 1 + max((n for op in block.ops for value in op.results for n in _unbacked(value.type)), default=-1)
        for op in block.ops:
            if not isinstance(op, Call):
                ops.append(op)
                continue
            callee = module.funcs[op.callee]
            called[callee.name] = called.get(callee.name, 0) + 1
            body, fresh = _body(callee, op, block, fresh)
            ops += body
        block.ops = ops
        for name, count in called.items():
            del module.funcs[name]
            ctx.changed(f"calls of {name}", count)


def _body(callee: Func, call: Call, block: Block, fresh: int) -> tuple[list[Op], int]:
    """Copies of a function's ops for one call, and the next free number for a size that depends on data."""
    sizes: dict[str, Dim] = {}
    values: ValueMap = dict(zip(callee.body.args, call.operands, strict=True))
    for arg, given in values.items():
        if isinstance(arg.type, TensorType) and isinstance(given.type, TensorType):
            for dim, size in zip(arg.type.shape, given.type.shape, strict=True):
                if isinstance(dim, Sym) and dim.isidentifier():
                    sizes.setdefault(dim, size)
    unbacked = {n for op in callee.body.ops for value in op.results for n in _unbacked(value.type)}
    for n in sorted(unbacked):
        sizes[f"u{n}"], fresh = Sym(f"u{fresh}"), fresh + 1

    def map_type(type: Type) -> Type:
        if isinstance(type, SymType):
            moved = with_sizes(type.expr, sizes)
            return SymType(moved if isinstance(moved, Sym) else Sym(str(moved)))
        if isinstance(type, HandleType):
            return type
        return TensorType(tuple(with_sizes(dim, sizes) for dim in type.shape), type.dtype)

    def map_attr(value: Attr) -> Attr:
        if isinstance(value, Sym):
            return with_sizes(value, sizes)
        return tuple(map(map_attr, value)) if isinstance(value, tuple) else value

    scope, body = str(callee.attrs.get("scope", "")), list[Op]()
    for op in callee.body.ops[:-1]:
        copy = clone_op(op, values, map_type, map_attr)
        for inner in copy.walk():
            inner.loc = inner.loc.within(call.loc.scope, scope)
        copy.block = block
        body.append(copy)
    for result, returned in zip(call.results, callee.body.terminator.operands, strict=True):
        result.replace_by(values[returned])
    call.operands, call.block = (), None
    return body, fresh


def with_sizes(dim: Dim, sizes: Mapping[str, Dim]) -> Dim:
    """`dim` with a size for every symbol in it that has one: `2*s0` with `s0 -> s1*s2` is `2*(s1*s2)`."""
    if isinstance(dim, int):
        return dim
    if (known := sizes.get(dim)) is not None:
        return known
    return _replaced(dim, tuple(sorted((name, size) for name, size in sizes.items() if name in dim)))


@cache
def _replaced(dim: Sym, sizes: tuple[tuple[str, Dim], ...]) -> Dim:
    known = dict(sizes)

    class Names(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return ast.parse(str(known[node.id]), mode="eval").body if node.id in known else node

    tree = Names().visit(ast.parse(dim, mode="eval"))
    replaced = Sym(ast.unparse(tree).replace(" ", ""))
    return replaced if any(symbols(replaced)) else evaluate(replaced, {})


def _unbacked(type: Type) -> list[int]:
    return [int(n) for dim in dims_of(type) if isinstance(dim, Sym) for n in _UNBACKED.findall(dim)]
