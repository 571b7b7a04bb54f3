"""Dead code elimination."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsec.ir.core import Block, Module
from sparsec.ir.opdef import OpDef
from sparsec.passes.base import Pass, PassContext, register


@register
@dataclass(frozen=True)
class DeadCodeElimination(Pass):
    """Remove pure ops whose results nobody reads, and buffers that no launch writes."""

    name: ClassVar[str] = "dce"

    def run(self, module: Module, ctx: PassContext) -> None:
        for func in module.funcs.values():
            ctx.changed("dead ops", _sweep(func.body))


def _sweep(block: Block) -> int:
    removed = 0
    for op in reversed(block.ops):
        removed += sum(_sweep(region) for region in op.regions)
        pure = isinstance(op, OpDef) and op.pure
        if (pure or op.name == "kernel.alloc") and not any(result.users for result in op.results):
            for inner in op.walk():
                inner.operands = ()
            op.block = None
            removed += 1
    if removed:
        block.ops = [op for op in block.ops if op.block is not None]
    return removed
