"""The time of one expert layer: its parts, and how a schedule joins them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from numpy import float64
from numpy.typing import NDArray

from sparsec.diagnostics import SparsecError
from sparsec.passes.placement import Topology
from sparsec.simulate.compute import Device, expert_seconds, rest_seconds, shared_seconds
from sparsec.simulate.experts import Experts
from sparsec.simulate.links import Rows, kernels, link_seconds, row_bytes
from sparsec.simulate.model import MoE

SCHEDULES = ("sum", "shared", "two-batch")


@dataclass(frozen=True)
class Setup:
    """What is simulated.

    Args:
        tokens: of each rank, in a step.
        dedup, algo: of the dispatch, see `traffic`.
        payload: of dispatched rows: `fp8`, or `model` (as wide as activations).
        schedule: `sum` (one part after the other), `shared` (the shared experts run beside the dispatch), `two-batch`
            (two halves, of which one computes while the other communicates).
        context: tokens that each token attends to, on average.
        best: every batch is split over the replicas as well as can be; else by the plan's shares.
    """

    model: MoE
    topology: Topology
    device: Device
    tokens: int
    dedup: str = "none"
    algo: str = "flat"
    payload: str = "model"
    schedule: str = "sum"
    context: float = 0.0
    best: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise SparsecError(f"there is no schedule '{self.schedule}'\n  hint: {', '.join(SCHEDULES)}")
        if self.dedup == "node" and self.algo == "flat":
            raise SparsecError("a row for each node is sent on by a rank in it\n  hint: --algo two_level")


@dataclass(frozen=True)
class Times:
    """Seconds of one layer. `experts` are the slowest rank's, `mean` those of all ranks on average.

    `hidden` is what the schedule hides of the parts' sum; `total` is the sum less that.
    """

    rest: float
    shared: float
    dispatch: float
    experts: float
    mean: float
    combine: float
    hidden: float

    @property
    def total(self) -> float:
        return self.rest + self.shared + self.dispatch + self.experts + self.combine - self.hidden


def average(times: list[Times]) -> Times:
    """Of layers and batches."""
    return Times(*(sum(getattr(one, field.name) for one in times) / len(times) for field in fields(Times)))


def layer_times(setup: Setup, experts: Experts, slots: NDArray[float64], links: Rows) -> Times:
    """Time one layer.

    Args:
        slots: [slots], rows of each slot.
        links: rows of the dispatch.
    """
    if setup.schedule == "two-batch":
        half = _parts(setup, experts, slots / 2, links.times(0.5), setup.tokens / 2)
        compute, wire = half.rest + half.shared + half.experts, half.dispatch + half.combine
        twice = Times(*(2 * getattr(half, field.name) for field in fields(Times)))
        return _hide(twice, 2 * min(compute, wire))
    parts = _parts(setup, experts, slots, links, setup.tokens)
    return _hide(parts, min(parts.dispatch, parts.shared)) if setup.schedule == "shared" else parts


def _parts(setup: Setup, experts: Experts, slots: NDArray[float64], links: Rows, tokens: float) -> Times:
    model, on = setup.model, setup.device
    out, back = kernels(setup.dedup, setup.algo)
    size, size_back = row_bytes(model, setup.payload)
    busy = expert_seconds(model, on, slots, experts.rank_of_slot, experts.speed)
    return Times(
        rest_seconds(model, on, tokens, setup.context),
        shared_seconds(model, on, tokens),
        link_seconds(out, links, size, setup.topology),
        float(busy.max()),
        float(busy.mean()),
        link_seconds(back, links.back, size_back, setup.topology),
        0.0,
    )


def _hide(times: Times, hidden: float) -> Times:
    return Times(times.rest, times.shared, times.dispatch, times.experts, times.mean, times.combine, hidden)
