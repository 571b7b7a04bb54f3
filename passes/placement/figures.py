"""What a placement does to some traffic: load of every rank, rows between ranks, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsec.diagnostics import SparsecError
from sparsec.passes.placement.bound import lower_bound
from sparsec.passes.placement.loads import Loads
from sparsec.passes.placement.plan_file import Plan
from sparsec.passes.placement.replan import check_old
from sparsec.passes.placement.search import Ranks, even_out, spread

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

SWEEPS = 40
"""After so many, what is left to even out is below a thousandth."""
POLICIES = ("static", "local")
MEAN = "mean of the scenarios"


@dataclass(frozen=True)
class Figures:
    """Loads of the ranks, over the mean of the ranks of that layer and over their speed: 1 is perfect.

    The first scenario is the mean of the others.

    Args:
        names: of the scenarios.
        before: [scenarios, layers, ranks], of the old plan, or of experts that lie in order, unplaced.
        planned: the same, of the plan with its own split.
        best: with the split that is best for that scenario, to a thousandth.
        bound: [scenarios, layers], what no placement can beat.
    """

    names: tuple[str, ...]
    before: Floats
    planned: Floats
    best: Floats
    bound: Floats

    def rows(self) -> list[dict[str, Any]]:
        """Per scenario: its name, and mean and worst layer of each of the four."""
        parts = {"before": self.before, "planned": self.planned, "best": self.best, "bound": self.bound[:, :, None]}
        fullest = {key: loads.max(2) for key, loads in parts.items()}
        return [
            {"name": name} | {key: summary(loads[index]) for key, loads in fullest.items()}
            for index, name in enumerate(self.names)
        ]

    def layers(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Per layer, on the mean scenario: the fullest rank before and after, the bound, the gap; and which rank."""
        before, planned = self.before[0], self.planned[0]
        return [
            {
                "layer": layer,
                "before": float(before[at].max()),
                "load": float(planned[at].max()),
                "best": float(self.best[0, at].max()),
                "bound": float(self.bound[0, at]),
                "gap": float(planned[at].max() / self.bound[0, at] - 1),
                "rank": int(planned[at].argmax()),
            }
            for at, layer in enumerate(numbers)
        ]


def figures(plan: Plan, loads: Loads, old: Plan | None = None) -> Figures:
    """Measure a plan on some traffic, and what it replaces. Raises: SparsecError unless all are of one model."""
    check_traffic(plan, loads)
    if old is not None:
        check_old(old, loads, plan.size)
    speed = speeds(plan)
    share = loads.counts / loads.counts.sum(2, keepdims=True) * float(speed.sum())
    share = np.concatenate([share.mean(0)[None], share])
    ranks = Ranks(plan.rank_of_slot, speed.astype(np.float32))
    columns = np.ascontiguousarray(share.transpose(1, 2, 0), np.float32)
    best = even_out(plan.slots, spread(plan.slots, columns), ranks, SWEEPS).transpose(2, 0, 1).astype(np.float64)
    planned = rank_loads(plan, share)
    best = np.where((planned.max(2) < best.max(2))[:, :, None], planned, best)
    before = unplaced(share, len(speed)) / speed if old is None else rank_loads(old, share)
    return Figures((MEAN, *loads.names), before, planned, best, lower_bound(share, np.array(plan.size), speed))


def check_traffic(plan: Plan, loads: Loads) -> None:
    """Raises: SparsecError unless a plan is of the model that was measured."""
    has, wanted = (len(plan.layers), plan.experts), loads.counts.shape[1:]
    if has != wanted:
        raise SparsecError(
            f"the plan is of {has[0]} layers of {has[1]} experts, the loads of {wanted[0]} layers of {wanted[1]}\n"
            "  hint: name the loads of the model that was planned for"
        )
    if plan.layers != loads.layers:
        one, two = next(pair for pair in zip(plan.layers, loads.layers, strict=True) if pair[0] != pair[1])
        raise SparsecError(f"the plan has layer {one} where the loads have layer {two}")


def speeds(plan: Plan) -> Floats:
    """[ranks]."""
    return np.array([rank.speed for rank in plan.topology.ranks])


def rank_loads(plan: Plan, share: Floats) -> Floats:
    """[..., layers, experts] -> [..., layers, ranks], over the ranks' speeds, with the plan's own split."""
    starts = np.concatenate([[0], np.cumsum(plan.size)[:-1]])
    slots = np.broadcast_to(plan.slots, (*share.shape[:-2], *plan.slots.shape))
    return np.add.reduceat(np.take_along_axis(share, slots, -1) * plan.split, starts, axis=-1) / speeds(plan)


def unplaced(share: Floats, ranks: int) -> Floats:
    """The ranks' loads when experts lie on them in order, each once. [..., experts] -> [..., ranks]."""
    experts = share.shape[-1]
    of_expert = np.arange(experts) * ranks // experts
    return share @ (of_expert[:, None] == np.arange(ranks)).astype(np.float64)


def traffic(plan: Plan, loads: Loads, policy: str, group: Ints | None = None, *, mean_only: bool = False) -> Floats:
    """Expected rows between ranks of 1 pick, averaged over layers, when tokens start on all ranks alike.

    A row is a pick that is sent, without deduplication. `static` sends to the replicas by their shares, `local` to the
    own rank, else to the own node's replicas, else to all by their shares.

    Args:
        group: [ranks], which group each rank counts for, when groups are asked about; at most as many as ranks.
        mean_only: leave the scenarios out, but for their mean.

    Returns:
        [scenarios, from, to], each of which adds up to 1; the first scenario is the mean.
    """
    ranks = len(plan.size)
    group = np.arange(ranks) if group is None else group
    groups = int(group.max()) + 1
    share = loads.counts / loads.counts.sum(2, keepdims=True)
    share = np.concatenate([share.mean(0)[None], share[: 0 if mean_only else None]])
    node = np.array([rank.node for rank in plan.topology.ranks])
    column, near = np.zeros((len(share), groups)), np.zeros((groups, groups, len(share)))
    for layer, (slots, split) in enumerate(zip(plan.slots, plan.split, strict=True)):
        sent, held = np.zeros((2, plan.experts, ranks))
        np.add.at(sent, (slots, plan.rank_of_slot), split)
        if policy == "static":
            column += _grouped(share[:, layer] @ sent, group, groups)
        else:
            held[slots, plan.rank_of_slot] = 1
            _add_local(near, share[:, layer], sent, held, node, group)
    if policy == "static":
        return np.bincount(group)[None, :, None] / ranks * column[:, None, :] / len(plan.slots)
    return near.transpose(2, 0, 1) / (ranks * len(plan.slots))


def _add_local(total: Floats, share: Floats, sent: Floats, held: Floats, node: Ints, group: Ints) -> None:
    """Add the rows of one layer, times the number of ranks, when near replicas are preferred.

    Args:
        total: [from, to, scenarios].
        sent: [experts, ranks], the shares.
        held: [experts, ranks], 1 where the rank holds the expert.
    """
    anywhere = _grouped(sent, group, len(total))
    for one in range(int(node.max()) + 1):
        inside = np.flatnonzero(node == one)
        mine, weight = held[:, inside], sent[:, inside]
        copies, whole = mine.sum(1, keepdims=True), weight.sum(1, keepdims=True)
        near = copies[:, 0] > 0
        weight = np.divide(weight, whole, out=mine / np.maximum(copies, 1), where=whole > 0)
        to, at = np.unique(group[inside], return_inverse=True)
        number = np.bincount(at)
        mine, weight = _grouped(mine, at, len(to)), _grouped(weight, at, len(to))
        shared = (share * near) @ weight
        taken = (share[:, None, :] * mine.T) @ weight  # what stays on its rank is not sent to the others
        own = (share @ mine)[:, :, None] * np.eye(len(to))
        rows = number[:, None] * shared[:, None, :] - taken + own
        total[to[:, None], to[None, :]] += rows.transpose(1, 2, 0)
        total[to] += number[:, None, None] * ((share * ~near) @ anywhere).T


def _grouped(rows: Floats, group: Ints, groups: int) -> Floats:
    """[..., ranks] -> [..., groups], summed."""
    if len(group) == groups:
        return rows
    return rows @ (group[:, None] == np.arange(groups)).astype(np.float64)


def links(plan: Plan, matrix: Floats) -> dict[str, Any]:
    """Of rows between ranks of one pick ([from, to]): where they stay, and the fullest rank and link of each kind."""
    node = np.array([rank.node for rank in plan.topology.ranks])
    same = node[:, None] == node
    own = np.eye(len(node), dtype=np.bool_)
    found: dict[str, Any] = {"own": float(matrix[own].sum())}
    for name, kind in (("inside", same & ~own), ("outside", ~same)):
        rows = np.where(kind, matrix, 0)
        source, to = (int(at) for at in np.unravel_index(rows.argmax(), rows.shape))
        into, out_of = rows.sum(0), rows.sum(1)
        found[name] = {
            "rows": float(rows.sum()),
            "into_fullest": float(into.max()),
            "into_rank": int(into.argmax()),
            "out_of_fullest": float(out_of.max()),
            "out_of_rank": int(out_of.argmax()),
            "link": {"from": source, "to": to, "rows": float(rows[source, to])},
        }
    return found


def summary(values: Floats) -> dict[str, float]:
    """Over layers."""
    return {"mean": float(values.mean()), "worst": float(values.max())}
