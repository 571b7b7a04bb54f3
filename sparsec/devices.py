"""Compiling for several devices: what is asked for, as passes, tables and artifacts need it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsec.config import Config
from sparsec.diagnostics import SparsecError
from sparsec.ir.core import Module
from sparsec.ir.derived import PLACEMENT, placement_tables

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.passes.placement.plan_file import Plan

_SPEC = re.compile(r"(?:([1-9][0-9]*)x)?([1-9][0-9]*)")


@dataclass(frozen=True)
class Devices:
    """Ranks that run one program, each with some of the experts.

    Args:
        ranks: how many.
        width: ranks of a node.
        plan: where experts live; None: spread evenly.
        raw: the plan as its file has it.
    """

    ranks: int
    width: int
    plan: Plan | None = None
    raw: bytes = b""

    @staticmethod
    def of(config: Config) -> Devices:
        """What a configuration asks for. Raises: SparsecError for a plan that does not fit it, or fits no program."""
        asked = _SPEC.fullmatch(config.devices)
        if asked is None:
            raise SparsecError(f"--devices is a number, or nodes x ranks as in 2x4, not {config.devices!r}")
        nodes, width = asked[1] and int(asked[1]), int(asked[2])
        if config.plan is None:
            return Devices((nodes or 1) * width, width)
        from sparsec.passes.placement.plan_file import read_plan

        plan = read_plan(config.plan)
        found = Devices(len(plan.size), _width(plan, config.plan), plan, config.plan.read_bytes())
        if config.devices != "1" and (found.ranks != (nodes or 1) * width or (nodes and found.width != width)):
            raise SparsecError(
                f"--devices is {config.devices}, the plan {config.plan} is for {found.ranks // found.width} nodes of "
                f"{found.width} ranks\n  hint: leave --devices out, or plan for the topology there is"
            )
        return found

    def mark(self, module: Module, config: Config) -> None:
        """Make the module say what it is to be placed on (`place-experts`)."""
        for name in ("devices", "width", "slots", "dispatch", "policy", "chunks", "payload", "inside", "outside"):
            module.attrs.pop(name, None)
        if self.ranks > 1:
            module.attrs.update(devices=self.ranks, width=self.width)
            for name in ("dispatch", "policy", "chunks", "payload"):
                module.attrs[name] = getattr(config, name)
            if self.plan is not None:
                ranks = self.plan.topology.ranks
                inside, outside = min(rank.inside for rank in ranks), min(rank.outside for rank in ranks)
                module.attrs.update(slots=self.plan.size[0], inside=inside, outside=outside)

    def tables(self, module: Module) -> dict[str, Tensor]:
        """The tables of a placed module by their source.

        Raises: SparsecError where the model has no experts to spread, or the plan is for other layers or experts.
        """
        if self.ranks == 1:
            return {}
        tables = placement_tables(module)
        if not tables:
            raise SparsecError(
                f"the model has no layers of experts to spread over {self.ranks} devices\n"
                "  hint: `sparsec explain MODEL --missed` says what was not recognised"
            )
        if self.plan is None:
            return {source: table.even() for source, table in tables.items()}
        return _planned(self.plan, {source: table.experts for source, table in tables.items()})


ALONE = Devices(1, 1)
"""One device, which has all experts."""


def _width(plan: Plan, path: Path) -> int:
    """Ranks of a node. Raises: SparsecError for a plan of unlike ranks or nodes, which no one program runs on."""
    if len(set(plan.size)) > 1:
        raise SparsecError(
            f"{path}: rank 0 has {plan.size[0]} slots, another one {next(s for s in plan.size if s != plan.size[0])}: "
            "every rank runs the same program, so all have the same number of slots\n  hint: plan without `slots=`"
        )
    nodes = [rank.node for rank in plan.topology.ranks]
    widths = {nodes.count(node) for node in nodes}
    if len(widths) > 1:
        raise SparsecError(f"{path}: nodes have {' and '.join(map(str, sorted(widths)))} ranks: all must have as many")
    return widths.pop()


def _planned(plan: Plan, experts: dict[str, int]) -> dict[str, Tensor]:
    import torch

    names = [source.removeprefix(PLACEMENT).rpartition("/")[0] for source in experts if source.endswith("/slots")]
    planned = [str(layer) for layer in plan.layers]
    if sorted(names) != sorted(planned):
        raise SparsecError(
            f"the plan is for the layers {_short(planned)}, the model has experts in {_short(names)}\n"
            "  hint: plan with loads of this model (`sparsec trace` records them)"
        )
    tables: dict[str, Tensor] = {}
    for name, slots, split in zip(planned, plan.slots, plan.split, strict=True):
        if (found := experts[f"{PLACEMENT}{name}/slots"]) != plan.experts:
            raise SparsecError(f"the plan is for {plan.experts} experts, layer {name} of the model has {found}")
        tables[f"{PLACEMENT}{name}/slots"] = torch.tensor(slots.tolist(), dtype=torch.int64)
        tables[f"{PLACEMENT}{name}/shares"] = torch.tensor(split.tolist(), dtype=torch.float64)
    return tables


def _short(names: list[str]) -> str:
    return ", ".join(names) if len(names) < 9 else f"{', '.join(names[:4])}, ... {names[-1]} ({len(names)} in all)"
