"""Simulations: batches are drawn, slots get their rows, links theirs, and layers their times."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsec.passes.placement.scenarios import batches
from sparsec.simulate.experts import Experts
from sparsec.simulate.layer import Setup, Times, average, layer_times
from sparsec.simulate.links import FITTED_RANKS, Rows, mean_rows, row_bytes, rows_of
from sparsec.simulate.remap import Table, remap
from sparsec.simulate.routing import tokens
from sparsec.simulate.traffic import Traffic, traffic

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

SAMPLE, SAMPLED = 8192, 8
"""Tokens whose ranks and nodes are drawn one by one, and in how many layers: the rows per pick follow from them."""


@dataclass(frozen=True)
class Point:
    """A simulated step.

    Args:
        load: rows of the fullest rank over the mean, on average over layers and batches.
        nodes: distinct nodes of a token, its own included.
        reached: distinct ranks of a token, its own included.
        rows: of the links, in one dispatch of one layer, on average.
        inside, net: bytes of the fullest rank's busier direction, dispatch and combine, inside its node and outside.
        memory: bytes of experts on the fullest rank.
        times: of one layer, on average.
        step: seconds of all expert layers.
        rate: tokens/s of one rank, if there were only these layers.
        extrapolated: beyond what the links' constants were fitted to.
    """

    ranks: int
    node_count: int
    slots: int
    load: float
    nodes: float
    reached: float
    rows: Rows
    inside: float
    net: float
    memory: float
    times: Times
    step: float
    rate: float
    extrapolated: bool


def simulate(
    setup: Setup, experts: Experts, share: Floats, rng: np.random.Generator, *, count: int = 4, noise: bool = True
) -> Point:
    """Simulate a step.

    Rows of slots come from batches drawn around `share`; rows of links from the rows per pick of a sample of tokens,
    and from each rank's load.

    Args:
        share: [layers, experts], how the picks spread, in each layer of `experts`.
        count: batches of each layer.
        noise: batches differ; else each is the mean.
    """
    model, ranks = setup.model, len(setup.topology.ranks)
    picks = setup.tokens * ranks * model.k
    drawn = batches(share[None], count, picks, rng) if noise else np.array([share * picks])
    node = np.array([rank.node for rank in setup.topology.ranks])
    found: list[tuple[Floats, Rows, Times]] = []
    seen: list[Traffic] = []
    sample = Traffic(np.zeros((ranks, ranks), np.int64), np.zeros(0, np.int64), 0.0, 0.0)
    every = -(-len(share) // SAMPLED)
    for layer in range(len(share)):
        if layer % every == 0:
            sample = sampled(setup, experts, layer, share[layer], node, rng)
            seen.append(sample)
        for counts in drawn[:, layer]:
            slots = experts.rows(layer, counts, setup.best)
            load = np.bincount(experts.rank_of_slot, slots, ranks).astype(np.float64)
            links = spread(sample, load / max(float(load.mean()), 1e-300), node, setup.algo)
            links = links.times(picks / max(1, int(sample.picks.sum())))
            found.append((load, links, layer_times(setup, experts, slots, links)))
    return point(setup, experts, found, seen)


def replay(setup: Setup, experts: Experts, where: list[Ints], home: Ints) -> Point:
    """Simulate tokens that were recorded.

    Args:
        where: for each layer of `experts`, [tokens, k] physical slots.
        home: [tokens], the rank that each token starts on. Rows are scaled to `setup.tokens` on each.
    """
    node = np.array([rank.node for rank in setup.topology.ranks])
    factor = setup.tokens * len(node) / len(home)
    found: list[tuple[Floats, Rows, Times]] = []
    seen: list[Traffic] = []
    for sent in where:
        exact = traffic(home, sent, experts.rank_of_slot, node, setup.dedup, setup.algo)
        slots, links = exact.picks.astype(np.float64) * factor, rows_of(exact.rows, node).times(factor)
        load = np.bincount(experts.rank_of_slot, slots, len(node)).astype(np.float64)
        found.append((load, links, layer_times(setup, experts, slots, links)))
        seen.append(exact)
    return point(setup, experts, found, seen)


def sampled(setup: Setup, experts: Experts, layer: int, share: Floats, node: Ints, rng: np.random.Generator) -> Traffic:
    """Rows of tokens that are drawn, as many on each rank, with replicas as the runtime chooses them."""
    ranks = len(node)
    routed = tokens(setup.model, share, ranks * -(-SAMPLE // ranks), rng)
    where = _replicas(experts, layer, experts.split_of(layer, share, setup.best), routed, node, rng)
    home = np.arange(len(routed)) % ranks
    return traffic(home, where, experts.rank_of_slot, node, setup.dedup, setup.algo)


def _replicas(experts: Experts, layer: int, split: Floats, routed: Ints, node: Ints, rng: np.random.Generator) -> Ints:
    """The slot of every pick, by the runtime's rule, as if one rank had all tokens.

    The rule is for ranks and nodes that are alike; on others a replica is drawn by its share.
    """
    slots, ranks, width = experts.slots[layer], len(node), int(np.bincount(node)[0])
    number = int(max(slots.max(), routed.max())) + 1
    size = np.bincount(experts.rank_of_slot, minlength=ranks)
    if (size == size[0]).all() and (node == np.arange(ranks) // width).all() and ranks % width == 0:
        return remap(Table(slots, split, number, ranks, width), [routed])[0]
    order = np.argsort(slots, kind="stable")
    ends = np.cumsum(split[order])
    last = np.searchsorted(slots[order], np.arange(number), side="right")
    high = ends[last - 1]
    low = np.concatenate([[0.0], high[:-1]])
    at = low[routed] + rng.random(routed.shape) * (high - low)[routed]
    return order[np.minimum(np.searchsorted(ends, at, side="right"), last[routed] - 1)]


def spread(sample: Traffic, load: Floats, node: Ints, algo: str) -> Rows:
    """The sample's rows by rank: what a rank gets goes by its load; of two levels, what a node gets by the node's.

    What leaves is alike on all ranks, as their numbers of tokens are.

    Args:
        load: [ranks], over the mean.
    """
    whole, even = rows_of(sample.rows, node), np.ones(len(node))
    inside, net = float(whole.inside_in.mean()), float(whole.net_in.mean())
    if algo == "flat":
        return Rows(inside * even, inside * load, net * even, net * load)
    of_node = (np.bincount(node, load) / np.bincount(node))[node]
    return Rows(inside * of_node, inside * load, net * even, net * of_node)


def point(setup: Setup, experts: Experts, found: list[tuple[Floats, Rows, Times]], seen: list[Traffic]) -> Point:
    """Sum up layers and batches, each with the ranks' rows, the links' rows and the times."""
    model, ranks = setup.model, len(setup.topology.ranks)
    out, back = row_bytes(model, setup.payload)
    size = np.bincount(experts.rank_of_slot, minlength=ranks)
    times = average([one for _, _, one in found])
    step = times.total * model.layers
    return Point(
        ranks=ranks,
        node_count=setup.topology.nodes,
        slots=int(size.max()),
        load=float(np.mean([rows.max() / max(float(rows.mean()), 1e-300) for rows, _, _ in found])),
        nodes=float(np.mean([one.nodes for one in seen])),
        reached=float(np.mean([one.ranks for one in seen])),
        rows=mean_rows([one for _, one, _ in found]),
        inside=float(np.mean([_fullest(one.inside_out, one.inside_in, out, back) for _, one, _ in found])),
        net=float(np.mean([_fullest(one.net_out, one.net_in, out, back) for _, one, _ in found])),
        memory=float(size.max()) * model.layers * model.expert_parameters * model.weight,
        times=times,
        step=step,
        rate=setup.tokens / step,
        extrapolated=ranks > FITTED_RANKS,
    )


def _fullest(leave: Floats, reach: Floats, out: int, back: int) -> float:
    """Bytes of the busier direction of the fullest rank: dispatched one way, combined the other."""
    return float(np.maximum(leave * out + reach * back, reach * out + leave * back).max())
