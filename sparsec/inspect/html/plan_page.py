"""The page of a placement: loads before and after, rows between ranks, replicas, memory, what moved.

Loads are whole thousandths of the mean, rows whole millionths of what a pair of ranks has when all are alike. Where
there are more ranks than can be told apart, the page shows nodes, or blocks of ranks, by their fullest rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsec.inspect.dump import write_atomic
from sparsec.inspect.html.page import render
from sparsec.passes.placement.figures import POLICIES, figures, traffic
from sparsec.passes.placement.loads import Loads
from sparsec.passes.placement.plan_file import Plan
from sparsec.passes.placement.replan import moved, new_on_ranks

SCRIPTS = ("plan-chart", "plan-summary", "plan-loads", "plan-traffic", "plan-replicas", "plan-moves", "plan-main")
STYLES = ("base", "views", "plan")
MOST_COLUMNS = 512
"""Columns of a map of loads."""
MOST_SQUARE = 128
"""Ranks of a matrix of rows."""
MOST_CELLS = 1_500_000
"""Numbers in all maps together."""
MOST_SLOTS = 600_000
"""Slots, over all layers, whose replicas are shown."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def write_plan_page(path: Path, plan: Plan, loads: Loads, old: Plan | None = None, *, name: str = "") -> None:
    """Write the page of a plan under some traffic, beside its old plan, or beside experts that are not placed.

    Raises: SparsecError if the three are not of one model; OSError.
    """
    write_atomic(path, render(name or path.stem, page_data(plan, loads, old), SCRIPTS, STYLES))
    path.chmod(0o644)


def page_data(plan: Plan, loads: Loads, old: Plan | None = None) -> dict[str, Any]:
    """What the page shows, ready for JSON."""
    found = figures(plan, loads, old)
    node = np.array([rank.node for rank in plan.topology.ranks])
    group, names = groups(node, MOST_COLUMNS)
    shown = _shown(found.best, len(names))
    notes = []
    if len(shown) < len(found.names):
        notes.append(f"maps are of the mean and of the {len(shown) - 1} worst of {len(found.names) - 1} scenarios")
    kept = plan.slots.size <= MOST_SLOTS
    if not kept:
        notes.append("replicas are left out: the plan has too many slots to show")
    bytes_ = {key: _positive(plan.report.get(key)) for key in ("expert_bytes", "row_bytes")}
    return {
        "topology": plan.topology.text,
        "ranks": len(plan.size),
        "nodes": plan.topology.nodes,
        "experts": plan.experts,
        "slots": plan.slots.shape[1],
        "layers": list(plan.layers),
        "old": old is not None,
        "notes": notes,
        **bytes_,
        "nodes_per_token": _positive(plan.report.get("nodes_per_token")),
        "scenarios": found.rows(),
        "shown": shown,
        "perLayer": found.layers(plan.layers),
        "groups": _groups(names, group, node),
        "maps": {
            key: [_thousandths(_fullest(loads[at], group, len(names))) for at in shown]
            for key, loads in (("before", found.before), ("planned", found.planned), ("best", found.best))
        },
        "traffic": _traffic(plan, loads, shown, node),
        "replicas": _replicas(plan, loads) if kept else None,
        "memory": _memory(plan, bytes_["expert_bytes"]),
        "moved": None if old is None else _moved(old, plan, bytes_["expert_bytes"], group, len(names)),
    }


def groups(node: Ints, most: int) -> tuple[Ints, list[str]]:
    """Which group each rank is shown in, and the groups' names: ranks, or nodes, or blocks where those are too many."""
    ranks = len(node)
    if ranks <= most:
        return np.arange(ranks), [f"rank {rank}" for rank in range(ranks)]
    if 1 < node[-1] + 1 <= most:
        return node, [f"node {one}" for one in range(int(node[-1]) + 1)]
    size = -(-ranks // most)
    group = np.arange(ranks) // size
    return group, [f"ranks {at * size} to {min((at + 1) * size, ranks) - 1}" for at in range(int(group[-1]) + 1)]


def _groups(names: Sequence[str], group: Ints, node: Ints) -> dict[str, Any]:
    first = np.searchsorted(group, np.arange(len(names)))
    return {"names": names, "first": first.tolist(), "node": node[first].tolist(), "single": len(names) == len(node)}


def _shown(best: Floats, columns: int) -> list[int]:
    """The mean, and the worst scenarios, as many as there is room for; in their order."""
    room = max(2, MOST_CELLS // (3 * best.shape[1] * columns))
    worst = 1 + np.argsort(-best[1:].max(2).mean(1), kind="stable")[: room - 1]
    return [0, *sorted(worst.tolist())]


def _fullest(loads: Floats, group: Ints, number: int) -> Floats:
    """[layers, ranks] -> [layers, groups]."""
    return np.maximum.reduceat(loads, np.searchsorted(group, np.arange(number)), axis=1)


def _thousandths(values: Floats) -> list[list[int]]:
    return np.rint(np.minimum(values, 1e6) * 1000).astype(np.int64).tolist()


def _traffic(plan: Plan, loads: Loads, shown: Sequence[int], node: Ints) -> dict[str, Any]:
    group, names = groups(node, MOST_SQUARE)
    even = 1e6 * len(node) ** 2
    rows = {policy: traffic(plan, loads, policy, group)[list(shown)] * even for policy in POLICIES}
    return {
        **_groups(names, group, node),
        "size": np.bincount(group).tolist(),
        "static": np.rint(rows["static"][:, 0] / np.bincount(group)[0]).astype(np.int64).tolist(),
        "local": np.rint(rows["local"]).astype(np.int64).tolist(),
    }


def _replicas(plan: Plan, loads: Loads) -> dict[str, Any]:
    share = loads.counts / loads.counts.sum(2, keepdims=True) * plan.experts
    return {
        "size": list(plan.size),
        "slots": plan.slots.tolist(),
        "split": _thousandths(plan.split),
        "mean": _thousandths(share.mean(0)),
        "most": _thousandths(share.max(0)),
    }


def _memory(plan: Plan, expert_bytes: float) -> dict[str, Any]:
    held = [size * len(plan.layers) * expert_bytes for size in plan.size]
    return {"held": held, "room": [rank.memory for rank in plan.topology.ranks]}


def _moved(old: Plan, plan: Plan, expert_bytes: float, group: Ints, number: int) -> dict[str, Any]:
    fresh = new_on_ranks(old.slots, plan.slots, plan.rank_of_slot, plan.experts)
    by_rank = np.add.reduceat(fresh, np.concatenate([[0], np.cumsum(plan.size)[:-1]]), axis=1, dtype=np.int64)
    starts = np.searchsorted(group, np.arange(number))
    return {
        **moved(old, plan, expert_bytes),
        "map": np.add.reduceat(by_rank, starts, axis=1).tolist(),
        "slots": [np.flatnonzero(row).tolist() for row in fresh],
    }


def _positive(value: object) -> float:
    """A number of a plan's report, which anyone may have written."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e18
    return float(value) if good and isinstance(value, int | float) else 0.0
