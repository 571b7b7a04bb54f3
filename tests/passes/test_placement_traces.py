"""Placements on recorded loads: the figures that are aimed at. Skipped where the recordings are not."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.eplb import eplb
from benchmarks.placement import families, fullest
from benchmarks.placement_routing import tokens_like
from sparsec.passes.placement import Loads, Options, best_split, parse_topology, plan, read_loads
from sparsec.passes.placement.affinity import best_place, dispatch
from sparsec.passes.placement.bound import lower_bound
from sparsec.passes.placement.scenarios import batches
from sparsec.passes.placement.search import Ranks

TRACES = Path(__file__).parents[3] / "shared" / "traces"
LOADS = TRACES / "deepseek_v3_sglang_expert_load.npz"
ROUTING = TRACES / "qwen15_moe_layer0_routing.npz"
pytestmark = pytest.mark.skipif(not LOADS.is_file(), reason="no recorded loads here")

Floats = NDArray[np.float64]


def some(loads: Loads, scenarios: list[int], every: int) -> Loads:
    picked = range(0, len(loads.layers), every)
    return Loads(
        loads.counts[scenarios][:, picked],
        tuple(loads.names[index] for index in scenarios),
        tuple(loads.layers[index] for index in picked),
    )


@pytest.mark.parametrize(("ranks", "slots"), [(16, 16), (32, 9), (64, 5), (72, 4), (128, 3)])
def test_one_histogram(ranks: int, slots: int) -> None:
    one = some(read_loads([LOADS]), [0], 4)
    made = plan(one, parse_topology(f"1x{ranks}"), Options(slots))
    share = one.counts[0] / one.counts[0].sum(1, keepdims=True) * ranks
    bound = lower_bound(share, np.full(ranks, slots), np.ones(ranks))
    load = np.array([layer["load"] for layer in made.report["layers"]])
    assert (load / bound).mean() <= 1.003
    for row, layer, ours in zip(eplb(share, ranks, slots), share, load, strict=True):
        assert ours <= fullest(row, layer, ranks) * (1 + 1e-9)


def held_out(ranks: int, slots: int, every: int) -> float:
    loads = read_loads([LOADS])
    figures: list[float] = []
    for out in families(loads.names).values():
        known = some(loads, [index for index in range(len(loads.names)) if index not in out], every)
        made = plan(known, parse_topology(f"{ranks // 8}x8"), Options(slots, seconds=1000))
        devices = Ranks(made.rank_of_slot, np.ones(ranks, np.float32))
        counts = some(loads, out, every).counts
        share = counts / counts.sum(2, keepdims=True) * ranks
        figures.append(
            float(
                np.mean(
                    [best_split(made.slots[at], one[at], devices)[1] for one in share for at in range(len(made.slots))]
                )
            )
        )
    return float(np.mean(figures))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "slots", "most"), [(32, 9, 1.07), (64, 5, 1.14)])
def test_a_held_out_family(ranks: int, slots: int, most: float) -> None:
    """What is aimed at; 1.05 and 1.10 were measured."""
    assert held_out(ranks, slots, 7) <= most


def test_noise_of_batches() -> None:
    one = some(read_loads([LOADS]), [4], 20)
    picks = 4096 * 8
    made = plan(one, parse_topology("4x8"), Options(9, batch=picks))
    fresh = batches(one.counts, 8, picks, np.random.default_rng(99))
    devices = Ranks(made.rank_of_slot, np.ones(32, np.float32))
    loads = [
        best_split(row, batch[layer], devices)[1] / (picks / 32)
        for batch in fresh
        for layer, row in enumerate(made.slots)
    ]
    assert np.mean(loads) <= 1.025


def planned_and_unseen(routed: NDArray[np.int64], way: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    half = len(routed) // 2
    ways = {
        "first half": (routed[:half], routed[half:]),
        "second half": (routed[half:], routed[:half]),
        "every second": (routed[::2], routed[1::2]),
    }
    return ways[way]


@pytest.mark.parametrize("way", ["first half", "second half", "every second"])
def test_nodes_per_token_on_a_recorded_routing(way: str) -> None:
    """Planned on some of the tokens, measured on the others."""
    routed = np.load(ROUTING, allow_pickle=False)["routed"][:, 0].astype(np.int64)
    known, unseen = planned_and_unseen(routed, way)
    ranks, node = Ranks(np.repeat(np.arange(12), 6), np.ones(12, np.float32)), np.arange(12) // 3
    weight, test = (np.bincount(some.ravel(), minlength=60) / some.size * 12 for some in (known, unseen))
    slots, _, _ = best_place(known, weight, ranks, node)
    packed = eplb(weight[None], 12, 6)[0]
    near, ours = dispatch(packed, unseen, ranks, node), dispatch(slots, unseen, ranks, node)
    assert ours.nodes <= 2.15
    assert near.nodes > 2.4
    assert ours.load.max() <= fullest(packed, test, 12)


WORSE = pytest.mark.xfail(reason="1.033 to 1.028: the fullest rank of the first half's tokens", strict=True)


@pytest.mark.parametrize("way", ["first half", pytest.param("second half", marks=WORSE), "every second"])
def test_load_beside_eplb_with_near_replicas(way: str) -> None:
    """EPLB's placement by this dispatch, which evens its loads too: harder to match than EPLB as it is."""
    routed = np.load(ROUTING, allow_pickle=False)["routed"][:, 0].astype(np.int64)
    known, unseen = planned_and_unseen(routed, way)
    ranks, node = Ranks(np.repeat(np.arange(12), 6), np.ones(12, np.float32)), np.arange(12) // 3
    weight = np.bincount(known.ravel(), minlength=60) / known.size * 12
    slots, _, _ = best_place(known, weight, ranks, node)
    theirs = dispatch(eplb(weight[None], 12, 6)[0], unseen, ranks, node)
    assert dispatch(slots, unseen, ranks, node, 1.0).load.max() <= theirs.load.max()


@pytest.mark.slow
@pytest.mark.parametrize("topics", [0, 16])
def test_nodes_per_token_of_groups(topics: int) -> None:
    """Tokens that have recorded histograms, routed by groups: 64 ranks on 8 nodes."""
    loads, node = read_loads([LOADS]), np.arange(64) // 8
    ranks = Ranks(np.repeat(np.arange(64), 5), np.ones(64, np.float32))
    figures: list[tuple[float, float, float]] = []
    for layer in (17, 45):
        routed = tokens_like(loads.counts[4, layer], 16384, np.random.default_rng(layer), topics=topics)
        known, unseen = routed[:8192], routed[8192:]
        weight, test = (np.bincount(some.ravel(), minlength=256) / some.size * 64 for some in (known, unseen))
        slots, _, _ = best_place(known, weight, ranks, node)
        ours = dispatch(slots, unseen, ranks, node)
        figures.append((ours.nodes, float(ours.load.max()), fullest(eplb(weight[None], 64, 5)[0], test, 64)))
    nodes, load, theirs = np.mean(figures, axis=0)
    assert nodes <= 4.0
    assert load <= theirs


def test_the_planner_takes_no_longer_than_it_may() -> None:
    """All layers of one histogram, in processor time, with room for a slow machine."""
    one = some(read_loads([LOADS]), [4], 1)
    start = time.process_time()
    plan(one, parse_topology("8x8"), Options(5))
    assert time.process_time() - start < 1
