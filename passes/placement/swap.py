"""Swaps of experts between the fullest rank and the others, under an equal split: all layers at once."""

from __future__ import annotations

from time import monotonic

import numpy as np
from numpy.typing import NDArray

from sparsec.passes.placement.pack import pack, replicas
from sparsec.passes.placement.search import Ranks, even_out, spread

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

CLOSE = 1e-3
"""How far over the lower bound a layer may stay without another attempt."""

RESTARTS = 3


def balance(
    start: Ints, loads: Floats, ranks: Ranks, bound: Floats, rng: np.random.Generator, deadline: float
) -> tuple[Ints, bool]:
    """Swap; where a layer stays far from its bound, pack anew as if its loads were a little different, and swap again.

    Args:
        start: [layers, slots].
        loads: [layers, experts].
        bound: [layers].
        deadline: of `monotonic`, after which nothing is tried anew.

    Returns:
        [layers, slots], and whether time ran out.
    """
    speed = ranks.speed.astype(np.float64)
    slots = swap(start, loads, ranks, bound)
    least = fullest(slots, split_of(slots, loads, ranks), loads, ranks)
    for _ in range(RESTARTS):
        far = np.flatnonzero(least > bound * (1 + CLOSE))
        if not len(far):
            break
        if monotonic() > deadline:
            return slots, True
        other = loads[far] * np.exp(0.05 * rng.standard_normal((len(far), loads.shape[1])))
        packed = pack(other, replicas(other, slots.shape[1], len(ranks.speed)), ranks.of_slot, speed)
        tried = swap(packed, loads[far], ranks, bound[far])
        value = fullest(tried, split_of(tried, loads[far], ranks), loads[far], ranks)
        better = value < least[far]
        slots[far[better]], least[far[better]] = tried[better], value[better]
    return slots, False


def fullest(slots: Ints, split: Floats, loads: Floats, ranks: Ranks) -> Floats:
    """The fullest rank of every layer, over its speed. -> [layers]."""
    starts = np.searchsorted(ranks.of_slot, np.arange(len(ranks.speed)))
    amount = np.take_along_axis(loads, slots, 1) * split
    return np.asarray((np.add.reduceat(amount, starts, axis=1) / ranks.speed).max(1), np.float64)


def split_of(slots: Ints, loads: Floats, ranks: Ranks, sweeps: int = 20) -> Floats:
    """The shares of every slot that are near the best for these loads. -> [layers, slots]."""
    layers, experts = loads.shape
    amount = spread(slots, loads[:, :, None].astype(np.float32))
    even_out(slots, amount, ranks, sweeps)
    given = np.maximum(amount[:, :, 0].astype(np.float64), 0)
    flat = slots + np.arange(layers)[:, None] * experts
    held = np.bincount(flat.ravel(), given.ravel(), layers * experts)[flat]
    number = np.bincount(flat.ravel(), minlength=layers * experts)[flat]
    return np.divide(given, held, out=1.0 / number, where=held > 0)


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
