"""Write a pass, run it on a module written by hand, and check that it keeps what the module computes.

    python examples/add_a_pass.py

The pass finds `x + (-y)` and makes it `x - y`, which is the same to the bit. Three things are worth seeing: the rule
gets an op and says whether it changed anything; where it matches its root but declines, it leaves a remark with the
user's line; and it neither sets locations nor verifies nor prints, because the pass manager does that for every pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsec.inspect.dump import diff
from sparsec.ir.core import Module, Op
from sparsec.ir.interp import evaluate_module
from sparsec.ir.parser import parse_module
from sparsec.ir.printer import print_module
from sparsec.ir.rewrite import Rewriter, rule
from sparsec.passes.base import Pass, PassContext, register
from sparsec.pipeline import run_passes

TEXT = """
module {phase = "capture", version = 1}

func @main(%x: tensor<s0x8xf32> {kind = "input"}, %y: tensor<s0x8xf32> {kind = "input"})
    -> (tensor<s0x8xf32> {kind = "output"}) {
  loc "model.py":10 in "norm"  // centred = x + -y
  %minus_y = aten.neg(%y) : tensor<s0x8xf32>
  %centred = aten.add.Tensor(%x, %minus_y) : tensor<s0x8xf32>
  loc "model.py":11 in "norm"  // mirrored = -centred
  %mirrored = aten.neg(%centred) : tensor<s0x8xf32>
  loc "model.py":12 in "norm"  // return (y + mirrored) * mirrored
  %sum = aten.add.Tensor(%y, %mirrored) : tensor<s0x8xf32>
  %out = aten.mul.Tensor(%sum, %mirrored) : tensor<s0x8xf32>
  return %out
}
"""


@register
@dataclass(frozen=True)
class FoldNegation(Pass):
    """Make `x + (-y)` one `aten.sub.Tensor`, where nothing else reads the negation."""

    name: ClassVar[str] = "fold-negation"

    def run(self, module: Module, ctx: PassContext) -> None:
        @rule("aten.add.Tensor")
        def add_of_negation(op: Op, rw: Rewriter) -> bool:
            if "alpha" in op.attrs:
                return False
            for x, negation in (op.operands, op.operands[::-1]):
                if negation.op is None or negation.op.name != "aten.neg":
                    continue
                if len(negation.users) > 1:
                    ctx.missed(op, why=f"%{negation.name} has another reader, so subtracting would save nothing")
                    continue
                rw.replace_op(op, "aten.sub.Tensor", [x, negation.op.operands[0]])
                return True
            return False

        ctx.rewrite(module, [add_of_negation])


def main() -> None:
    """Run the pass, show what it changed and what it declined, and compare the results."""
    module = parse_module(TEXT, "example.sparsec")
    inputs = [torch.linspace(-4, 4, 24).reshape(3, 8), torch.ones(3, 8)]
    before, text = evaluate_module(module, inputs, {}), print_module(module)
    result = run_passes(module, "fold-negation,dce")
    after = evaluate_module(module, inputs, {})
    print(diff(text, print_module(module), "before", "after fold-negation"))
    for remark in result.remarks:
        print(f"{remark.loc}: {remark.message}")
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    print("same results before and after")


if __name__ == "__main__":
    main()
