"""What every dialect shares: terminators, and calls of functions of the module."""

from __future__ import annotations

from typing import Any

from sparsec.ir.opdef import Env, OpDef, Operands, Results
from sparsec.ir.types import Type


class Return(OpDef, name="func.return"):
    """End a function and name its results. Short form: `return %a, %b`."""

    values: Operands
    pure = False

    def infer(self) -> tuple[Type, ...]:
        return ()


class Yield(OpDef, name="moe.yield"):
    """End a region and name what it computes. Short form: `yield %a, %b`."""

    values: Operands
    pure = False

    def infer(self) -> tuple[Type, ...]:
        return ()


class Call(OpDef, name="moe.call"):
    """Call a function of the module: a block that the model repeats, which was captured once.

    The function has symbols of its own, bound by its arguments, and an attribute `scope`: the module it was captured
    from, for which the call's own scope stands. The pass `inline` puts its body in the place of each call.

    For example:

        %y = moe.call([%x, %up]) {callee = "block_0"} : tensor<s0x64xf32>
    """

    inputs: Operands
    outs: Results
    callee: str  #: name of the function

    def reference(self, env: Env, *args: Any) -> Any:
        return env.call(self.callee, args)


__all__ = ["Call", "Return", "Yield"]
