"""The figures of a plan: balance, the bound and the gap to it, rows that cross links, memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsec.passes.placement.figures import SWEEPS, rank_loads, summary
from sparsec.passes.placement.loads import Loads
from sparsec.passes.placement.plan_file import Plan
from sparsec.passes.placement.search import Ranks, even_out, spread

Floats = NDArray[np.float64]


def report(plan: Plan, loads: Loads, bound: Floats, expert_bytes: float, row_bytes: float) -> dict[str, Any]:
    """Measure a plan.

    Loads are over the mean of the ranks, so that 1 is perfect. `planned` is with the plan's own split, `best` with
    the best split of each scenario (from above, to a thousandth). Links are rows per pick (times `row_bytes`, bytes):
    what reaches the fullest rank from its own node and from others, when tokens start on all ranks alike.

    Args:
        bound: [layers], of the mean of the scenarios.
    """
    ranks = Ranks(plan.rank_of_slot, np.array([rank.speed for rank in plan.topology.ranks], np.float32))
    shares = loads.counts / loads.counts.sum(2, keepdims=True) * float(ranks.speed.sum())
    mean = shares.mean(0)
    columns = np.ascontiguousarray(shares.transpose(1, 2, 0), np.float32)
    best = even_out(plan.slots, spread(plan.slots, columns), ranks, SWEEPS).max(1)
    scenarios = [
        {"name": name, "planned": summary(rank_loads(plan, share).max(1)), "best": summary(best[:, index])}
        for index, (name, share) in enumerate(zip(loads.names, shares, strict=True))
    ]
    load = rank_loads(plan, mean)
    fullest = load.max(1)
    node = np.array([rank.node for rank in plan.topology.ranks])
    width = np.bincount(node)[node]
    rows = load * ranks.speed / ranks.speed.sum()
    inside, outside = rows * (width - 1) / len(node), rows * (len(node) - width) / len(node)
    return {
        "bound": summary(bound),
        "load": summary(fullest),
        "gap": summary(fullest / bound - 1),
        "layers": [
            {"layer": layer, "load": one, "bound": low}
            for layer, one, low in zip(plan.layers, fullest.tolist(), bound.tolist(), strict=True)
        ],
        "scenarios": scenarios,
        "links": {
            "inside": {
                "rows_per_pick": float(inside.max(1).mean()),
                "bytes_per_pick": float(inside.max(1).mean() * row_bytes),
            },
            "outside": {
                "rows_per_pick": float(outside.max(1).mean()),
                "bytes_per_pick": float(outside.max(1).mean() * row_bytes),
            },
        },
        "expert_bytes": expert_bytes,
        "row_bytes": row_bytes,
        "memory": [size * len(plan.layers) * expert_bytes for size in plan.size],
    }
