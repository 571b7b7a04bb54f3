"""The simulator's parts: what they must do whatever the constants are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sparsec.diagnostics import SparsecError
from sparsec.passes.placement import parse_topology
from sparsec.simulate import Device, MoE, Setup, in_order, packed, simulate
from sparsec.simulate.compute import device, expert_seconds, tile
from sparsec.simulate.layer import layer_times
from sparsec.simulate.links import LOW_LATENCY, link_seconds, row_bytes, rows_of
from sparsec.simulate.routing import histogram, tokens
from sparsec.simulate.run import sampled
from sparsec.simulate.traffic import traffic

H100 = Device("cuda:sm_90")
SMALL = MoE(1024, 512, 64, 4, 2, shared=1)
GROUPED = MoE(7168, 2048, 256, 8, 58, "fp8", shared=1, groups=8, top_groups=4)
VARIANTS = (("none", "flat"), ("rank", "flat"), ("none", "two_level"), ("rank", "two_level"), ("node", "two_level"))


def test_drawn_loads_are_as_recorded_ones() -> None:
    """The ranges of 9 recorded workloads of DeepSeek-V3: median layers, and groups of 32 experts."""
    share = histogram(GROUPED, 200, np.random.default_rng(0)) * 256
    assert 5.2 <= np.median(share.max(1)) <= 8.6
    assert 0.72 <= np.median(share.std(1)) <= 1.02
    assert share.reshape(-1, 8, 32).mean(2).std(1).mean() == pytest.approx(0.381, abs=0.03)


@pytest.mark.parametrize("model", [SMALL, GROUPED, replace(SMALL, k=64)], ids=["free", "groups", "all"])
def test_tokens_follow_the_shares(model: MoE) -> None:
    share = histogram(model, 1, np.random.default_rng(1))[0]
    routed = tokens(model, share, 6000, np.random.default_rng(2))
    assert routed.shape == (6000, model.k)
    assert (np.diff(np.sort(routed, axis=1), axis=1) > 0).all()
    if model.k < model.experts:
        got = np.bincount(routed.ravel(), minlength=model.experts) / routed.size
        assert np.abs(got - share).sum() < (0.07 if model.groups == 1 else 0.1)  # of which chance: 0.06
    groups = routed // (model.experts // model.groups)
    assert max(len(set(row)) for row in groups.tolist()) <= model.top_groups


@pytest.mark.parametrize(("dedup", "algo"), VARIANTS)
def test_rows_of_a_sample_stand_for_all_tokens(dedup: str, algo: str) -> None:
    """Rows that follow from loads and a sample are those of the tokens themselves, to a few per cent."""
    topology = parse_topology("4x4")
    share = histogram(SMALL, 1, np.random.default_rng(3))
    experts = packed(share, [5] * 16, topology)
    setup = Setup(SMALL, topology, H100, 2048, dedup, algo)
    found = simulate(setup, experts, share, np.random.default_rng(4), noise=False).rows
    node = np.arange(16) // 4
    exact = rows_of(sampled(setup, experts, 0, share[0], node, np.random.default_rng(5)).rows, node).times(4)
    for name in ("inside_out", "inside_in", "net_out", "net_in"):
        ours, drawn = getattr(found, name), getattr(exact, name)
        assert ours.sum() == pytest.approx(drawn.sum(), rel=0.02)
        assert ours.max() == pytest.approx(drawn.max(), rel=0.15)


def test_traffic_is_counted_on_both_hops() -> None:
    node = np.array([0, 0, 1, 1])
    home, where = np.array([0]), np.array([[2, 3, 3, 1]])  # rank 0 to ranks 2, 3, 3 and 1
    rows = {variant: traffic(home, where, np.arange(4), node, *variant).rows.tolist() for variant in VARIANTS}
    assert rows["none", "flat"][0] == [0, 1, 1, 2]
    assert rows["rank", "flat"][0] == [0, 1, 1, 1]
    assert rows["none", "two_level"] == [[1, 1, 3, 0], [0] * 4, [0, 0, 1, 2], [0] * 4]
    assert rows["node", "two_level"] == [[1, 1, 1, 0], [0] * 4, [0, 0, 1, 1], [0] * 4]
    with pytest.raises(SparsecError, match="dedup node needs two_level"):
        traffic(home, where, np.arange(4), node, "node", "flat")


def test_links_take_their_fullest_rank() -> None:
    topology = parse_topology("2x2:nvlink=100GB/s,ib=10GB/s")
    links = np.zeros((4, 4))
    links[0, 1], links[0, 2], links[3, 2] = 10, 30, 200
    rows = rows_of(links, np.array([0, 0, 1, 1]))
    assert (rows.net_out.tolist(), rows.inside_in.tolist()) == ([30, 0, 0, 0], [0, 10, 200, 0])
    kernel = LOW_LATENCY[0]
    assert link_seconds(kernel, rows, 1e3, topology) == pytest.approx(kernel.latency + 30e3 / (10e9 * kernel.net))
    assert rows.back.net_in.tolist() == rows.net_out.tolist()
    assert link_seconds(kernel, rows.times(0), 1e3, topology) == 0
    assert row_bytes(GROUPED, "fp8") == (7168 + 4 * 56 + 16, 2 * 7168)


def test_experts_take_weights_or_flops() -> None:
    model, of_slot, speed = replace(SMALL, dtype="bf16"), np.array([0, 0, 1]), np.ones(2)
    few = expert_seconds(model, H100, np.array([1.0, 1, 0]), of_slot, speed)
    assert few[1] == 0
    weights = 2 * model.expert_parameters * 2 / H100.bandwidth
    assert weights < few[0] < weights * 1.05 + 7e-6
    many = expert_seconds(model, H100, np.array([8192.0, 0, 8192]), of_slot, np.array([1, 0.5]))
    assert many[0] == pytest.approx(2 * 8192 * model.expert_parameters / H100.flops("bf16") + 6e-6, rel=1e-6)
    assert many[1] == pytest.approx(2 * many[0])
    over = expert_seconds(model, H100, np.array([8193.0, 0, 8192]), of_slot, speed)
    assert over[0] > over[1] * 1.01  # one row more is a tile more
    assert (tile(np.array([0.0, 3, 9])), tile(np.array([500.0]))) == (16, 128)


def test_schedules_hide_what_they_may() -> None:
    topology = parse_topology("2x4")
    experts = in_order(64, [8] * 8, topology, 1)
    setup = Setup(replace(SMALL, rest=10_000_000), topology, H100, 4096)
    node = np.arange(8) // 4
    rows = sampled(setup, experts, 0, np.full(64, 1 / 64), node, np.random.default_rng(0))
    links, slots = rows_of(rows.rows, node).times(4), rows.picks.astype(np.float64) * 4
    plain = layer_times(setup, experts, slots, links)
    assert plain.hidden == 0
    assert plain.total == pytest.approx(plain.rest + plain.shared + plain.dispatch + plain.experts + plain.combine)
    beside = layer_times(replace(setup, schedule="shared"), experts, slots, links)
    assert beside.hidden == min(plain.shared, plain.dispatch) > 0
    halves = layer_times(replace(setup, schedule="two-batch"), experts, slots, links)
    compute, wire = halves.rest + halves.shared + halves.experts, halves.dispatch + halves.combine
    assert halves.total == pytest.approx(max(compute, wire))
    assert compute >= plain.rest + plain.shared + plain.experts  # weights are read twice


def test_balance_and_scale() -> None:
    share = histogram(SMALL, 2, np.random.default_rng(0))
    for devices, extrapolated in ((64, False), (512, True)):
        topology = parse_topology(f"{devices // 8}x8")
        size = [-(-72 // devices)] * devices
        setup = Setup(SMALL, topology, H100, 64)
        even = simulate(setup, packed(share, size, topology), share, np.random.default_rng(1))
        order = simulate(setup, in_order(64, size, topology, 2), share, np.random.default_rng(1))
        assert order.load > even.load * 1.2
        assert order.times.total > even.times.total
        assert even.extrapolated is extrapolated
    alone = parse_topology("1x1")
    point = simulate(Setup(SMALL, alone, H100, 64), in_order(64, [64], alone, 2), share, np.random.default_rng(1))
    assert (point.times.dispatch, point.net, point.load) == (0, 0, 1)


def test_a_batch_is_split_as_well_as_can_be() -> None:
    share, topology = histogram(SMALL, 1, np.random.default_rng(0)), parse_topology("2x8")
    experts = packed(share, [6] * 16, topology)
    loads = [
        simulate(Setup(SMALL, topology, H100, 64, best=best), experts, share, np.random.default_rng(1)).load
        for best in (False, True)
    ]
    assert loads[1] < loads[0] - 0.01


def test_what_cannot_be() -> None:
    with pytest.raises(SparsecError, match="cannot use 9 of 8 experts"):
        MoE(8, 8, 8, 9, 1)
    with pytest.raises(SparsecError, match="2 groups of 4 experts hold no 9"):
        MoE(8, 8, 16, 9, 1, groups=4, top_groups=2)
    with pytest.raises(SparsecError, match="no chip 'cpu'"):
        device("cpu")
    with pytest.raises(SparsecError, match="has no fp8"):
        Device("cuda:sm_80").flops("fp8")
    with pytest.raises(SparsecError, match="no schedule"):
        Setup(SMALL, parse_topology("1x1"), H100, 1, schedule="three-batch")
