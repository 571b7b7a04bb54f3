"""Runs the exchanges of a plan that several ranks run together, also for a rank that has no rows of its own.

Every rank must take part in every exchange. One that has nothing to run calls `Idle`, which hands in no rows but
computes those that others send to its experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from sparsec.runtime.banks import reads_of
from sparsec.runtime.dims import Expr, compile_dim
from sparsec.runtime.dtypes import DTYPES
from sparsec.runtime.errors import ArtifactError
from sparsec.runtime.operators import dims_of
from sparsec.runtime.plan import Call, Exchange, Free, Plan, Step
from sparsec.runtime.steps import Closure, Runner, Slots

if TYPE_CHECKING:
    from sparsec.runtime.distributed import World


def require_world(plan: Plan, world: World | None) -> World | None:
    """The world that runs a plan, None for a plan that one process runs alone.

    Raises: ArtifactError where it has not as many ranks as the plan is spread over.
    """
    if plan.spread is None:
        return None
    own_rank(plan.spread.ranks, world)
    width = plan.spread.width
    if world is None:
        from sparsec.runtime.distributed import World

        return World.of(width=width)
    if world.width != width:
        raise ArtifactError(
            f"the model was compiled for nodes of {width} ranks, the world given has nodes of {world.width}: "
            f"make it by World.of(width={width}), or compile with --devices {world.nodes}x{world.width}"
        )
    return world


def own_rank(ranks: int, world: World | None = None) -> int:
    """This process's rank in a world, by default that of all processes.

    Raises: ArtifactError where it has not `ranks` ranks.
    """
    from torch import distributed

    size, rank = 1, 0
    if world is not None:
        size, rank = world.size, world.rank
    elif distributed.is_available() and distributed.is_initialized():
        size, rank = distributed.get_world_size(), distributed.get_rank()
    if size != ranks:
        found = "this is one process without torch.distributed" if size == 1 else f"there are {size}"
        raise ArtifactError(
            f"the model was compiled for {ranks} devices and takes as many processes, {found}: "
            f"start it with `torchrun --nproc-per-node {ranks} ...`, or on several machines with "
            f"`torchrun --nnodes N --nproc-per-node {ranks}/N ...`"
        )
    return rank


def exchange(step: Exchange, world: World) -> Closure:
    """The closure of a step."""
    from sparsec.runtime import distributed

    attrs, ins, outs = step.attrs, list(step.ins), list(step.outs)
    calls: dict[str, Callable[..., Any]] = {
        "remap": lambda ids, slots, shares: distributed.remap(
            world, ids, slots, shares, experts=attrs["experts"], policy=attrs["policy"]
        ),
        "dispatch_start": lambda x, where, weights: distributed.dispatch_start(
            world,
            x,
            where,
            weights,
            slots=attrs["slots"],
            dedup=attrs["dedup"],
            algo=attrs["algo"],
            payload=attrs["payload"],
        ),
        "dispatch_wait": distributed.dispatch_wait,
        "combine_start": distributed.combine_start,
        "combine_wait": distributed.combine_wait,
    }
    call, several = calls[step.op], len(outs) > 1

    def run(values: Slots) -> None:
        result = call(*[values[slot] for slot in ins])
        for slot, value in zip(outs, result if several else (result,), strict=True):
            values[slot] = value

    return run


class Idle:
    """A rank's part in a run of the others.

    Args:
        plan: checked.
        runner: of its steps, whose `base` holds the weights.

    Raises: ArtifactError where what is computed of rows of other ranks depends on this rank's own inputs.
    """

    def __init__(self, plan: Plan, runner: Runner, device: torch.device) -> None:
        self._runner, self._steps = runner, _idle_steps(plan)
        taking_part = [step for i in self._steps if isinstance(step := plan.steps[i], Exchange)]
        there = {arg.slot for arg in plan.args if arg.kind != "input"} | {
            out for step in taking_part for out in step.outs
        }
        self._empty = dict[int, torch.Tensor]()
        for step in taking_part:
            for slot, type in zip(step.ins, step.types, strict=True):
                if type is not None and slot not in there and step.op != "combine_start":
                    shape = [dim if isinstance(dim, int) else 0 for dim in type.shape]
                    self._empty[slot] = torch.empty(shape, dtype=DTYPES[type.dtype], device=device)

    def __call__(self) -> None:
        """Take part in one run, without rows of one's own."""
        values = self._runner.blank()
        for slot, value in self._empty.items():
            values[slot] = value
        self._runner.run(values, self._steps)


def _idle_steps(plan: Plan) -> list[int]:
    """The numbers of the exchanges of a plan, and of the steps that compute rows that come from other ranks."""
    held = {arg.slot for arg in plan.args if arg.kind != "input"}
    received, known, kept = set[int](), set[str](), list[int]()
    for i, step in enumerate(plan.steps):
        if isinstance(step, Exchange):
            if step.op == "combine_start" and step.ins[0] not in received:
                raise ArtifactError("what the plan computes of rows of other ranks depends on this rank's own inputs")
            kept.append(i)
            known |= {symbol for _, _, symbol in step.binds}
            received.update(step.outs if step.op == "dispatch_wait" else ())
        elif not isinstance(step, Free):
            reads = set(reads_of(step))
            if reads & received and reads <= received | held and _symbols(step) <= known:
                kept.append(i)
                received.update(slot for slot in step.outs if slot is not None)
    return kept


def _symbols(step: Step) -> set[str]:
    trees = [*step.args, *step.kwargs.values()] if isinstance(step, Call) else []
    sizes = [compile_dim(dim) for tree in trees for dim in dims_of(tree)]
    return {symbol for size in sizes if isinstance(size, Expr) for symbol in size.symbols}
