"""Take what is computed from weights alone out of the model, to be computed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsec.ir.core import Module
from sparsec.passes.base import Pass, PassContext, register
from sparsec.passes.derivations import Deriver


@register
@dataclass(frozen=True)
class DeriveWeights(Pass):
    """Make weights of `moe` ops that are computed from parameters alone (stacked experts, a transposed bank) arguments.

    Each such expression becomes a function, which equal layers share, and its result an argument of `main` of kind
    `derived` that names the function and what it is computed `of`. Operands of dense ops stay as they are.
    """

    name: ClassVar[str] = "derive-weights"

    def run(self, module: Module, ctx: PassContext) -> None:
        deriver = Deriver(module)
        for op in list(module.main.body.ops):
            for operand in dict.fromkeys(op.operands) if op.dialect == "moe" else ():
                if operand.op is not None and deriver.is_fixed(operand):
                    deriver.take(operand)
        if deriver.count:
            deriver.sweep()
            ctx.changed("weights derived", deriver.count)
