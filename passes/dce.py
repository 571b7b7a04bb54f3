"""Dead code elimination."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from sparsec.ir.core import Block, Module
from sparsec.ir.opdef import OpDef
from sparsec.ir.types import SymType, TensorType
from sparsec.passes.base import Pass, PassContext, register

_NAME = re.compile(r"[su]\d+")


@register
@dataclass(frozen=True)
class DeadCodeElimination(Pass):
    """Remove pure ops whose results nobody reads, and buffers that no launch writes.

    A size that is known at run time (`aten.item`) is read where a type or an attribute names it.
    """

    name: ClassVar[str] = "dce"

    def run(self, module: Module, ctx: PassContext) -> None:
        for func in module.funcs.values():
            ctx.changed("dead ops", _sweep(func.body))


def _sweep(block: Block) -> int:
    removed, sizes = 0, _sizes_read(block)
    for op in reversed(block.ops):
        removed += sum(_sweep(region) for region in op.regions)
        pure = isinstance(op, OpDef) and op.pure
        if (pure or op.name == "kernel.alloc") and not any(
            result.users or (isinstance(result.type, SymType) and result.type.expr in sizes) for result in op.results
        ):
            for inner in op.walk():
                inner.operands = ()
            op.block = None
            removed += 1
    if removed:
        block.ops = [op for op in block.ops if op.block is not None]
    return removed


def _sizes_read(block: Block) -> set[str]:
    """The names of sizes that the types and attributes of ops mention, where an op defines sizes."""
    if not any(isinstance(result.type, SymType) for op in block.ops for result in op.results):
        return set()
    found = set[str]()
    for op in block.walk():
        types = [result.type for result in op.results if isinstance(result.type, TensorType)]
        for item in (*types, *op.attrs.values()):
            found |= set(_NAME.findall(str(item)))
    return found
