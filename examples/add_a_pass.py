"""Write a pass, run it on a module written by hand, and check that it keeps what the module computes.

    python examples/add_a_pass.py

The pass finds `x * sigmoid(x)` and makes it `silu(x)`. Three things are worth seeing: the rule gets an op and says
whether it changed anything; where it matches its root but declines, it leaves a remark with the user's line; and it
neither sets locations nor verifies nor prints, because the pass manager does that for every pass.
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
  loc "model.py":10 in "mlp"  // gate = torch.sigmoid(x)
  %gate = aten.sigmoid(%x) : tensor<s0x8xf32>
  loc "model.py":11 in "mlp"  // h = gate * x
  %h = aten.mul.Tensor(%gate, %x) : tensor<s0x8xf32>
  loc "model.py":12 in "mlp"  // return h * torch.sigmoid(y)
  %other = aten.sigmoid(%y) : tensor<s0x8xf32>
  %out = aten.mul.Tensor(%h, %other) : tensor<s0x8xf32>
  return %out
}
"""


@register
@dataclass(frozen=True)
class RecognizeSilu(Pass):
    """Make `x * sigmoid(x)` one `aten.silu`."""

    name: ClassVar[str] = "recognize-silu"

    def run(self, module: Module, ctx: PassContext) -> None:
        @rule("aten.mul.Tensor")
        def product_with_own_sigmoid(op: Op, rw: Rewriter) -> bool:
            for x, gate in (op.operands, op.operands[::-1]):
                if gate.op is None or gate.op.name != "aten.sigmoid":
                    continue
                if gate.op.operands[0] is not x:
                    ctx.missed(op, why=f"%{gate.name} is not the sigmoid of %{x.name}")
                    continue
                rw.replace_op(op, "aten.silu", [x])
                return True
            return False

        ctx.rewrite(module, [product_with_own_sigmoid])


def main() -> None:
    """Run the pass, show what it changed and what it declined, and compare the results."""
    module = parse_module(TEXT, "example.sparsec")
    inputs = [torch.linspace(-4, 4, 24).reshape(3, 8), torch.ones(3, 8)]
    before, text = evaluate_module(module, inputs, {}), print_module(module)
    result = run_passes(module, "recognize-silu,dce")
    after = evaluate_module(module, inputs, {})
    print(diff(text, print_module(module), "before", "after recognize-silu"))
    for remark in result.remarks:
        print(f"{remark.loc}: {remark.message}")
    torch.testing.assert_close(after, before)
    print("same results before and after")


if __name__ == "__main__":
    main()
