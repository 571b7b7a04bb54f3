"""Common subexpression elimination."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsec.ir.core import Block, Module, Op, Value
from sparsec.ir.equal import Key, op_key
from sparsec.ir.opdef import OpDef
from sparsec.passes.base import Pass, PassContext, register


@register
@dataclass(frozen=True)
class CommonSubexpressions(Pass):
    """Compute each pure expression of a block once; the first op stays, with its own location."""

    name: ClassVar[str] = "cse"

    def run(self, module: Module, ctx: PassContext) -> None:
        for func in module.funcs.values():
            ctx.changed("repeated ops", _sweep(func.body))


def _sweep(block: Block) -> int:
    numbers: dict[Value, int] = {arg: i for i, arg in enumerate(block.args)}
    seen: dict[Key, Op] = {}
    removed = 0
    for op in block.ops:
        removed += sum(_sweep(region) for region in op.regions)
        if isinstance(op, OpDef) and op.pure:
            first = seen.setdefault(op_key(op, numbers), op)
            if first is not op:
                for result, kept in zip(op.results, first.results, strict=True):
                    result.replace_by(kept)
                for inner in op.walk():
                    inner.operands = ()
                op.block = None
                removed += 1
                continue
        for result in op.results:
            numbers[result] = len(numbers)
    if removed:
        block.ops = [op for op in block.ops if op.block is not None]
    return removed
