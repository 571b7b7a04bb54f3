"""Replica counts, and a first packing of the replicas onto the ranks: all layers at once, greedy and deterministic."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def replicas(loads: Floats, slots: int, most: int) -> Ints:
    """How many replicas each expert gets: whoever has the hottest replica gets the next one.

    Args:
        loads: [layers, experts], of any scale.
        slots: how many replicas there are in all, at least as many as experts.
        most: the most that an expert can have: as many as ranks.

    Returns:
        [layers, experts], each at least 1, with rows that sum to `slots`.
    """
    counts = np.ones(loads.shape, np.int64)
    rows = np.arange(len(loads))
    each = loads.astype(np.float64).copy()
    each[counts >= most] = -1.0
    for _ in range(slots - loads.shape[1]):
        hottest = each.argmax(1)
        counts[rows, hottest] += 1
        held = counts[rows, hottest]
        each[rows, hottest] = np.where(held >= most, -1.0, loads[rows, hottest] / held)
    return counts


def pack(loads: Floats, counts: Ints, rank_of_slot: Ints, speed: Floats) -> Ints:
    """Put every replica, heaviest first, on the least loaded rank that has a free slot and not that expert yet.

    Args:
        loads: [layers, experts].
        counts: [layers, experts], rows that sum to the number of slots.
        rank_of_slot: [slots], ascending.
        speed: [ranks], relative.

    Returns:
        [layers, slots]: the expert in each slot. No rank holds an expert twice.
    """
    layers, experts = loads.shape
    slots, ranks = len(rank_of_slot), len(speed)
    rows = np.arange(layers)
    share = loads / counts
    expert = np.stack([np.repeat(np.arange(experts), row) for row in counts])
    # Of equal weights, those with most replicas go first: they have the fewest ranks to choose from.
    keys = np.take_along_axis(share, expert, 1)
    order = np.take_along_axis(expert, np.argsort(-keys, axis=1, kind="stable"), 1)
    load = np.zeros((layers, ranks))
    free = np.tile(np.bincount(rank_of_slot, minlength=ranks), (layers, 1))
    first = np.searchsorted(rank_of_slot, np.arange(ranks))
    holds = np.zeros((layers, experts, ranks), np.bool_)
    size = free.copy()
    result = np.full((layers, slots), -1, np.int64)
    for step in range(slots):
        item = order[:, step]
        weight = share[rows, item]
        after = load + weight[:, None] / speed
        after[(free == 0)] = np.inf
        twice = after + np.where(holds[rows, item], 1e30, 0.0)
        rank = twice.argmin(1)
        slot = first[rank] + size[rows, rank] - free[rows, rank]
        result[rows, slot] = item
        load[rows, rank] += weight / speed[rank]
        free[rows, rank] -= 1
        holds[rows, item, rank] = True
    return _untwine(result, rank_of_slot)


def _untwine(slots: Ints, rank_of_slot: Ints) -> Ints:
    """Swap away what had to share a rank with its own replica, where the last free slots left no choice."""
    for row in slots:
        for _ in range(len(row)):
            pairs = rank_of_slot * (row.max() + 1) + row
            _, index, number = np.unique(pairs, return_index=True, return_counts=True)
            if not (number > 1).any():
                break
            slot = int(index[number > 1][0])
            here, expert = rank_of_slot[slot], row[slot]
            with_expert = np.isin(rank_of_slot, rank_of_slot[row == expert])
            held_here = np.isin(row, row[rank_of_slot == here])
            other = np.flatnonzero(~with_expert & ~held_here)
            if not len(other):
                break
            row[slot], row[other[0]] = row[other[0]], expert
    return slots
