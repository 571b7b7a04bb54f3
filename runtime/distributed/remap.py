"""Experts to slots: which replica of its expert a token goes to.

Everything here is a pure function of tables, counts and the rank, so that whoever knows them can repeat it.

In two steps. First the rank's quotas: whole numbers, how many of its picks go to each slot. Then the deal: the picks of
an expert, in the order of tokens and of picks in a token, are numbered n = 0..N-1. Number n takes place n * step mod N,
with the step coprime to N and next to N over the golden ratio, and the places are given to the replicas in the order of
their slots, to each as many as its quota says. So every stretch of tokens is spread over the replicas as the whole is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsec.runtime.distributed.split import best_split
from sparsec.runtime.errors import InputError

if TYPE_CHECKING:
    from sparsec.runtime.distributed.world import World

POLICIES = ("static", "local", "batch")
GOLDEN = 0.6180339887498949
TRIES = sorted(range(-24, 25), key=lambda d: (abs(d), -d))
"""How far from the golden ratio a step is looked for, nearest first; some of 40 in a row is coprime to any N < 1e8."""


def remap(world: World, ids: Tensor, slots: Tensor, shares: Tensor, *, experts: int, policy: str = "static") -> Tensor:
    """The slot of every pick.

    Args:
        ids: [T, k], integer, experts; outside of 0..experts-1: skip.
        slots: [P] integer, the expert in each slot, the ranks in order, as many slots on each.
        shares: [P] float, the share of its expert's picks that a slot gets.
        policy: "static" (by the shares), "local" (to replicas of the own rank, else of the own node, else to all, by
            their shares) or "batch" (ranks tell each other their counts, and the fullest rank gets as little as can be;
            shares do not count).

    Returns: [T, k] int64; P: skip.

    Raises:
        InputError: there is no such policy, the slots do not fill the ranks, or an expert was picked that has no slot.
        RankError: a rank is dead or does not answer ("batch").
    """
    counts = world.gather(count(ids, experts)) if policy == "batch" else None
    return physical(
        ids, slots, shares, experts=experts, ranks=world.size, width=world.width, rank=world.rank, policy=policy,
        counts=counts,
    )  # fmt: skip


def physical(
    ids: Tensor,
    slots: Tensor,
    shares: Tensor,
    *,
    experts: int,
    ranks: int,
    width: int,
    rank: int,
    policy: str = "static",
    counts: Tensor | None = None,
) -> Tensor:
    """What `remap` yields on a rank, without the other ranks.

    Args:
        ranks, width: of the world: how many, and how many in a node.
        counts: [ranks, experts], of all ranks' ids; for "batch" only.

    Raises: InputError.
    """
    if policy not in POLICIES:
        raise InputError(f"remap with policy '{policy}': there are {', '.join(POLICIES)}")
    if slots.dim() != 1 or slots.shape != shares.shape or len(slots) % ranks:
        raise InputError(
            f"remap takes slots and shares [P], as many on each of {ranks} ranks; got {list(slots.shape)} and "
            f"{list(shares.shape)}"
        )
    slots = slots.long()
    if counts is None:
        if policy == "batch":
            raise InputError("remap with policy 'batch' needs the counts of all ranks")
        counts = count(ids, experts)
    placed = torch.bincount(slots, minlength=experts) > 0
    lost = (counts.view(-1, experts).sum(0) > 0) & ~placed
    if bool(lost.any()):
        raise InputError(f"expert {int(lost.nonzero()[0])} was picked but has no slot: the placement lacks it")
    return deal(ids, slots, quotas(counts, slots, shares, rank, ranks, width, policy), experts)


def quotas(
    counts: Tensor, slots: Tensor, shares: Tensor, rank: int, ranks: int, width: int, policy: str = "static"
) -> Tensor:
    """[P] int64, how many of a rank's picks go to each slot.

    Args:
        counts: [experts], the picks of this rank; [ranks, experts], of all, for "batch".
        width: ranks per node.
    """
    if policy == "batch":
        total = counts.sum(0).tolist()
        amounts = torch.tensor(best_split(total, slots.tolist(), ranks), device=counts.device)
        return nearest(counts, amounts, slots, rank, width)
    if policy == "local":
        shares = near(slots, shares, len(counts), rank, ranks, width)
    return by_shares(counts, slots, shares, rank)


def count(ids: Tensor, experts: int) -> Tensor:
    """[experts] int64, the picks of each expert."""
    flat = ids.reshape(-1).long()
    flat = torch.where((flat >= 0) & (flat < experts), flat, experts)
    return torch.bincount(flat, minlength=experts + 1)[:experts]


def by_shares(counts: Tensor, slots: Tensor, shares: Tensor, rank: int) -> Tensor:
    """[P] int64: quotas within one of an expert's count [experts] times the shares, and as them on average.

    The n picks of expert e are cut at n times the sums of shares, all moved by u = frac(golden ratio * (rank + e)), and
    rounded down: which replica gets the odd one differs by rank and expert.
    """
    experts = len(counts)
    order = torch.argsort(slots, stable=True)
    expert = slots[order]
    share = shares.double()[order]
    whole = torch.zeros(experts, dtype=torch.float64, device=slots.device).index_add_(0, expert, share)
    copies = torch.bincount(slots, minlength=experts)
    share = torch.where(whole[expert] > 0, share / whole[expert].clamp_min(1e-300), 1.0 / copies[expert])
    last = copies.cumsum(0) - 1
    total = share.cumsum(0)
    start = torch.cat([total.new_zeros(1), total])[last - copies + 1]  # sum of the shares of lower experts
    upper = total - start[expert]
    upper[last[copies > 0]] = 1.0
    moved = (rank + torch.arange(experts, device=slots.device)).double() * GOLDEN % 1.0
    cut = (counts[expert] * upper + moved[expert]).floor().long()
    before = torch.cat([cut.new_zeros(1), cut[:-1]])
    before[(last - copies + 1)[copies > 0]] = 0
    return torch.empty_like(cut).index_copy_(0, order, cut - before)


def near(slots: Tensor, shares: Tensor, experts: int, rank: int, ranks: int, width: int) -> Tensor:
    """[P]: the shares, 0 but for the replicas of an expert that are nearest to the rank among those with a share."""
    home = torch.arange(len(slots), device=slots.device) // (len(slots) // ranks)
    level = 1 + (home // width == rank // width).long() + (home == rank).long()
    level = torch.where(shares > 0, level, 0)
    best = level.new_zeros(experts).scatter_reduce_(0, slots, level, "amax")
    return torch.where(level == best[slots], shares, 0)


def nearest(counts: Tensor, amounts: Tensor, slots: Tensor, rank: int, width: int) -> Tensor:
    """[P] int64: a rank's quotas where the slots' tokens [P] are given; counts are [ranks, experts].

    Slots first take tokens of their own rank, then what is left of their node, then of all: in each of these groups an
    expert's tokens stand in line by rank, its slots' room in line by slot, and what is at the same place goes together.
    """
    ranks, experts = counts.shape
    home = torch.arange(len(slots), device=slots.device) // (len(slots) // ranks)
    out = torch.zeros_like(amounts)
    for span in (1, width, ranks):
        group = home // span
        key = group * experts + slots
        room = torch.zeros(ranks // span * experts, dtype=amounts.dtype, device=slots.device)
        room.index_add_(0, key, amounts)
        demand = counts.view(ranks // span, span, experts)
        ahead = demand.cumsum(1) - demand
        met = torch.minimum(demand.sum(1), room.view(-1, experts))
        served = torch.minimum((met[:, None] - ahead).clamp_min(0), demand).view(ranks, experts)
        order = torch.argsort(key, stable=True)
        line = amounts[order].cumsum(0) - amounts[order]
        first = line[torch.searchsorted(key[order], key[order])]
        begin = torch.empty_like(line).index_copy_(0, order, line - first)
        taken = torch.minimum((met.view(-1)[key] - begin).clamp_min(0), amounts)
        mine = ahead.reshape(ranks, experts)[rank][slots]
        both = torch.minimum(mine + served[rank][slots], begin + taken) - torch.maximum(mine, begin)
        out += torch.where(group == rank // span, both.clamp_min(0), 0)
        counts, amounts = counts - served, amounts - taken
    return out


def deal(ids: Tensor, slots: Tensor, quotas: Tensor, experts: int) -> Tensor:
    """[T, k] int64: the slot of every pick, as many to each slot as its quota; P: skip."""
    flat = ids.reshape(-1).long()
    picked = (flat >= 0) & (flat < experts)
    flat = torch.where(picked, flat, experts)
    by_expert, order = torch.sort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts + 1)
    start = counts.cumsum(0) - counts
    n = torch.arange(len(flat), device=flat.device) - start[by_expert]
    place = n * _steps(counts)[by_expert] % counts[by_expert].clamp_min(1)
    by_slot = torch.argsort(slots, stable=True)
    until = quotas[by_slot].cumsum(0)
    found = torch.searchsorted(until, start[by_expert] + place, right=True).clamp_max(len(slots) - 1)
    out = torch.empty_like(flat).index_copy_(0, order, by_slot[found])
    return torch.where(picked, out, len(slots)).view(ids.shape)


def _steps(counts: Tensor) -> Tensor:
    """[E]: of each number the one coprime to it that is nearest to it over the golden ratio."""
    tries = (counts.double() * GOLDEN).round().long()[:, None] + torch.tensor(TRIES, device=counts.device)
    coprime = (tries > 0) & (torch.gcd(tries.clamp_min(1), counts[:, None]) == 1)
    first = coprime.int().argmax(1, keepdim=True)
    return torch.where(coprime.any(1), tries.gather(1, first)[:, 0], 1)
