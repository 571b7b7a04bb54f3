"""Placements beside DeepSeek's published EPLB: `python -m benchmarks.placement LOADS.npz [--ranks 32] [--slots 9]`.

Prints the table of static balance, and, where the file has scenarios whose names begin alike (`decode_...`,
`prefill_...`), plans on some families and measures on the one that was held out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from sparsec.passes.placement import Loads, Options, best_split, parse_topology, plan, read_loads
from sparsec.passes.placement.bound import lower_bound
from sparsec.passes.placement.search import Ranks

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def eplb(loads: Floats, ranks: int, slots: int) -> Ints:
    """The global policy of EPLB: replicate whoever is hottest per replica, then pack, heaviest first.

    It may put two replicas of one expert on one rank, as the original does.

    Args:
        loads: [layers, experts].
        slots: of each rank.

    Returns:
        [layers, ranks * slots]: the expert in each slot.
    """
    layers, experts = loads.shape
    result = np.empty((layers, ranks * slots), np.int64)
    for layer, load in enumerate(loads):
        expert = list(range(experts))
        counts = np.ones(experts, np.int64)
        while len(expert) < ranks * slots:
            hottest = int((load / counts).argmax())
            expert.append(hottest)
            counts[hottest] += 1
        weight = (load / counts)[expert]
        held: list[list[int]] = [[] for _ in range(ranks)]
        total = np.zeros(ranks)
        for item in np.argsort(-weight, kind="stable"):
            rank = min((rank for rank in range(ranks) if len(held[rank]) < slots), key=lambda rank: total[rank])
            held[rank].append(expert[item])
            total[rank] += weight[item]
        result[layer] = [one for some in held for one in some]
    return result


def best_fullest(slots: Ints, load: Floats, devices: Ranks) -> float:
    """The same when replicas share as well as they can."""
    return best_split(slots, load, devices)[1]


def fullest(slots: Ints, load: Floats, ranks: int) -> float:
    """The load of the fullest rank when replicas share equally. slots: [slots], load: [experts]."""
    share = load / np.maximum(np.bincount(slots, minlength=len(load)), 1)
    return float(share[slots].reshape(ranks, -1).sum(1).max())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("loads")
    parser.add_argument("--every", type=int, default=10, help="use every n-th layer for held-out families")
    parser.add_argument("--rounds", type=int, default=Options.rounds)
    args = parser.parse_args()
    loads = read_loads([args.loads])
    console = Console()
    console.print(_static(loads))
    console.print(_held_out(loads, args.every, args.rounds))


def _shares(counts: Floats, ranks: int) -> Floats:
    return counts / counts.sum(-1, keepdims=True) * ranks


def _static(loads: Loads) -> Table:
    table = Table("ranks", "slots", "EPLB over bound", "sparsec over bound", "worse layers", "seconds", box=None)
    for ranks, slots in ((16, 16), (32, 9), (32, 10), (64, 5), (72, 4), (128, 3)):
        theirs: list[float] = []
        ours: list[float] = []
        seconds = 0.0
        for scenario in (0, len(loads.counts) - 1):
            one = Loads(loads.counts[scenario][None], loads.names[:1], loads.layers)
            share = _shares(loads.counts[scenario], ranks)
            bound = lower_bound(share, np.full(ranks, slots), np.ones(ranks))
            start = time.process_time()
            made = plan(one, parse_topology(f"1x{ranks}"), Options(slots))
            seconds = max(seconds, time.process_time() - start)
            ours += [layer["load"] / layer["bound"] for layer in made.report["layers"]]
            packed = eplb(share, ranks, slots)
            theirs += [fullest(row, share[i], ranks) / bound[i] for i, row in enumerate(packed)]
        worse = sum(a > b * (1 + 1e-9) for a, b in zip(ours, theirs, strict=True))
        row = (f"{np.mean(theirs) - 1:.2%}", f"{np.mean(ours) - 1:.2%}", str(worse), f"{seconds:.2f}")
        table.add_row(str(ranks), str(slots), *row)
    return table


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


def _held_out(loads: Loads, every: int, rounds: int) -> Table:
    table = Table("held out", "ranks", "EPLB", "EPLB + LP split", "sparsec + split", "seconds", box=None)
    picked = range(0, len(loads.layers), every)
    for ranks, slots in ((32, 9), (64, 5)):
        for name, out in families(loads.names).items():
            kept = [index for index in range(len(loads.names)) if index not in out]
            known = Loads(
                loads.counts[kept][:, picked],
                tuple(loads.names[index] for index in kept),
                tuple(loads.layers[index] for index in picked),
            )
            share = _shares(loads.counts[out][:, picked], ranks)
            packed = eplb(_shares(known.counts, ranks).mean(0), ranks, slots)
            start = time.process_time()
            made = plan(known, parse_topology(f"{ranks // 8}x8"), Options(slots, rounds=rounds))
            seconds = time.process_time() - start
            devices = Ranks(made.rank_of_slot, np.ones(ranks, np.float32))
            equal = _mean(share, packed, partial(fullest, ranks=ranks))
            split = partial(best_fullest, devices=devices)
            lp, ours = _mean(share, packed, split), _mean(share, made.slots, split)
            table.add_row(name, str(ranks), *(f"{value:.3f}" for value in (equal, lp, ours)), f"{seconds:.1f}")
    return table


def _mean(share: Floats, slots: Ints, measure: Callable[[Ints, Floats], float]) -> float:
    return float(np.mean([measure(slots[layer], one[layer]) for one in share for layer in range(len(slots))]))


if __name__ == "__main__":
    main()
