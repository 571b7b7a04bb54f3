"""Weights that the compiler makes of the model's own.

An argument of `main` of kind `derived` names a function of the module, and the sources that it is computed of:

    %up: tensor<2x64x32xf32> {
      kind = "derived", source = "derived/experts.*.up", function = "derive_0", of = ["experts.0.up", "experts.1.up"]
    }

It is computed once, never in a run of the model, and stored under its own source
(`sparsec.ir.interp.DerivedWeights`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from sparsec.ir.core import Func, Module

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "derived/"
"""What the source of a derived weight starts with, so that it is nobody's parameter."""

PLACEMENT = "placement/"
"""What the sources of tables start with that say where experts live: `placement/3/slots`, `placement/3/shares`."""

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


def leaves_of(source: str, made: Mapping[str, Derivation]) -> set[str]:
    """The sources of what a weight is computed of in the end; its own for one that is not computed."""
    if source not in made:
        return {source}
    return {leaf for part in made[source].of for leaf in leaves_of(part, made)}


@dataclass(frozen=True)
class PlacementTable:
    """A table that says where experts live: an argument of `main`, whose value can change between runs.

    Args:
        experts: how many the layer has.
        slots: physical slots on all ranks together.
        shares: whether it holds the share of its expert's tokens that each slot gets; else the expert in each slot.
    """

    experts: int
    slots: int
    shares: bool

    def even(self) -> Tensor:
        """The table of a placement that deals the experts out in turn: slot p has expert p % E; replicas share alike.

        [P], i64, or f64 for shares.
        """
        import torch

        held = torch.arange(self.slots) % self.experts
        return 1.0 / torch.bincount(held, minlength=self.experts)[held].double() if self.shares else held


def placement_tables(module: Module) -> dict[str, PlacementTable]:
    """The tables of a placed module by their source, layer by layer."""
    found = dict[str, PlacementTable]()
    for arg, attrs in module.main.arg_attrs.items():
        experts, source = attrs.get("experts"), str(attrs.get("source"))
        if source.startswith(PLACEMENT) and isinstance(experts, int):
            size = arg.tensor.shape[0]
            assert isinstance(size, int)
            found[source] = PlacementTable(experts, size, source.endswith("/shares"))
    return found
