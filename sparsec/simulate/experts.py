"""Where experts live in the simulated layers: a plan's places, or simple ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsec.passes.placement import Plan, Topology, best_split
from sparsec.passes.placement.pack import pack, replicas
from sparsec.passes.placement.search import Ranks

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Experts:
    """A placement.

    Args:
        slots: [layers, slots], the expert in each slot.
        split: [layers, slots], its share of the expert's tokens.
        rank_of_slot: [slots].
        speed: [ranks], relative.
    """

    slots: Ints
    split: Floats
    rank_of_slot: Ints
    speed: Floats

    def rows(self, layer: int, counts: Floats, best: bool) -> Floats:
        """[slots]: rows of each slot for so many tokens of each expert ([experts]), by the split or the best one."""
        if best:
            return best_split(self.slots[layer], counts, Ranks(self.rank_of_slot, self.speed.astype(np.float32)))[0]
        return counts[self.slots[layer]] * self.split[layer]

    def split_of(self, layer: int, share: Floats, best: bool) -> Floats:
        """[slots]: the split, or the one that is best when the experts have these shares of all tokens."""
        if not best:
            return self.split[layer]
        rows = self.rows(layer, share, True)
        held = share[self.slots[layer]]
        return np.divide(rows, held, out=self.split[layer].copy(), where=held > 0)


def of_plan(plan: Plan) -> Experts:
    """A plan's places and shares."""
    return Experts(plan.slots, plan.split, plan.rank_of_slot, _speed(plan.topology))


def in_order(experts: int, size: list[int], topology: Topology, layers: int) -> Experts:
    """Nobody planned: slot after slot, expert after expert; spare slots begin again. `size`: slots of each rank."""
    slots = np.tile(np.arange(sum(size)) % experts, (layers, 1))
    return _even(slots, size, topology)


def packed(share: Floats, size: list[int], topology: Topology) -> Experts:
    """Replicate the hottest, then pack, heaviest first; replicas share equally. share: [layers, experts]."""
    of_slot = np.repeat(np.arange(len(size)), size)
    slots = pack(share, replicas(share, sum(size), len(size)), of_slot, _speed(topology))
    return _even(slots, size, topology)


def _even(slots: Ints, size: list[int], topology: Topology) -> Experts:
    number = np.stack([np.bincount(row, minlength=int(row.max()) + 1)[row] for row in slots])
    return Experts(slots, 1.0 / number, np.repeat(np.arange(len(size)), size), _speed(topology))


def _speed(topology: Topology) -> Floats:
    return np.array([rank.speed for rank in topology.ranks], np.float64)
