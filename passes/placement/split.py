"""The best split of one batch over a fixed placement: the least maximum load, exact, by max-flow."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from sparsec.passes.placement.search import Ranks, even_out, spread

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def best_split(slots: Ints, loads: Floats, ranks: Ranks) -> tuple[Floats, float]:
    """Split every expert's tokens over its replicas so that the fullest rank is as empty as can be.

    Newton's method on the maximum load: whatever a max-flow under the load T cannot place names a set of ranks that
    must hold more than T each; their mean is the next T. Few steps end at the optimum.

    Args:
        slots: [slots], the expert in each slot.
        loads: [experts], tokens or any other unit.

    Returns:
        The tokens of each slot ([slots]), and the load of the fullest rank over its speed.
    """
    scale = float(loads.sum()) / float(ranks.speed.sum())
    if scale == 0:
        return np.zeros(len(slots)), 0.0
    flow = _Flow(slots, loads / scale, ranks)
    limit = 1.0
    while True:
        over = flow.fit(limit)
        if not len(over):
            break
        confined = flow.confined(over)
        limit = max(confined / float(flow.speed[over].sum()), limit * (1 + 1e-9))
    return flow.amount * scale, float((flow.load() / ranks.speed).max()) * scale


class _Flow:
    """Tokens on slots, moved between the replicas of an expert along the shortest paths of ranks."""

    def __init__(self, slots: Ints, loads: Floats, ranks: Ranks) -> None:
        self.ranks, self.slots, self.loads = ranks, slots, loads
        self.speed = ranks.speed.astype(np.float64)
        amount = spread(slots[None], loads.astype(np.float32)[None, :, None])
        even_out(slots[None], amount, ranks, 8)
        self.amount = amount[0, :, 0].astype(np.float64)
        held = np.bincount(slots, self.amount, len(loads))
        count = np.bincount(slots, minlength=len(loads))
        exact = np.divide(loads, held, out=np.zeros(len(loads)), where=held > 0)
        self.amount = np.where(held[slots] > 0, self.amount * exact[slots], loads[slots] / count[slots])
        self.edges: list[list[tuple[int, int, int]]] = [[] for _ in ranks.speed]  # of a rank: own slot, slot, rank
        for expert in np.flatnonzero(count > 1):
            at = np.flatnonzero(slots == expert)
            for a in at:
                self.edges[ranks.of_slot[a]] += [(int(a), int(b), int(ranks.of_slot[b])) for b in at if b != a]

    def load(self) -> Floats:
        return np.bincount(self.ranks.of_slot, self.amount, len(self.ranks.speed)).astype(np.float64)

    def fit(self, limit: float) -> Ints:
        """Bring every rank under the limit. Returns the ranks that cannot be relieved, and all that they can reach."""
        room = limit * self.speed - self.load()
        small = 1e-9 * limit
        while True:
            found = self._path(room, small)
            if isinstance(found, set):
                return np.array(sorted(found), np.int64)
            path, start, end = found
            moved = min(-room[start], room[end], *(self.amount[a] for a, _ in path))
            for a, b in path:
                self.amount[a] -= moved
                self.amount[b] += moved
            room[start] += moved
            room[end] -= moved

    def _path(self, room: Floats, small: float) -> tuple[list[tuple[int, int]], int, int] | set[int]:
        """The shortest way from any rank that is too full to any that has room, or all that the full ones reach."""
        came: dict[int, tuple[int, int, int] | None] = {int(rank): None for rank in np.flatnonzero(room < -small)}
        queue = deque(came)
        while queue:
            rank = queue.popleft()
            for a, b, other in self.edges[rank]:
                if other in came or self.amount[a] <= small * 1e-3:
                    continue
                came[other] = (rank, a, b)
                if room[other] > small * 1e-3:
                    path, at = [], other
                    while (step := came[at]) is not None:
                        at = step[0]
                        path.append(step[1:])
                    return path, at, other
                queue.append(other)
        return set(came)

    def confined(self, over: Ints) -> float:
        """The load of the experts that have no replica outside of these ranks."""
        outside = np.unique(self.slots[~np.isin(self.ranks.of_slot, over)])
        inside = np.ones(len(self.loads), np.bool_)
        inside[outside] = False
        return float(self.loads[inside].sum())
