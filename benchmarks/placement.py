"""Placements beside DeepSeek's published EPLB: `python -m benchmarks.placement LOADS.npz [--routing ROUTED.npz]`.

LOADS has scenarios of one model, named `prefill_in4096`, `decode_in1000out500`; ROUTED has a real model's tokens.
Writes `results/placement.json` and `.md`. Loads are of the fullest rank, over the mean of the ranks; lower is better.
What chance decides is measured for several seeds; figures are the mean of the seeds, with the least and the most.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.eplb import eplb, hierarchical
from benchmarks.placement_routing import tokens_like
from sparsec.passes.placement import Loads, Options, best_split, parse_topology, plan, read_loads
from sparsec.passes.placement.affinity import Dispatch, best_place, dispatch
from sparsec.passes.placement.bound import lower_bound
from sparsec.passes.placement.loads import read_routing
from sparsec.passes.placement.scenarios import batches
from sparsec.passes.placement.search import Ranks

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Row = list[str | float]
Table = tuple[str, list[str], list[Row]]

STATIC = ((16, 16), (32, 9), (32, 10), (64, 5), (72, 4), (128, 3))
ROBUST = ((32, 9), (64, 5))
TABLES = ("static", "held out", "noise", "groups", "recorded", "whole")


def fullest(slots: Ints, load: Floats, ranks: int) -> float:
    """The load of the fullest rank when replicas share equally. slots: [slots], load: [experts]."""
    share = load / np.maximum(np.bincount(slots, minlength=len(load)), 1)
    return float(share[slots].reshape(ranks, -1).sum(1).max())


def devices(ranks: int, slots: int) -> Ranks:
    """Equal ones."""
    return Ranks(np.repeat(np.arange(ranks), slots), np.ones(ranks, np.float32))


def picked(loads: Loads, scenarios: Sequence[int], every: int, first: int = 0) -> Loads:
    """Some scenarios, and every so many layers."""
    layers = range(first, len(loads.layers), every)
    names = tuple(loads.names[index] for index in scenarios)
    return Loads(loads.counts[list(scenarios)][:, layers], names, tuple(loads.layers[index] for index in layers))


def families(names: tuple[str, ...]) -> dict[str, list[int]]:
    """Scenarios by phase and by length: `decode_in1000out500` counts its output, `prefill_in4096` its input."""

    def family(name: str) -> str:
        phase, _, rest = name.partition("_")
        inputs, _, outputs = rest.removeprefix("in").partition("out")
        if phase == "decode":
            return "decode, long output" if int(outputs or 0) >= 500 else "decode, short output"
        return "prefill, long prompt" if int(inputs) >= 2000 else "prefill, short prompt"

    found: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        found.setdefault(family(name), []).append(index)
    return found


def static(loads: Loads, scenarios: Sequence[int]) -> Table:
    """One histogram, planned and measured on itself."""
    rows: list[Row] = []
    for ranks, slots in STATIC:
        theirs: list[float] = []
        ours: list[float] = []
        seconds = 0.0
        for scenario in scenarios:
            one = picked(loads, [scenario], 1)
            share = _shares(one.counts[0], ranks)
            bound = lower_bound(share, np.full(ranks, slots), np.ones(ranks))
            start = time.process_time()
            made = plan(one, parse_topology(f"1x{ranks}"), Options(slots))
            seconds = max(seconds, time.process_time() - start)
            ours += [layer["load"] / layer["bound"] for layer in made.report["layers"]]
            theirs += [fullest(row, share[i], ranks) / bound[i] for i, row in enumerate(eplb(share, ranks, slots))]
        worse = sum(bool(a > b * (1 + 1e-9)) for a, b in zip(ours, theirs, strict=True))
        gaps = (f"{np.mean(theirs) - 1:.2%}", f"{np.mean(ours) - 1:.2%}", f"{np.max(ours) - 1:.2%}")
        rows.append([f"{ranks} x {slots}", *gaps, worse, round(seconds, 2)])
    head = ["ranks x slots", "EPLB over the bound", "sparsec", "sparsec, worst layer", "worse layers", "CPU s"]
    return f"One histogram, {len(loads.layers)} layers", head, rows


def held_out(loads: Loads, every: int, first: int, seeds: int) -> Table:
    """Planned on all families but one, measured on that one."""
    rows: list[Row] = []
    for ranks, slots in ROBUST:
        total: list[tuple[float, float, list[float]]] = []
        for name, out in families(loads.names).items():
            known = picked(loads, [index for index in range(len(loads.names)) if index not in out], every, first)
            share = _shares(picked(loads, out, every, first).counts, ranks)
            packed = eplb(_shares(known.counts, ranks).mean(0), ranks, slots)
            split = partial(_best, ranks=devices(ranks, slots))
            ours: list[float] = []
            for seed in range(seeds):
                made = plan(known, parse_topology(f"{ranks // 8}x8"), Options(slots, seed=seed, seconds=1000))
                ours.append(_mean(share, made.slots, split))
            total.append((_mean(share, packed, partial(fullest, ranks=ranks)), _mean(share, packed, split), ours))
            rows.append([name, ranks, round(total[-1][0], 3), round(total[-1][1], 3), _spread(ours)])
        means = [float(np.mean([one[at] for one in total])) for at in (0, 1)]
        ours = np.mean([one[2] for one in total], axis=0).tolist()
        rows.append(["mean of families", ranks, *(round(value, 3) for value in means), _spread(ours)])
    head = ["held out", "ranks", "EPLB", "EPLB + best split", "sparsec + best split"]
    return f"A workload family that was held out, {len(range(first, len(loads.layers), every))} layers", head, rows


def noise(loads: Loads, every: int, seeds: int, picks: int = 4096 * 8) -> Table:
    """Planned on one scenario for its batches, measured on batches that were drawn anew."""
    ranks, slots = 32, 9
    one = picked(loads, [4], every)
    packed = eplb(_shares(one.counts[0], ranks), ranks, slots)
    fresh = _shares(batches(one.counts, 8, picks, np.random.default_rng(99)), ranks)
    split = partial(_best, ranks=devices(ranks, slots))
    ours = [
        _mean(fresh, plan(one, parse_topology("4x8"), Options(slots, batch=picks, seed=seed)).slots, split)
        for seed in range(seeds)
    ]
    theirs = (_mean(fresh, packed, partial(fullest, ranks=ranks)), _mean(fresh, packed, split))
    row: Row = [f"{ranks} x {slots}", *(round(value, 3) for value in theirs), _spread(ours)]
    head = ["ranks x slots", "EPLB", "EPLB + best split", "sparsec + best split"]
    return f"Batches of {picks} picks, {len(one.layers)} layers", head, [row]


def traffic(loads: Loads, layers: Sequence[int], tokens: int) -> Table:
    """Tokens made like a layer's histogram under DeepSeek-V3's rule of groups; half plan, the others measure."""
    ranks, slots, node = 64, 5, np.arange(64) // 8
    rows: list[Row] = []
    for topics in (0, 16):
        found: list[list[float]] = []
        for layer in layers:
            rng = np.random.default_rng(layer)
            routed = tokens_like(loads.counts[4, layer], 2 * tokens, rng, topics=topics)
            found.append(_compared(routed[:tokens], routed[tokens:], loads.counts.shape[2], slots, node, 8))
        rows.append([f"{ranks} x {slots}, {topics} topics", *_traffic_cells(np.array(found))])
    head = ["ranks x slots", "EPLB hierarchical", "EPLB", "EPLB, near replica", "sparsec"]
    return f"Load / nodes per token, 8 nodes, {len(layers)} layers, {tokens} tokens", head, rows


def recorded(routed: Ints, experts: int, seeds: int) -> Table:
    """The same of tokens that a model has routed: [tokens, k]."""
    half, node = len(routed) // 2, np.arange(12) // 3
    ways = {
        "first half plans": (routed[:half], routed[half:]),
        "second half plans": (routed[half:], routed[:half]),
        "every second token plans": (routed[::2], routed[1::2]),
    }
    for seed in range(seeds):
        mixed = np.random.default_rng(seed).permutation(routed)
        ways[f"a half by chance, {seed}"] = (mixed[:half], mixed[half:])
    rows: list[Row] = []
    for name, (known, unseen) in ways.items():
        rows.append([name, *_traffic_cells(np.array([_compared(known, unseen, experts, 6, node, 0)]))])
    head = ["12 x 6", "EPLB hierarchical", "EPLB", "EPLB, near replica", "sparsec"]
    return "Load / nodes per token, 4 nodes, recorded tokens", head, rows


def whole(loads: Loads) -> Table:
    """A robust plan of all layers and scenarios."""
    rows: list[Row] = []
    for ranks, slots in ROBUST:
        start, wall = time.process_time(), time.monotonic()
        made = plan(loads, parse_topology(f"{ranks // 8}x8"), Options(slots, seconds=1000))
        spent, wall = time.process_time() - start, time.monotonic() - wall
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        load = f"{np.mean([one['best']['mean'] for one in made.report['scenarios']]):.3f}"
        rows.append([f"{ranks} x {slots}", load, round(spent, 1), round(wall, 1), round(most, 2)])
    head = ["ranks x slots", "mean of scenarios, best split", "CPU s", "wall s", "most memory so far, GB"]
    return f"A robust plan of {len(loads.layers)} layers and {len(loads.names)} scenarios, one process", head, rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("loads", help="recorded loads")
    parser.add_argument("--routing", help="recorded routing, [tokens, 1, k]")
    parser.add_argument("--experts", type=int, default=60, help="of the recorded routing")
    parser.add_argument("--every", type=int, default=7, help="every n-th layer for held-out families and noise")
    parser.add_argument("--first", type=int, default=1, help="the first of those layers")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--only", action="append", choices=TABLES, help="the tables to measure; the others are kept")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "placement")
    args = parser.parse_args()
    loads = read_loads([args.loads])
    measures: dict[str, Callable[[], Table]] = {
        "static": lambda: static(loads, (0, 4, len(loads.names) - 1)),
        "held out": lambda: held_out(loads, args.every, args.first, args.seeds),
        "noise": lambda: noise(loads, args.every, args.seeds),
        "groups": lambda: traffic(loads, range(3, len(loads.layers), 14), args.tokens),
        "whole": lambda: whole(loads),
    }
    if args.routing:
        routed = read_routing(args.routing, [0], args.experts)[:, 0]
        measures["recorded"] = lambda: recorded(routed, args.experts, args.seeds)
    path = args.output.with_suffix(".json")
    kept = json.loads(path.read_text()) if path.is_file() else {}
    for name, measure in measures.items():
        if args.only and name not in args.only:
            continue
        title, head, rows = measure()
        kept[name] = {"title": title, "columns": head, "rows": rows}
        print(_markdown(kept[name]), flush=True)
        path.write_text(json.dumps(kept, indent=1) + "\n")
        tables = [_markdown(kept[one]) for one in TABLES if one in kept]
        path.with_suffix(".md").write_text("# Placements beside EPLB\n\n" + "\n".join(tables))


def _compared(known: Ints, unseen: Ints, experts: int, slots: int, node: Ints, groups: int) -> list[float]:
    """Load and nodes of EPLB hierarchical (0 where there are no groups), EPLB, EPLB near, and the planner."""
    ranks = devices(len(node), slots)
    weight = np.bincount(known.ravel(), minlength=experts) / known.size * len(node)
    packed = eplb(weight[None], len(node), slots)[0]
    placed, _, _ = best_place(known, weight, ranks, node)
    sent: list[Dispatch | None] = [None]
    if groups:
        sent = [_dealt(hierarchical(weight[None], len(node), slots, int(node[-1]) + 1, groups)[0], unseen, ranks, node)]
    sent += [_dealt(packed, unseen, ranks, node), dispatch(packed, unseen, ranks, node)]
    sent.append(dispatch(placed, unseen, ranks, node))
    return [value for one in sent for value in ((one.load.max(), one.nodes) if one else (0.0, 0.0))]


def _dealt(slots: Ints, routed: Ints, ranks: Ranks, node: Ints) -> Dispatch:
    """Replicas that take turns, whatever else their tokens need."""
    dealt = np.empty(routed.size, np.int64)
    flat = routed.ravel()
    for expert in range(int(slots.max()) + 1):
        at, homes = np.flatnonzero(flat == expert), np.flatnonzero(slots == expert)
        dealt[at] = homes[np.arange(len(at)) % len(homes)]
    chosen: Ints = dealt.reshape(routed.shape)
    load = np.bincount(ranks.of_slot[chosen].ravel(), minlength=len(node)) / routed.size * len(node)
    visited = np.sort(node[ranks.of_slot[chosen]], axis=1)
    return Dispatch(chosen, load, 1 + float((np.diff(visited, axis=1) > 0).sum(1).mean()))


def _traffic_cells(found: Floats) -> list[str | float]:
    mean = found.mean(0).reshape(-1, 2)
    return [f"{load:.3f} / {nodes:.2f}" if load else "" for load, nodes in mean]


def _shares(counts: Floats, ranks: int) -> Floats:
    return counts / counts.sum(-1, keepdims=True) * ranks


def _best(slots: Ints, load: Floats, ranks: Ranks) -> float:
    return best_split(slots, load, ranks)[1]


def _mean(share: Floats, slots: Ints, measure: Callable[[Ints, Floats], float]) -> float:
    return float(np.mean([measure(slots[layer], one[layer]) for one in share for layer in range(len(slots))]))


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _markdown(table: dict[str, Any]) -> str:
    lines = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
    return f"## {table['title']}\n\n" + "\n".join("| " + " | ".join(map(str, row)) + " |" for row in lines) + "\n"


if __name__ == "__main__":
    main()
