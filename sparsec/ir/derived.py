"""Weights that the compiler makes of the model's own.

An argument of `main` of kind `derived` names a function of the module, and the sources that it is computed of:

    %up: tensor<2x64x32xf32> {
      kind = "derived", source = "derived/experts.*.up", function = "derive_0", of = ["experts.0.up", "experts.1.up"]
    }

It is computed once, never in a run of the model, and stored under its own source
(`sparsec.ir.interp.DerivedWeights`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from sparsec.ir.core import Func, Module

PREFIX = "derived/"
"""What the source of a derived weight starts with, so that it is nobody's parameter."""

ROLE = "derive"
"""Attribute `role` of functions that compute weights."""


@dataclass(frozen=True)
class Derivation:
    """How a weight is made: a function of the module, and the sources of its arguments."""

    func: Func
    of: tuple[str, ...]


def is_derivation(func: Func) -> bool:
    """Whether a function computes weights, so that it is no kernel."""
    return func.attrs.get("role") == ROLE


def derivations(module: Module) -> dict[str, Derivation]:
    """How each derived weight of a module is made, by its source."""
    return {
        str(attrs["source"]): Derivation(module.funcs[str(attrs["function"])], cast("tuple[str, ...]", attrs["of"]))
        for attrs in module.main.arg_attrs.values()
        if attrs.get("kind") == "derived"
    }
