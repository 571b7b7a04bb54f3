"""Experts to slots: which replica of its expert a token goes to.

Everything here is a pure function of tables, counts and the rank, so that whoever knows them can repeat it.

First the rank's quotas: whole numbers, how many of its picks go to each slot. They decide the load of every rank. Then
the deal, within the quotas, which decides how many rows are sent:

1. picks of experts that have one slot with a quota go there;
2. picks that are left go to a slot on a rank, else on a node, that their token goes to already, first come first served
   in the order of tokens and of picks in a token, as long as the slot's quota lasts;
3. the rest is spread by a lattice: the picks of an expert that are left are numbered n = 0..N-1; number n takes place
   n * step mod N, with the step coprime to N and next to N over the golden ratio; places are given to the replicas in
   the order of their slots, to each as many as is left of its quota. So every stretch of tokens is spread as the whole.
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
ROUNDS = 4  #: of step 2: a pick whose slot was full tries the next
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
    if policy != "batch":
        counts = count(ids, experts)
    elif counts is None:
        raise InputError("remap with policy 'batch' needs the counts of all ranks")
    placed = torch.bincount(slots, minlength=experts) > 0
    lost = (counts.view(-1, experts).sum(0) > 0) & ~placed
    if bool(lost.any()):
        raise InputError(f"expert {int(lost.nonzero()[0])} was picked but has no slot: the placement lacks it")
    quota = quotas(counts, slots, shares, rank, ranks, width, policy)
    return deal(ids, slots, quota, experts, ranks, width)


def quotas(
    counts: Tensor, slots: Tensor, shares: Tensor, rank: int, ranks: int, width: int, policy: str = "static"
) -> Tensor:
    """[P] int64, how many of a rank's picks go to each slot.

    Args:
        counts: [experts], the picks of this rank; [ranks, experts], of all, for "batch".
        width: ranks per node.
    """
    if policy == "batch":
        total = counts.sum(0)
        amounts = torch.tensor(best_split(total.tolist(), slots.tolist(), ranks), device=counts.device)
        expert = torch.repeat_interleave(torch.arange(len(total), device=counts.device), counts[rank])
        number = _number(expert, counts[rank]) + counts[:rank].sum(0)[expert]  # in line after the ranks before
        return torch.bincount(_spread(expert, number, total, slots, amounts), minlength=len(slots))
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


def deal(ids: Tensor, slots: Tensor, quotas: Tensor, experts: int, ranks: int, width: int) -> Tensor:
    """[T, k] int64: the slot of every pick, as many to each slot as its quota [P]; P: skip."""
    total = len(slots)
    flat = ids.reshape(-1).long()
    token = torch.arange(len(flat), device=flat.device) // max(ids.shape[-1], 1)
    rank_of = torch.arange(total, device=flat.device) // (total // ranks)
    out = torch.full_like(flat, total)
    goes = [torch.zeros(len(ids), places, dtype=torch.bool, device=flat.device) for places in (ranks, ranks // width)]
    left = quotas.clone()

    def give(picks: Tensor, to: Tensor) -> None:
        out[picks] = to
        goes[0][token[picks], rank_of[to]] = True
        goes[1][token[picks], rank_of[to] // width] = True
        left.sub_(torch.bincount(to, minlength=total))

    def rest(picks: Tensor) -> Tensor:
        expert = flat[picks]
        counts = torch.bincount(expert, minlength=experts)
        return _spread(expert, _number(expert, counts), counts, slots, left)

    picks = torch.where((flat >= 0) & (flat < experts))[0]
    choices = torch.bincount(slots[quotas > 0], minlength=experts)
    has_choice = choices[flat[picks]] > 1
    give(picks[~has_choice], rest(picks)[~has_choice])
    picks = picks[has_choice]
    replicas = _replicas(slots, experts)
    for _ in range(ROUNDS if len(picks) else 0):
        options = replicas[flat[picks]]
        at = options.clamp_max(total - 1)
        is_open = (options < total) & (left[at] > 0)
        goes_to = goes[0][token[picks, None], rank_of[at]].long() + goes[1][token[picks, None], rank_of[at] // width]
        best, index = (goes_to * is_open).max(1)
        to = torch.where(best > 0, options.gather(1, index[:, None])[:, 0], total)
        ordered, order = torch.sort(to, stable=True)
        line = torch.arange(len(to), device=to.device) - torch.searchsorted(ordered, ordered)
        served = order[(ordered < total) & (line < left[ordered.clamp_max(total - 1)])]
        give(picks[served], to[served])
        picks = picks[out[picks] == total]
    give(picks, rest(picks))
    return out.view(ids.shape)


def _replicas(slots: Tensor, experts: int) -> Tensor:
    """[experts, most replicas]: the slots of each expert, ascending; P where there are fewer."""
    counts = torch.bincount(slots, minlength=experts)
    order = torch.argsort(slots, stable=True)
    table = slots.new_full((experts, int(counts.max())), len(slots))
    table[slots[order], _number(slots[order], counts)] = order
    return table


def _number(expert: Tensor, counts: Tensor) -> Tensor:
    """[n]: how many of the same expert come before. `counts`: [experts], of each in all."""
    by_expert, order = torch.sort(expert, stable=True)
    line = torch.arange(len(expert), device=expert.device) - (counts.cumsum(0) - counts)[by_expert]
    return torch.empty_like(expert).index_copy_(0, order, line)


def _spread(expert: Tensor, number: Tensor, counts: Tensor, slots: Tensor, amounts: Tensor) -> Tensor:
    """[n]: by the lattice, the slot of pick `number` [n] of its expert's `counts` [experts]; to a slot its amount."""
    place = number * _steps(counts)[expert] % counts[expert].clamp_min(1)
    by_slot = torch.argsort(slots, stable=True)
    found = torch.searchsorted(amounts[by_slot].cumsum(0), (counts.cumsum(0) - counts)[expert] + place, right=True)
    return by_slot[found.clamp_max(len(slots) - 1)]


def _steps(counts: Tensor) -> Tensor:
    """[E]: of each number the one coprime to it that is nearest to it over the golden ratio."""
    tries = (counts.double() * GOLDEN).round().long()[:, None] + torch.tensor(TRIES, device=counts.device)
    coprime = (tries > 0) & (torch.gcd(tries.clamp_min(1), counts[:, None]) == 1)
    first = coprime.int().argmax(1, keepdim=True)
    return torch.where(coprime.any(1), tries.gather(1, first)[:, 0], 1)
