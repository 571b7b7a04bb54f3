"""What a placement does to traffic, against the rules said out loud, and against what the runtime deals out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparsec.passes.placement import Loads, Options, Plan, parse_topology, plan
from sparsec.passes.placement.figures import figures, links, traffic

Floats = NDArray[np.float64]


def made(topology: str, slots: int, experts: int, seed: int) -> tuple[Plan, Loads]:
    rng = np.random.default_rng(seed)
    loads = Loads(np.round(rng.lognormal(0, 1, (2, 2, experts)) * 1e3) + 1, ("a", "b"), (0, 1))
    return plan(loads, parse_topology(topology), Options(slots, rounds=2)), loads


def naive(plan: Plan, share: Floats, layer: int, policy: str) -> Floats:
    """[from, to]: every rank's picks of every expert, one after the other."""
    ranks, of = len(plan.size), plan.rank_of_slot
    node = [rank.node for rank in plan.topology.ranks]
    rows = np.zeros((ranks, ranks))
    for source in range(ranks):
        for expert, part in enumerate(share):
            slots = np.flatnonzero(plan.slots[layer] == expert).tolist()
            if policy == "local":
                own = [slot for slot in slots if of[slot] == source]
                near = [slot for slot in slots if node[of[slot]] == node[source]]
                slots = own or near or slots
            split = plan.split[layer][slots]
            split = split / split.sum() if split.sum() else np.full(len(slots), 1 / len(slots))
            for slot, amount in zip(slots, split, strict=True):
                rows[source, of[slot]] += part * amount / ranks
    return rows


@given(st.integers(0, 1000), st.sampled_from(["1x4", "2x2", "3x2", "4x1", "1x2+2x3"]), st.integers(3, 6))
@settings(max_examples=15, deadline=None)
def test_rows_between_ranks_are_those_of_the_rules(seed: int, topology: str, slots: int) -> None:
    found, loads = made(topology, slots, 12, seed)
    share = loads.counts / loads.counts.sum(2, keepdims=True)
    node = np.array([rank.node for rank in found.topology.ranks])
    member = (node[:, None] == np.arange(node[-1] + 1)).astype(np.float64)
    for policy in ("static", "local"):
        rows = traffic(found, loads, policy)
        for scenario in (0, 1):
            wanted = np.mean([naive(found, share[scenario, layer], layer, policy) for layer in (0, 1)], axis=0)
            assert np.allclose(rows[1 + scenario], wanted)
        assert np.allclose(rows[0], rows[1:].mean(0))
        assert np.allclose(traffic(found, loads, policy, node), member.T @ rows @ member)
        parts = links(found, rows[0])
        assert parts["own"] + parts["inside"]["rows"] + parts["outside"]["rows"] == pytest.approx(1)


def test_the_runtime_deals_tokens_out_as_expected() -> None:
    torch = pytest.importorskip("torch")
    from sparsec.runtime.distributed.remap import physical

    found, loads = made("2x2", 4, 12, 3)
    share = loads.counts[0, 0] / loads.counts[0, 0].sum()
    one = Loads(loads.counts[:1, :1], ("a",), (0,))
    only = Plan(found.topology, (0,), 12, found.size, found.slots[:1], found.split[:1])
    slots, shares = torch.tensor(found.slots[0]), torch.tensor(found.split[0])
    rng = np.random.default_rng(0)
    for policy in ("static", "local"):
        rows = np.zeros((4, 4))
        for rank in range(4):
            ids = torch.tensor(rng.choice(12, (20_000, 1), p=share))
            where = physical(ids, slots, shares, experts=12, ranks=4, width=2, rank=rank, policy=policy)
            rows[rank] = np.bincount(found.rank_of_slot[where.numpy().ravel()], minlength=4) / ids.numel() / 4
        assert np.allclose(rows, traffic(only, one, policy)[0], atol=0.004)


def test_before_is_the_old_plan_or_experts_in_order() -> None:
    found, loads = made("2x2", 4, 12, 5)
    share = loads.counts / loads.counts.sum(2, keepdims=True) * 4
    alone = figures(found, loads)
    assert np.allclose(alone.before[1], share[0].reshape(2, 4, 3).sum(2))
    beside = figures(found, loads, found)
    assert np.allclose(beside.before, beside.planned)
    fullest = alone.planned.max(2)
    assert (alone.best.max(2) <= fullest * (1 + 1e-6)).all() and (alone.bound <= alone.best.max(2) * (1 + 1e-3)).all()
    rows, layers = alone.rows(), alone.layers(found.layers)
    assert [row["name"] for row in rows] == ["mean of the scenarios", "a", "b"]
    assert rows[1]["planned"] == pytest.approx({"mean": fullest[1].mean(), "worst": fullest[1].max()})
    assert layers[1]["load"] == pytest.approx(alone.planned[0, 1, layers[1]["rank"]])
