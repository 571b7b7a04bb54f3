"""Placements that keep a token on few nodes: experts that are used together live together, as far as load allows."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from sparsec.passes.placement.search import Ranks

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

CAP = 1.05
"""How full, over the mean, a rank may get before a token goes to another replica than the nearest."""

CHANCE = 1.0
"""How many standard deviations above its count an expert without replicas weighs: no other rank can take more of it."""


SLACKS = (1.03, 1.06, 1.01, 1.1)


@dataclass(frozen=True)
class Dispatch:
    """Where tokens went.

    Args:
        slot: [tokens, k], the slot of each pick.
        load: [ranks], picks over the speed, over the mean.
        nodes: the mean number of distinct nodes of a token.
    """

    slot: Ints
    load: Floats
    nodes: float


def dispatch(slots: Ints, routed: Ints, ranks: Ranks, node: Ints, cap: float = CAP) -> Dispatch:
    """Send every pick to a replica: to a node that the token goes to anyway, else to the least loaded rank.

    The batch's counts are known before: what has one replica only is counted as there from the start.

    Args:
        slots: [slots], the expert in each slot.
        routed: [tokens, k], experts.
        node: [ranks].
        cap: a rank fuller than this times its share of all picks is avoided where there is another.
    """
    homes = [np.flatnonzero(slots == expert).tolist() for expert in range(int(max(slots.max(), routed.max())) + 1)]
    rank_of, node_of = ranks.of_slot.tolist(), node[ranks.of_slot].tolist()
    nodes_of = [{node_of[slot] for slot in some} for some in homes]
    speed = ranks.speed.astype(np.float64)
    limit = (cap * routed.size * speed / speed.sum()).tolist()
    single = np.array([some[0] if len(some) == 1 else -1 for some in homes])[routed]
    load = np.bincount(ranks.of_slot[single[single >= 0]], minlength=len(speed)).astype(float).tolist()
    chosen = np.empty(routed.shape, np.int64)
    total = 0
    for token, row in enumerate(routed.tolist()):
        order = sorted(range(len(row)), key=lambda pick: len(homes[row[pick]]))
        used: set[int] = set()
        for place, pick in enumerate(order):
            options = homes[row[pick]]
            if len(options) > 1:
                options = [slot for slot in options if load[rank_of[slot]] < limit[rank_of[slot]]] or options
                near = [slot for slot in options if node_of[slot] in used]
                if not near and place + 1 < len(order):  # a node that later picks can go to as well
                    later = [nodes_of[row[other]] for other in order[place + 1 :]]
                    shared = [sum(node_of[slot] in some for some in later) for slot in options]
                    near = [slot for slot, count in zip(options, shared, strict=True) if count == max(shared)]
                slot = min(near or options, key=lambda slot: load[rank_of[slot]] / limit[rank_of[slot]])
                load[rank_of[slot]] += 1
            else:
                slot = options[0]
            chosen[token, pick] = slot
            used.add(node_of[slot])
        total += len(used)
    rows = np.array(load) / speed
    return Dispatch(chosen, rows * speed.sum() / routed.size, total / len(routed))


def place(routed: Ints, weight: Floats, ranks: Ranks, node: Ints, slack: float = 1.03) -> Ints:
    """Place one layer's experts.

    First a partition into nodes, improved by swaps that lower the number of (token, node) pairs; then spare slots
    for replicas, first where one rank cannot carry an expert, then where most tokens are saved a node; then ranks
    within nodes, heaviest first.

    Args:
        routed: [tokens, k].
        weight: [experts], load over the ranks' mean.
        slack: how full a node may get over its share of the load.

    Returns:
        [slots].
    """
    state = _Nodes(routed, weight, ranks, node, slack)
    state.partition()
    state.swap()
    state.replicate()
    each = np.repeat((weight / state.hosts.sum(1))[:, None], state.nodes, 1)
    best, least = state.pack(each), np.inf
    for _ in range(4):  # with what each replica was sent, pack again
        slots = state.pack(each)
        sent = dispatch(slots, routed, ranks, node, 1.0)
        if float(sent.load.max()) < least:
            best, least = slots, float(sent.load.max())
        each = np.zeros((state.experts, state.nodes))
        np.add.at(each, (slots[sent.slot], node[ranks.of_slot[sent.slot]]), 1.0)
        each /= np.maximum(state.hosts, 1)
    return best


def best_place(
    routed: Ints, weight: Floats, ranks: Ranks, node: Ints, seconds: float = float("inf")
) -> tuple[Ints, Dispatch, bool]:
    """The best of some slacks: fewest nodes per token, weighed with the load of the fullest rank.

    Args:
        seconds: after these no further slack is tried.

    Returns:
        [slots], where the tokens went, and whether time ran out.
    """
    deadline = monotonic() + seconds
    found: list[tuple[float, Ints, Dispatch]] = []
    for slack in SLACKS:
        if found and monotonic() > deadline:
            break
        slots = place(routed, weight, ranks, node, slack)
        sent = dispatch(slots, routed, ranks, node, 1.0)
        found.append((sent.nodes * max(1.02, float(sent.load.max())) ** 2, slots, sent))
    _, slots, sent = min(found, key=lambda one: one[0])
    return slots, sent, len(found) < len(SLACKS)


class _Nodes:
    """Experts on nodes: `home` of each expert ([experts]), further replicas in `hosts` ([experts, nodes])."""

    def __init__(self, routed: Ints, weight: Floats, ranks: Ranks, node: Ints, slack: float) -> None:
        self.routed, self.weight, self.ranks, self.node = routed, weight, ranks, node
        self.experts, self.nodes = len(weight), int(node.max()) + 1
        self.used = np.zeros((len(routed), self.experts), np.float32)
        self.used[np.arange(len(routed))[:, None], routed] = 1
        self.spare = 1 + CHANCE / np.sqrt(np.maximum(self.used.sum(0), 1.0))
        size = np.bincount(ranks.of_slot, minlength=len(node))
        self.room = np.bincount(node, size, self.nodes).astype(np.int64)
        share = np.bincount(node, ranks.speed, self.nodes)
        self.most = share / share.sum() * weight.sum() * slack
        self.width = np.bincount(node, minlength=self.nodes)
        self.home = np.zeros(self.experts, np.int64)

    def partition(self) -> None:
        """Heaviest first, to the node where most of its companions are; leave room for the spare slots evenly."""
        spare = int(self.room.sum()) - self.experts
        room = self.room - np.floor(spare * self.room / self.room.sum()).astype(np.int64)
        together = self.used.T @ self.used
        near = np.zeros((self.experts, self.nodes))
        load = np.zeros(self.nodes)
        for expert in np.argsort(-self.weight, kind="stable"):
            fits = room > 0
            good = fits & (load + self.weight[expert] <= self.most)
            scores = near[expert] / max(1.0, float(near[expert].max())) - 2 * load / self.most
            node = int(np.where(good if good.any() else fits, scores, -np.inf).argmax())
            self.home[expert] = node
            near[:, node] += together[expert]
            room[node] -= 1
            load[node] += self.weight[expert]

    def swap(self, rounds: int = 400) -> None:
        """Swap the two experts of different nodes that save most, while load stays in bounds."""
        per_node = self.used @ np.eye(self.nodes, dtype=np.float32)[self.home]
        load = np.bincount(self.home, self.weight, self.nodes)
        for _ in range(rounds):
            leave = (self.used.T @ (per_node == 1).astype(np.float32))[np.arange(self.experts), self.home]
            join = self.used.T @ (per_node == 0).astype(np.float32)
            out = leave[:, None] - join[:, self.home]  # e leaves for the node of f
            gain = out + out.T
            delta = self.weight[None, :] - self.weight[:, None]  # what the node of e gains
            after = load[self.home][:, None] + delta
            over = np.maximum(after - self.most[self.home][:, None], 0)
            was = np.maximum(load - self.most, 0)[self.home]
            worse = over + over.T - was[:, None] - was[None, :]
            gain = np.where(worse > 1e-9, -np.inf, gain - 1e3 * np.minimum(worse, 0))
            gain[self.home[:, None] == self.home[None, :]] = -np.inf
            tried = False
            for flat in np.argsort(-gain, axis=None)[:16]:
                e, f = divmod(int(flat), self.experts)
                if gain[e, f] <= 0:
                    break
                pair = self.home[[e, f]]
                change = self.used[:, f] - self.used[:, e]
                new = per_node[:, pair] + np.stack([change, -change], 1)
                if (new > 0).sum() < (per_node[:, pair] > 0).sum() or worse[e, f] < -1e-9:
                    self.home[[e, f]] = pair[::-1]
                    per_node[:, pair], tried = new, True
                    load = np.bincount(self.home, self.weight, self.nodes)
                    break
            if not tried:
                break
        self.per_node = per_node

    def replicate(self) -> None:
        """Fill the spare slots."""
        self.hosts = np.zeros((self.experts, self.nodes), np.int64)
        self.hosts[np.arange(self.experts), self.home] = 1
        room = self.room - self.hosts.sum(0)
        per_node = self.per_node.copy()
        serving = self.home[self.routed]
        tokens = np.arange(len(self.routed))
        limit = float(self.weight.sum()) / float(self.ranks.speed.sum())
        load = np.bincount(self.home, self.weight, self.nodes)
        while room.sum() > 0:
            number = self.hosts.sum(1)
            alone = per_node[tokens[:, None], serving] == 1
            token, pick = np.nonzero(alone)
            only, there = self.routed[token, pick], per_node[token] > 0
            saved = np.stack([np.bincount(only, there[:, one], self.experts) for one in range(self.nodes)], 1)
            saved[np.arange(self.experts), self.home] = 0
            hot = self.weight / number
            score = saved / max(1.0, float(saved.max()))
            score -= load / self.most * 0.2
            if hot.max() > 0.75 * limit:
                score[hot < hot.max()] = -np.inf
            score[:, room == 0] = -np.inf
            score[self.hosts > 0] = -np.inf
            if not np.isfinite(score).any():  # more replicas in a node that has one, on another rank
                score = np.where((room > 0) & (self.hosts < self.width), hot[:, None], -np.inf)
            expert, node = divmod(int(score.argmax()), self.nodes)
            self.hosts[expert, node] += 1
            room[node] -= 1
            token, pick = np.nonzero(alone & (self.routed == expert) & (per_node[:, node, None] > 0))
            per_node[token, serving[token, pick]] -= 1
            per_node[token, node] += 1
            serving[token, pick] = node
            part = self.weight[expert] / self.hosts[expert].sum()
            load[node] += part
            load[self.home[expert]] -= part

    def pack(self, each: Floats) -> Ints:
        """The ranks of every node, heaviest first. `each` ([experts, nodes]) is the load of a replica."""
        slots = np.full(len(self.ranks.of_slot), -1, np.int64)
        for node in range(self.nodes):
            ranks = np.flatnonzero(self.node == node)
            free = {int(rank): np.flatnonzero(self.ranks.of_slot == rank).tolist() for rank in ranks}
            load = dict.fromkeys(free, 0.0)
            items = np.repeat(np.arange(self.experts), self.hosts[:, node])
            weight = each[:, node] * np.where(self.hosts.sum(1) == 1, self.spare, 1.0)
            for expert in items[np.lexsort((items, -weight[items], -self.hosts[items, node]))].tolist():
                open_ = [rank for rank, some in free.items() if some]
                apart = [rank for rank in open_ if expert not in slots[self.ranks.of_slot == rank]]
                rank = min(apart or open_, key=lambda rank: load[rank])
                slots[free[rank].pop(0)] = expert
                load[rank] += float(weight[expert]) / float(self.ranks.speed[rank])
            self._level(slots, np.flatnonzero(self.node[self.ranks.of_slot] == node), weight)
        return slots

    def _level(self, slots: Ints, at: Ints, weight: Floats) -> None:
        """Swap experts between the ranks of a node, of which `at` are the slots, as long as its fullest rank gains."""
        rank, speed = self.ranks.of_slot[at], self.ranks.speed.astype(np.float64)
        for _ in range(4 * len(at)):
            held = weight[slots[at]]
            load = np.bincount(rank, held, len(speed)) / speed
            hot = int(load.argmax())
            mine = np.flatnonzero(rank == hot)
            moved = held[mine][:, None] - held[None, :]
            after = np.maximum(load[hot] - moved / speed[hot], load[rank] + moved / speed[rank])
            together = slots[at][:, None] == slots[at][None, :]
            on = together @ (rank[:, None] == np.arange(len(speed)))
            after[on[mine][:, rank] | on[:, hot][None, :] | (moved <= 0)] = np.inf
            i, j = divmod(int(after.argmin()), len(at))
            if after[i, j] >= load[hot] * (1 - 1e-6):
                return
            first, second = at[mine[i]], at[j]
            slots[[first, second]] = slots[[second, first]]
