"""Cases: a plan under some traffic, or experts on so many devices that nobody planned for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparsec.diagnostics import SparsecError
from sparsec.passes.placement import Plan, Topology, parse_topology, read_loads, read_routing
from sparsec.passes.placement.figures import check_traffic
from sparsec.passes.placement.topology import MOST_RANKS, slots_per_rank
from sparsec.simulate.experts import in_order, of_plan, packed
from sparsec.simulate.layer import Setup
from sparsec.simulate.model import MoE
from sparsec.simulate.remap import Table, remap
from sparsec.simulate.routing import histogram
from sparsec.simulate.run import Point, replay, simulate

Floats = NDArray[np.float64]

LAYERS = 4
"""Layers that are simulated of a model that is given by numbers, where there is no plan: they stand for the others."""

SPARE = 1 / 8
"""Slots beyond one for each expert, where nobody says how many."""


@dataclass(frozen=True)
class Traffic:
    """What goes through the layers. `share` is [layers, experts]; None: drawn. `tokens` are [tokens, layers, k]."""

    share: Floats | None
    routing: Path | None
    policy: str
    batches: int
    seed: int


def counts(text: str) -> list[int]:
    """Numbers of devices: `8..2048` doubles from one to the other, commas list. Raises: SparsecError."""
    found: list[int] = []
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        if not first.isdecimal() or not (last.isdecimal() or not dots):
            raise SparsecError(f"--devices '{text}': '{part}' is no number\n  hint: 64, or 8..2048, or 32,72")
        at, end = int(first), int(last or first)
        if not 0 < at <= end <= MOST_RANKS:
            raise SparsecError(f"--devices '{text}': there must be 1 to {MOST_RANKS}, in ascending order")
        while at <= end:
            found.append(at)
            at *= 2
    return found


def of_size(text: str, ranks: int) -> Topology:
    """A topology's first node, repeated for so many ranks. Raises: SparsecError where they do not fill nodes."""
    node = [rank for rank in parse_topology(text).ranks if rank.node == 0]
    width = min(len(node), ranks)
    if ranks % width:
        raise SparsecError(f"{ranks} devices do not fill nodes of {width}\n  hint: another --topology, as 1x{ranks}")
    return Topology(text, tuple(replace(node[rank % width], node=rank // width) for rank in range(ranks)))


def shares(loads: Sequence[str], model: MoE, plan: Plan | None) -> Floats | None:
    """[layers, experts], the mean of what was recorded; of many layers, without a plan, some."""
    if not loads:
        return None
    read = read_loads(loads)
    if plan is not None:
        check_traffic(plan, read)
    if read.counts.shape[2] != model.experts:
        raise SparsecError(f"the loads are of {read.counts.shape[2]} experts, the model has {model.experts}")
    share = (read.counts / read.counts.sum(2, keepdims=True)).mean(0)
    return share if plan is not None else share[:: -(-len(share) // (2 * LAYERS))]


def planned(setup: Setup, plan: Plan, traffic: Traffic) -> Point:
    """Simulate a plan. Raises: SparsecError where it does not fit, or tokens are needed, or of another model."""
    one = setup.model.expert_parameters * setup.model.weight
    slots_per_rank(plan.topology, max(plan.size), plan.experts, setup.model.layers, one)
    experts, rng = of_plan(plan), np.random.default_rng(traffic.seed)
    if traffic.routing is None:
        if traffic.policy != "static":
            raise SparsecError(f"policy '{traffic.policy}' needs tokens\n  hint: --routing FILE, or --split best")
        share = histogram(setup.model, len(plan.layers), rng) if traffic.share is None else traffic.share
        return simulate(setup, experts, share, rng, count=traffic.batches)
    routed = read_routing(traffic.routing, plan.layers, plan.experts)
    ranks = len(plan.size)
    node = np.array([rank.node for rank in plan.topology.ranks])
    width = ranks // plan.topology.nodes
    if len(set(plan.size)) > 1 or (node != np.arange(ranks) // width).any():
        raise SparsecError("the rule of replicas is for ranks and nodes alike\n  hint: leave --routing out")
    home = np.arange(len(routed)) * ranks // len(routed)
    where = [
        np.concatenate(remap(Table(slots, split, plan.experts, ranks, width), ids, traffic.policy))
        for at, (slots, split) in enumerate(zip(plan.slots, plan.split, strict=True))
        for ids in [[routed[home == rank, at] for rank in range(ranks)]]
    ]
    return replay(setup, experts, where, home)


def placed(setup: Setup, slots: int | None, placement: str, traffic: Traffic) -> Point:
    """Simulate experts that lie `in order`, or are `packed` by their loads. Raises: SparsecError where they do not fit.

    Args:
        slots: of each rank; None: one for each expert, and, `packed`, an eighth more.
    """
    model, rng = setup.model, np.random.default_rng(traffic.seed)
    share = histogram(model, LAYERS, rng) if traffic.share is None else traffic.share
    ranks = len(setup.topology.ranks)
    wanted = slots or min(model.experts, -(-int(model.experts * (1 + SPARE * (placement == "packed"))) // ranks))
    one = model.expert_parameters * model.weight
    size = slots_per_rank(setup.topology, wanted, model.experts, model.layers, one)
    experts = (
        packed(share, size, setup.topology)
        if placement == "packed"
        else in_order(model.experts, size, setup.topology, len(share))
    )
    return simulate(setup, experts, share, rng, count=traffic.batches)
