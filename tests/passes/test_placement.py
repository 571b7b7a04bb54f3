"""Placements: every rule holds for whatever loads, the split is optimal, bad input is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks.eplb import eplb, hierarchical
from benchmarks.placement import fullest
from sparsec.diagnostics import SparsecError
from sparsec.passes.placement import (
    Loads,
    Options,
    best_split,
    check_plan,
    parse_topology,
    plan,
    read_loads,
    read_plan,
    read_routing,
    write_plan,
)
from sparsec.passes.placement.bound import lower_bound
from sparsec.passes.placement.search import GROWTH, Ranks, exposure

Floats = NDArray[np.float64]


def skewed(scenarios: int, layers: int, experts: int, seed: int = 0) -> Floats:
    """Counts with a heavy head, as routers leave them."""
    rng = np.random.default_rng(seed)
    base = rng.lognormal(0, 1, (layers, experts)) * 1e4
    return np.round(base * rng.lognormal(0, 0.3, (scenarios, layers, experts)))


def loads_of(counts: Floats) -> Loads:
    return Loads(counts, tuple(f"s{i}" for i in range(len(counts))), tuple(range(counts.shape[1])))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Floats, str, int]:
    """Counts, a topology and slots that hold them."""
    nodes, width = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    ranks = nodes * width
    slots = draw(st.integers(1, 5))
    experts = draw(st.integers(slots, ranks * slots))
    scenarios = draw(st.integers(1, 3))
    values = st.lists(st.integers(0, 1000), min_size=experts, max_size=experts)
    rows = [[draw(values)] for _ in range(scenarios)]
    counts = np.array(rows, np.float64)
    counts[:, :, 0] += 1
    return counts, f"{nodes}x{width}", slots


@given(cases())
@settings(max_examples=40, deadline=None)
def test_rules_bounds_and_never_worse_than_eplb(case: tuple[Floats, str, int]) -> None:
    counts, topology, slots = case
    made = plan(loads_of(counts), parse_topology(topology), Options(slots, rounds=5))
    check_plan(made)
    share = counts / counts.sum(2, keepdims=True) * len(made.size)
    mean = share.mean(0)
    for layer, row in enumerate(made.slots):
        load = np.bincount(made.rank_of_slot, mean[layer][row] * made.split[layer], len(made.size)).max()
        bound = lower_bound(mean[layer], np.array(made.size), np.ones(len(made.size)))
        assert load >= bound * (1 - 1e-6)
        greedy = eplb(mean[layer][None], len(made.size), slots)[0]
        assert load <= fullest(greedy, mean[layer], len(made.size)) * (1 + 1e-6)


def test_the_same_seed_makes_the_same_plan() -> None:
    counts = skewed(3, 2, 32)
    topology = parse_topology("2x4")
    one, two = (plan(loads_of(counts), topology, Options(5, rounds=30, seed=7)) for _ in range(2))
    assert np.array_equal(one.slots, two.slots) and np.array_equal(one.split, two.split)
    other = plan(loads_of(counts), topology, Options(5, rounds=30, seed=8))
    assert not np.array_equal(one.slots, other.slots)


@given(cases())
@settings(max_examples=40, deadline=None)
def test_the_split_is_the_least_maximum(case: tuple[Floats, str, int]) -> None:
    """Against the LP's dual: some set of ranks must hold what has no replica outside of it."""
    counts, topology, slots = case
    made = plan(loads_of(counts), parse_topology(topology), Options(slots, rounds=0))
    number = len(made.size)
    ranks = Ranks(made.rank_of_slot, np.linspace(1, 2, number).astype(np.float32))
    row, loads = made.slots[0], counts[-1, 0]
    amount, most = best_split(row, loads, ranks)
    assert np.allclose(np.bincount(row, amount, len(loads)), loads, rtol=1e-6, atol=1e-6)
    homes = [frozenset(ranks.of_slot[row == expert].tolist()) for expert in range(len(loads))]
    best = 0.0
    for mask in range(1, 1 << number) if number <= 6 else ():
        inside = {rank for rank in range(number) if mask >> rank & 1}
        held = sum(load for load, home in zip(loads, homes, strict=True) if home <= inside)
        best = max(best, held / float(ranks.speed[sorted(inside)].sum()))
    if number <= 6:
        assert most == pytest.approx(best, rel=1e-6)


def test_the_split_equals_highs() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    counts = skewed(2, 1, 64)
    made = plan(loads_of(counts), parse_topology("2x8"), Options(6, rounds=10))
    row, loads, number = made.slots[0], counts[1, 0], 16
    ranks = Ranks(made.rank_of_slot, np.ones(number, np.float32))
    slots = len(row)
    rows = np.zeros((number, slots + 1))
    rows[made.rank_of_slot, np.arange(slots)] = 1
    rows[:, -1] = -1
    equal = np.zeros((64, slots + 1))
    equal[row, np.arange(slots)] = 1
    cost = np.append(np.zeros(slots), 1)
    best = optimize.linprog(cost, A_ub=rows, b_ub=np.zeros(number), A_eq=equal, b_eq=loads, method="highs").fun
    assert best_split(row, loads, ranks)[1] == pytest.approx(best, rel=1e-6)


def test_unequal_devices_get_what_they_can_do() -> None:
    made = plan(loads_of(skewed(1, 2, 24)), parse_topology("1x4:speed=2+1x2:speed=1,slots=3"), Options(6, rounds=200))
    assert made.size == (6, 6, 6, 6, 3, 3)
    assert made.report["gap"]["worst"] < 0.02


def test_a_replan_keeps_to_its_budget() -> None:
    before, after = skewed(1, 3, 32, seed=1), skewed(1, 3, 32, seed=2)
    topology = parse_topology("2x4")
    old = plan(loads_of(before), topology, Options(5, rounds=20))
    none = plan(loads_of(after), topology, Options(5, moves=0, rounds=20), old=old)
    assert np.array_equal(none.slots, old.slots)
    some = plan(loads_of(after), topology, Options(5, moves=12, rounds=100), old=old)
    assert 0 < some.report["moved"]["experts"] <= 12
    assert some.report["load"]["mean"] < none.report["load"]["mean"]


def test_a_plan_is_read_back_as_it_was(tmp_path: Path) -> None:
    made = plan(loads_of(skewed(2, 2, 16)), parse_topology("2x2"), Options(5, rounds=5))
    write_plan(made, tmp_path / "plan.json")
    read = read_plan(tmp_path / "plan.json")
    assert np.array_equal(read.slots, made.slots) and read.report == made.report
    assert np.allclose(read.split, made.split, atol=1e-8)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 2"),
        ({"format": "other"}, "is no plan"),
        ({"experts": -1}, "'experts'"),
        ({"slots_per_rank": [1 << 40, 5, 5, 5]}, "'slots_per_rank'"),
        ({"topology": "2x2:memory=-1"}, "memory"),
        ({"split": [[1.0] * 20]}, "'split'"),
        ({"split": [[1.0] * 20] * 2}, "do not sum to 1"),
        ({"physical_to_logical": [[0] * 20] * 2}, "has no slot"),
        ({"physical_to_logical": [[99] * 20] * 2}, "there are 16"),
        ({"logical_to_physical": []}, "does not agree"),
    ],
)
def test_a_broken_plan_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    made = plan(loads_of(skewed(2, 2, 16)), parse_topology("2x2"), Options(5, rounds=5))
    path = tmp_path / "plan.json"
    write_plan(made, path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SparsecError, match=words):
        read_plan(path)


def test_a_rank_holds_no_expert_twice() -> None:
    made = plan(loads_of(skewed(1, 1, 16)), parse_topology("2x2"), Options(5))
    slots = made.slots.copy()
    slots[0, 1] = slots[0, 0]
    with pytest.raises(SparsecError, match=r"layer 0: (rank 0 holds expert|expert \d+ has no slot)"):
        check_plan(dataclasses.replace(made, slots=slots))


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([[1.0, float("nan")]], "expert 1 in layer 0 of scenario 'load' is not a number"),
        ([[3.0, 1.0], [1.0, -2.0]], "expert 1 in layer 1 of scenario 'load' is negative: -2"),
        ([1.0, 2.0], r"not \[2\]"),
        ([[0.0, 0.0]], "no layer has any tokens"),
        ([[[1.0, 1.0], [1.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]]], r"scenario 'load\[1\]': layer 1 is missing"),
    ],
)
@pytest.mark.parametrize("suffix", ["npy", "npz", "json"])
def test_bad_loads_are_named(tmp_path: Path, counts: Any, words: str, suffix: str) -> None:
    path = tmp_path / f"load.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps({"load": counts}))
    elif suffix == "npz":
        np.savez(path, load=np.array(counts))
    else:
        np.save(path, np.array(counts))
    with pytest.raises(SparsecError, match=words):
        read_loads([path])


def test_other_bad_files_are_named(tmp_path: Path) -> None:
    pickled = tmp_path / "a.npy"
    np.save(pickled, np.array([{}], object), allow_pickle=True)
    ragged, text = tmp_path / "b.json", tmp_path / "c.txt"
    ragged.write_text("[[1, 2], [3]]")
    text.write_text("1 2")
    for path in (pickled, ragged, text, tmp_path / "gone.npz"):
        with pytest.raises(SparsecError, match=path.name):
            read_loads([path])
    np.save(tmp_path / "x.npy", np.ones((2, 4)))
    np.save(tmp_path / "y.npy", np.ones((3, 4)))
    with pytest.raises(SparsecError, match="3 layers of 4 experts, but"):
        read_loads([tmp_path / "x.npy", tmp_path / "y.npy"])
    np.save(tmp_path / "r.npy", np.array([[[0, 9]]]))
    with pytest.raises(SparsecError, match="goes to expert 9, but there are 4"):
        read_routing(tmp_path / "r.npy", [0], 4)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("8", "cannot hold 32 experts"),
        ("a", "is not NODESxRANKS"),
        ("2x0", "ranks"),
        ("4x4:ram=3", "no key 'ram'"),
        ("4x4:memory=0GB", "no value above 0"),
        ("4x4:speed=2GB", "without a unit"),
        ("4x4:memory=1MB", r"rank 0 \(node 0\) cannot hold 3 slots in 1 layers"),
    ],
)
def test_bad_topologies_are_named(spec: str, words: str) -> None:
    with pytest.raises(SparsecError, match=words):
        plan(loads_of(skewed(1, 1, 32)), parse_topology(spec), Options(3, expert_bytes=1e6))


def test_the_graph_has_every_link() -> None:
    graph = parse_topology("2x2:nvlink=450GB/s,ib=50GB/s").graph()
    assert graph.edges[("rank", 3), ("node", 1)]["bandwidth"] == 450e9
    assert graph.edges[("rank", 0), "net"]["bandwidth"] == 50e9
    assert graph.number_of_edges() == 8


def test_experts_used_together_live_together() -> None:
    rng = np.random.default_rng(0)
    topic = rng.integers(4, size=600)
    inside = rng.permuted(np.tile(np.arange(8), (600, 1)), axis=1)[:, :4]
    routed = rng.permutation(32)[topic[:, None] * 8 + inside][:, None]
    counts = np.bincount(routed.ravel(), minlength=32)[None, None].astype(np.float64)
    topology = parse_topology("4x2")
    made = plan(loads_of(counts), topology, Options(5), routing=routed)
    assert made.report["nodes_per_token"] < 1.2
    assert made.report["load_of_routing"] < 1.1


def test_whole_groups_of_experts_stay_on_a_node_under_the_hierarchical_policy() -> None:
    loads = skewed(1, 2, 32)[0]
    slots = hierarchical(loads, 4, 10, 2, 4)
    for row in slots:
        on_node = [set((row[:20] // 8).tolist()), set((row[20:] // 8).tolist())]
        assert set(row.tolist()) == set(range(32))
        assert [len(some) for some in on_node] == [2, 2] and not on_node[0] & on_node[1]


def test_an_expert_that_is_alone_may_grow() -> None:
    """Of the rank's 3.0 that live nowhere else, the largest, 2.0, may come to be 5.0."""
    ranks = Ranks(np.array([0, 0, 0, 1, 1, 1]), np.array([1, 2], np.float32))
    most, alone = exposure(np.array([[0, 1, 2, 2, 3, 4]]), np.array([[1, 2, 7, 4, 0]], np.float32), ranks)
    assert most.tolist() == [[1 + 2 * GROWTH, 4 * GROWTH / 2]]
    assert alone.tolist() == [[1, 2, 0, 0, 4, 0]]


@pytest.mark.parametrize("scenarios", [1, 3])
def test_a_plan_that_ran_out_of_time_says_so(scenarios: int) -> None:
    loads, topology = loads_of(skewed(scenarios, 2, 48)), parse_topology("2x12")
    cut, whole = (plan(loads, topology, Options(3, rounds=20, seconds=seconds)) for seconds in (0.0, 1000.0))
    check_plan(cut)
    assert cut.report["cut_short"] and not whole.report["cut_short"]
