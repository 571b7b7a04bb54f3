"""Swaps of experts between the fullest rank and the others, under an equal split: all layers at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sparsec.passes.placement.search import Ranks

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def swap(slots: Ints, loads: Floats, ranks: Ranks, bound: Floats, rounds: int = 400, tolerance: float = 1e-3) -> Ints:
    """Swap experts until no swap helps the fullest rank, or it is close enough to the bound.

    Args:
        slots: [layers, slots], where no rank holds an expert twice.
        loads: [layers, experts].
        bound: [layers], no load is lower.
        tolerance: how far above the bound is close enough.

    Returns:
        [layers, slots]; the fullest rank of a layer is never fuller than before.
    """
    slots = slots.copy()
    of_slot, speed = ranks.of_slot, ranks.speed.astype(np.float64)
    starts = np.searchsorted(of_slot, np.arange(len(speed)))
    size = int(np.bincount(of_slot).max())
    layers, experts = loads.shape
    counts = np.zeros((layers, experts), np.int64)
    np.add.at(counts, (np.arange(layers)[:, None], slots), 1)
    weight = np.take_along_axis(loads / counts, slots, 1)
    holds = np.zeros((layers, len(speed), experts), np.bool_)
    holds[np.arange(layers)[:, None], of_slot, slots] = True
    load = np.add.reduceat(weight, starts, axis=1) / speed
    active = np.arange(layers)
    for _ in range(rounds):
        active = active[load[active].max(1) > bound[active] * (1 + tolerance)]
        if not len(active):
            break
        hot = load[active].argmax(1)
        most = load[active, hot]
        mine = starts[hot][:, None] + np.arange(size)
        real = (mine < len(of_slot)) & (of_slot[np.minimum(mine, len(of_slot) - 1)] == hot[:, None])
        mine = np.where(real, mine, starts[hot][:, None])
        moved = weight[active[:, None], mine][:, :, None] - weight[active][:, None, :]
        here = most[:, None, None] - moved / speed[hot][:, None, None]
        there = load[active][:, of_slot][:, None, :] + moved / speed[of_slot]
        score = np.maximum(here, there)
        mine_there = holds[active[:, None, None], of_slot[None, None, :], slots[active[:, None], mine][:, :, None]]
        theirs_here = holds[active[:, None], hot[:, None], slots[active]]
        score[mine_there | theirs_here[:, None, :] | (moved <= 0)] = np.inf
        flat = score.reshape(len(active), -1)
        best = flat.argmin(1)
        better = flat[np.arange(len(active)), best] < most * (1 - 1e-9)
        active, best, hot, mine = active[better], best[better], hot[better], mine[better]
        a, b = mine[np.arange(len(active)), best // slots.shape[1]], best % slots.shape[1]
        other = of_slot[b]
        expert_a, expert_b = slots[active, a], slots[active, b]
        delta = weight[active, a] - weight[active, b]
        load[active, hot] -= delta / speed[hot]
        load[active, other] += delta / speed[other]
        holds[active, hot, expert_a] = holds[active, other, expert_b] = False
        holds[active, hot, expert_b] = holds[active, other, expert_a] = True
        slots[active, a], slots[active, b] = expert_b, expert_a
        weight[active, a], weight[active, b] = weight[active, b], weight[active, a]
    return slots
