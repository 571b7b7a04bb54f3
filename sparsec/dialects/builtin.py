"""Terminators, which every dialect shares."""

from __future__ import annotations

from sparsec.ir.opdef import OpDef, Operands
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


__all__ = ["Return", "Yield"]
