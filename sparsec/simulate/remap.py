"""Which replica of its expert a token goes to, before any rank has run: the rule of `runtime/distributed/remap.py`.

That file says what the rule is; this one follows it with numpy, for all ranks at once. Only the best split of a batch
is the runtime's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsec.diagnostics import SparsecError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

POLICIES = ("static", "local", "batch")
GOLDEN = 0.6180339887498949
TRIES = np.array(sorted(range(-24, 25), key=lambda d: (abs(d), -d)))


@dataclass(frozen=True)
class Table:
    """One layer's placement.

    Args:
        slots: [P], the expert in each slot; as many slots on each rank.
        shares: [P], of the expert's tokens.
        width: ranks per node.
    """

    slots: Ints
    shares: Floats
    experts: int
    ranks: int
    width: int

    @property
    def rank_of_slot(self) -> Ints:
        return np.arange(len(self.slots)) // (len(self.slots) // self.ranks)


def remap(table: Table, ids: list[Ints], policy: str = "static") -> list[Ints]:
    """The slot of every pick of every rank.

    Args:
        ids: per rank [T, k], experts; outside of 0..experts-1: skip.

    Returns: per rank [T, k]; P: skip.

    Raises:
        SparsecError: there is no such policy.
    """
    if policy not in POLICIES:
        raise SparsecError(f"there is no policy '{policy}'\n  hint: {', '.join(POLICIES)}")
    inside = [one[(one >= 0) & (one < table.experts)] for one in ids]
    counts = np.stack([np.bincount(one, minlength=table.experts) for one in inside])
    if policy == "batch":
        quotas = _nearest(table, counts)
    else:
        shares = [table.shares if policy == "static" else _near(table, rank) for rank in range(len(ids))]
        quotas = np.stack([_by_shares(table, counts[rank], shares[rank], rank) for rank in range(len(ids))])
    return [_deal(table, one, quota) for one, quota in zip(ids, quotas, strict=True)]


def _by_shares(table: Table, counts: Ints, shares: Floats, rank: int) -> Ints:
    """[P]: quotas that follow the shares; who gets the odd token differs by rank and expert."""
    order = np.argsort(table.slots, kind="stable")
    expert = table.slots[order]
    copies = np.bincount(table.slots, minlength=table.experts)
    whole = np.zeros(table.experts)
    np.add.at(whole, expert, shares[order])
    share = np.where(whole[expert] > 0, shares[order] / np.maximum(whole[expert], 1e-300), 1.0 / copies[expert])
    last = np.cumsum(copies) - 1
    total = np.cumsum(share)
    upper = total - np.concatenate([[0.0], total])[last - copies + 1][expert]
    upper[last[copies > 0]] = 1.0
    moved = (rank + np.arange(table.experts)).astype(np.float64) * GOLDEN % 1.0
    cut = np.floor(counts[expert] * upper + moved[expert]).astype(np.int64)
    before = np.concatenate([[0], cut[:-1]])
    before[(last - copies + 1)[copies > 0]] = 0
    quotas = np.empty_like(cut)
    quotas[order] = cut - before
    return quotas


def _near(table: Table, rank: int) -> Floats:
    """[P]: the shares of the nearest replicas: on the rank, else on its node, else anywhere."""
    home = table.rank_of_slot
    level = 1 + (home // table.width == rank // table.width).astype(np.int64) + (home == rank)
    level = np.where(table.shares > 0, level, 0)
    best = np.zeros(table.experts, np.int64)
    np.maximum.at(best, table.slots, level)
    return np.where(level == best[table.slots], table.shares, 0.0)


def _nearest(table: Table, counts: Ints) -> Ints:
    """[ranks, P]: the best split of a batch; slots take of their own rank first, then of their node, then of all."""
    from sparsec.runtime.distributed.split import best_split

    amounts = np.array(best_split(counts.sum(0).tolist(), table.slots.tolist(), table.ranks), np.int64)
    left, quotas = counts.copy(), np.zeros((table.ranks, len(table.slots)), np.int64)
    for span in (1, table.width, table.ranks):
        for group in range(table.ranks // span):
            members = range(group * span, (group + 1) * span)
            mine = np.flatnonzero(table.rank_of_slot // span == group)
            for expert in np.unique(table.slots[mine]):
                lines = mine[table.slots[mine] == expert]
                for rank, slot, rows in _matched(left[members, expert], amounts[lines]):
                    quotas[members[rank], lines[slot]] += rows
                    left[members[rank], expert] -= rows
                    amounts[lines[slot]] -= rows
    return quotas


def _matched(demand: Ints, room: Ints) -> list[tuple[int, int, int]]:
    """Two queues served from their heads: (place in one, place in the other, how many)."""
    found: list[tuple[int, int, int]] = []
    a, b, ahead, taken = 0, 0, demand.tolist(), room.tolist()
    while a < len(ahead) and b < len(taken):
        rows = min(ahead[a], taken[b])
        if rows:
            found.append((a, b, rows))
            ahead[a] -= rows
            taken[b] -= rows
        a, b = (a + 1, b) if not ahead[a] else (a, b + 1)
    return found


def _deal(table: Table, ids: Ints, quotas: Ints) -> Ints:
    """[T, k]: an expert's picks in order, number n at place n * step mod N; slots take places by their quotas."""
    flat = ids.reshape(-1)
    picked = (flat >= 0) & (flat < table.experts)
    flat = np.where(picked, flat, table.experts)
    order = np.argsort(flat, kind="stable")
    counts = np.bincount(flat, minlength=table.experts + 1)
    start = np.cumsum(counts) - counts
    expert = flat[order]
    number = np.arange(len(flat)) - start[expert]
    tries = np.round(counts * GOLDEN).astype(np.int64)[:, None] + TRIES
    coprime = (tries > 0) & (np.gcd(np.maximum(tries, 1), counts[:, None]) == 1)
    step = np.where(coprime.any(1), tries[np.arange(len(tries)), coprime.argmax(1)], 1)
    place = number * step[expert] % np.maximum(counts[expert], 1)
    by_slot = np.argsort(table.slots, kind="stable")
    at = np.searchsorted(np.cumsum(quotas[by_slot]), start[expert] + place, side="right")
    out = np.empty(len(flat), np.int64)
    out[order] = by_slot[np.minimum(at, len(by_slot) - 1)]
    return np.where(picked, out, len(by_slot)).reshape(ids.shape)
