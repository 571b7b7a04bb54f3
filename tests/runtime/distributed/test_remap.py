"""The rule by which picks go to replicas: tables, counts and a rank in, slots out; no processes."""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsec.passes.placement.search import Ranks as PlannedRanks
from sparsec.passes.placement.split import best_split as planned_split
from sparsec.runtime.distributed.remap import (
    POLICIES,
    _steps,
    by_shares,
    count,
    deal,
    near,
    physical,
    quotas,
)
from sparsec.runtime.distributed.split import best_split
from sparsec.runtime.errors import InputError


def placement(seed: int, experts: int, ranks: int, per_rank: int) -> tuple[Tensor, Tensor]:
    """Slots that hold every expert, others by chance; shares that sum to 1 for each expert, some of them 0."""
    made = torch.Generator().manual_seed(seed)
    total = ranks * per_rank
    more = torch.randint(0, experts, (total - experts,), generator=made)
    slots = torch.cat([torch.arange(experts), more])[torch.randperm(total, generator=made)]
    shares = torch.rand(total, generator=made, dtype=torch.float64) * (torch.rand(total, generator=made) < 0.8)
    sums = torch.zeros(experts, dtype=torch.float64).index_add_(0, slots, shares)
    return slots, torch.where(sums[slots] > 0, shares / sums[slots].clamp_min(1e-9), 1 / torch.bincount(slots)[slots])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(8, 4, 3, 2), (5, 1, 6, 1), (16, 8, 4, 4), (3, 4, 2, 1), (7, 2, 4, 2)]),
    tokens=st.integers(0, 90),
    k=st.integers(1, 3),
)
def test_every_pick_goes_to_a_slot_of_its_expert(
    seed: int, shape: tuple[int, int, int, int], tokens: int, k: int
) -> None:
    experts, ranks, per_rank, width = shape
    slots, shares = placement(seed, experts, ranks, per_rank)
    made = torch.Generator().manual_seed(seed + 1)
    ids = [torch.randint(-2, experts + 2, (tokens + rank % 2, k), generator=made) for rank in range(ranks)]
    counts = torch.stack([count(part, experts) for part in ids])
    for policy in POLICIES:
        total = torch.zeros(len(slots), dtype=torch.int64)
        for rank, part in enumerate(ids):
            given = counts if policy == "batch" else counts[rank]
            quota = quotas(given, slots, shares, rank, ranks, width, policy)
            where = deal(part, slots, quota, experts, ranks, width)
            skipped = (part < 0) | (part >= experts)
            assert torch.equal(where == len(slots), skipped)
            assert torch.equal(slots[where[~skipped]], part[~skipped])
            assert torch.equal(torch.bincount(where[~skipped], minlength=len(slots)), quota)
            total += quota
        assert torch.equal(torch.zeros(experts, dtype=torch.int64).index_add_(0, slots, total), counts.sum(0))
        if policy == "batch":
            assert total.tolist() == best_split(counts.sum(0).tolist(), slots.tolist(), ranks)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(8, 4, 3), (16, 8, 3), (32, 8, 5), (24, 4, 7), (6, 3, 2)]),
    skew=st.floats(0, 2),
)
def test_the_split_of_a_batch_is_the_best(seed: int, shape: tuple[int, int, int], skew: float) -> None:
    """No whole numbers are better than what the planner's flow of fractions needs, rounded up."""
    experts, ranks, per_rank = shape
    slots, _ = placement(seed, experts, ranks, per_rank)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(2000, rng.dirichlet(np.full(experts, 0.2 + skew)))
    found = np.array(best_split(counts.tolist(), slots.tolist(), ranks))
    assert (found >= 0).all()
    assert (np.bincount(slots.numpy(), found, experts) == counts).all()
    of_slot = np.repeat(np.arange(ranks), per_rank)
    _, least = planned_split(slots.numpy(), counts.astype(float), PlannedRanks(of_slot, np.ones(ranks, np.float32)))
    assert np.bincount(of_slot, found).max() == int(np.ceil(least - 1e-6))


def test_shares_are_met_within_one_and_on_average() -> None:
    slots, shares = placement(3, 16, 8, 4)
    made = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 9, (256, 16), generator=made)
    found = torch.stack([by_shares(each, slots, shares, rank) for rank, each in enumerate(counts)])
    exact = counts[:, slots] * shares
    assert ((found - exact).abs() < 1).all()
    assert ((found.sum(0) - exact.sum(0)).abs() < 0.1 * len(counts)).all()  # rounded down it would be half of them


def test_a_stretch_of_tokens_is_spread_as_the_whole() -> None:
    slots, quota = torch.tensor([0, 0, 0, 0]), torch.tensor([500, 250, 150, 100])
    where = deal(torch.zeros(1000, 1, dtype=torch.int64), slots, quota, 1, 4, 2)[:, 0]
    for start in range(0, 900, 50):
        part = torch.bincount(where[start : start + 100], minlength=4)
        assert ((part - quota / 10).abs() <= 4).all(), (start, part)


def test_steps_are_coprime() -> None:
    counts = torch.arange(40000)
    assert all(gcd(n, step) == 1 for n, step in zip(counts.tolist(), _steps(counts).tolist(), strict=True) if n > 1)


def test_local_takes_the_nearest_replica() -> None:
    slots = torch.tensor([0, 1, 2, 0, 1, 3, 4, 4])  # 4 ranks of 2, 2 nodes
    shares = torch.tensor([0.5, 0.2, 1, 0.5, 0.8, 1, 0.0, 1.0])
    assert near(slots, shares, 5, 1, 4, 2).nonzero()[:, 0].tolist() == [1, 2, 3, 5, 7]
    assert near(slots, shares, 5, 2, 4, 2).nonzero()[:, 0].tolist() == [0, 2, 3, 4, 5, 7]
    assert near(slots, shares, 5, 3, 4, 2).nonzero()[:, 0].tolist() == [0, 2, 3, 4, 5, 7]


def test_picks_go_where_their_token_goes() -> None:
    """Experts 0 and 1 are on one node each, expert 2 on both; expert 2's picks follow, as far as the quota lasts."""
    slots = torch.tensor([0, 2, 1, 2])  # 4 ranks of 1, 2 nodes
    ids = torch.tensor([[2, 0]] * 6 + [[2, 1]] * 4)
    for quota, along in ((torch.tensor([6, 6, 4, 4]), 10), (torch.tensor([6, 3, 4, 7]), 7)):
        where = deal(ids, slots, quota, 3, 4, 2)
        assert torch.equal(torch.bincount(where.flatten(), minlength=4), quota)
        assert int((where[:, 0] // 2 == where[:, 1] // 2).sum()) == along
    slots = torch.tensor([0, 1, 2, 0, 1, 2])  # 2 ranks of 3 on one node: the same rank rather than the node
    where = deal(torch.tensor([[0, 1, 2]] * 8), slots, torch.tensor([8, 4, 4, 0, 4, 4]), 3, 2, 2)
    assert (where // 3).sum(1).tolist().count(0) == 4


def test_a_batch_takes_from_all_ranks_alike() -> None:
    slots = torch.tensor([0, 0, 0, 1])
    counts = torch.tensor([[300, 0], [0, 0], [60, 9], [240, 0]])
    found = torch.stack([quotas(counts, slots, torch.ones(4), rank, 4, 2, "batch") for rank in range(4)])
    assert found.sum(0).tolist() == best_split([600, 9], slots.tolist(), 4)
    assert ((found[:, :3] - counts[:, :1] / 3).abs() <= 3).all()


def test_wrong_tables_are_refused() -> None:
    ids, slots, shares = torch.tensor([[0, 2]]), torch.tensor([0, 1, 1, 0]), torch.ones(4)
    given: dict[str, Any] = {"experts": 3, "ranks": 2, "width": 1, "rank": 0}
    with pytest.raises(InputError, match="expert 2 was picked but has no slot"):
        physical(ids, slots, shares, **given)
    with pytest.raises(InputError, match="as many on each of 2 ranks"):
        physical(ids, slots[:3], shares[:3], **given)
    with pytest.raises(InputError, match="there are static, local, batch"):
        physical(ids, slots, shares, **given, policy="lp")
    with pytest.raises(InputError, match="needs the counts"):
        physical(ids, slots, shares, **given, policy="batch")
