"""The best split of one batch: whole tokens to replicas, so that the fullest rank has as few as can be.

Exact, and the same on every rank: integers only. Newton's method on the load T of the fullest rank: tokens are moved
off ranks above T along shortest paths of replicas; where that ends before all are relieved, the ranks reached must hold
all the tokens of the experts that are on no other rank, and their mean is the next T.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

Edge = tuple[int, int, int]
"""A slot, another slot of the same expert, and the other's rank."""


def best_split(counts: Sequence[int], slots: Sequence[int], ranks: int) -> list[int]:
    """Tokens for every slot.

    Args:
        counts: [experts], tokens of each.
        slots: [P], the expert in each slot, the ranks in order, as many slots on each. Every expert that has tokens is
            in one of them.

    Returns: [P]; an expert's slots get its count.
    """
    per_rank = len(slots) // ranks
    replicas: list[list[int]] = [[] for _ in counts]
    for slot, expert in enumerate(slots):
        replicas[expert].append(slot)
    amount, load = [0] * len(slots), [0] * ranks
    for expert in sorted(range(len(counts)), key=lambda e: (len(replicas[e]) > 1, -counts[e], e)):
        for slot, tokens in _level(counts[expert], replicas[expert], load, per_rank):
            amount[slot] = tokens
            load[slot // per_rank] += tokens
    edges: list[list[Edge]] = [[] for _ in range(ranks)]
    for mine in replicas:
        for a in mine if len(mine) > 1 else ():
            edges[a // per_rank] += [(a, b, b // per_rank) for b in mine if b != a]
    limit = -(-sum(counts) // ranks)
    while over := _relieve(amount, load, edges, limit):
        inside = [e for e, mine in enumerate(replicas) if all(slot // per_rank in over for slot in mine)]
        limit = -(-sum(counts[e] for e in inside) // len(over))
    return amount


def _level(tokens: int, mine: list[int], load: list[int], per_rank: int) -> list[tuple[int, int]]:
    """Split an expert's tokens so that the ranks it is on end as level as they can, given what they have."""
    if len(mine) < 2:
        return [(slot, tokens) for slot in mine]
    order = sorted(mine, key=lambda slot: (load[slot // per_rank], slot))
    held = 0
    for n, slot in enumerate(order, 1):
        held += load[slot // per_rank]
        if n == len(order) or held + tokens <= n * load[order[n] // per_rank]:
            level, rest = divmod(held + tokens, n)
            return [(slot, level + (i < rest) - load[slot // per_rank]) for i, slot in enumerate(order[:n])]
    raise AssertionError


def _relieve(amount: list[int], load: list[int], edges: list[list[Edge]], limit: int) -> set[int]:
    """Bring every rank under the limit. Returns the ranks that cannot be brought there, and all that they can reach."""
    while True:
        came: dict[int, Edge | None] = {rank: None for rank, tokens in enumerate(load) if tokens > limit}
        end = _search(came, amount, load, edges, limit)
        if end is None:
            return set(came)
        path = list[Edge]()
        at, per_rank = end, len(amount) // len(load)
        while (edge := came[at]) is not None:
            path.append(edge)
            at = edge[0] // per_rank
        moved = min(load[at] - limit, limit - load[end], *(amount[a] for a, _, _ in path))
        for a, b, _ in path:
            amount[a] -= moved
            amount[b] += moved
        load[at] -= moved
        load[end] += moved


def _search(
    came: dict[int, Edge | None], amount: list[int], load: list[int], edges: list[list[Edge]], limit: int
) -> int | None:
    """The nearest rank that has room, from those in `came`, which gets every rank that is reached."""
    queue = deque(came)
    while queue:
        for edge in edges[queue.popleft()]:
            if edge[2] not in came and amount[edge[0]] > 0:
                came[edge[2]] = edge
                if load[edge[2]] < limit:
                    return edge[2]
                queue.append(edge[2])
    return None
