"""DeepSeek's published balancer, EPLB, for comparison: its global and its hierarchical policy, written anew."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def eplb(loads: Floats, ranks: int, slots: int) -> Ints:
    """The global policy: replicate whoever is hottest per replica, then pack, heaviest first.

    It may put two replicas of one expert on one rank, as the original does.

    Args:
        loads: [layers, experts].
        slots: of each rank.

    Returns:
        [layers, ranks * slots]: the expert in each slot.
    """
    return np.stack([_spread(load, ranks, slots) for load in loads])


def hierarchical(loads: Floats, ranks: int, slots: int, nodes: int, groups: int) -> Ints:
    """The hierarchical policy: whole groups of experts to nodes, then replicas and packing inside every node.

    Args:
        loads: [layers, experts].
        nodes: divides `ranks` and `groups`.

    Returns:
        [layers, ranks * slots].
    """
    layers, experts = loads.shape
    size = experts // groups
    result = np.empty((layers, ranks * slots), np.int64)
    for layer, load in enumerate(loads):
        held = _pack(load.reshape(groups, size).sum(1), nodes, groups // nodes)
        rows: list[Ints] = []
        for some in held:
            members = np.concatenate([np.arange(group * size, (group + 1) * size) for group in some])
            rows.append(members[_spread(load[members], ranks // nodes, slots)])
        result[layer] = np.concatenate(rows)
    return result


def _spread(load: Floats, ranks: int, slots: int) -> Ints:
    """Replicas and their ranks. -> [ranks * slots]."""
    expert = list(range(len(load)))
    counts = np.ones(len(load), np.int64)
    while len(expert) < ranks * slots:
        hottest = int((load / counts).argmax())
        expert.append(hottest)
        counts[hottest] += 1
    each = np.array(expert)
    return np.concatenate([each[some] for some in _pack((load / counts)[each], ranks, slots)])


def _pack(weight: Floats, bins: int, most: int) -> list[list[int]]:
    """Heaviest first, into the lightest bin that has room for another."""
    held: list[list[int]] = [[] for _ in range(bins)]
    total = np.zeros(bins)
    for item in np.argsort(-weight, kind="stable").tolist():
        place = min((one for one in range(bins) if len(held[one]) < most), key=lambda one: total[one])
        held[place].append(item)
        total[place] += weight[item]
    return held
