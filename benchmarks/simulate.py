"""The simulator beside published measurements: `python -m benchmarks.simulate [LOADS.npz] [--fit]`.

Writes `benchmarks/results/simulate.md` and `.json`. Points 1 to 5 are also tests. Points 6 to 8 are reported as they
come: nothing is tuned to them. LOADS are recorded expert loads of DeepSeek-V3; without them loads are drawn.
`--fit` prints the constants of `sparsec/simulate/links.py` anew, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.eplb import eplb
from benchmarks.published_ep import (
    DEVIATION,
    EXCHANGES,
    IMBALANCES,
    ROWS_A_RANK,
    TOLERANCE,
    TRTLLM,
    WHOLES,
    Exchange,
    Imbalance,
)
from sparsec.passes.placement import parse_topology, read_loads
from sparsec.passes.placement.scenarios import batches
from sparsec.simulate import Device, Experts, MoE, Point, Setup, in_order, simulate
from sparsec.simulate.links import LOW_LATENCY, THROUGHPUT, Kernel, link_seconds, row_bytes
from sparsec.simulate.routing import histogram

Floats = NDArray[np.float64]

V3 = MoE(7168, 2048, 256, 8, 61, "fp8", shared=1, groups=8, top_groups=4, rest=187_107_328)
"""DeepSeek-V3. Its 3 dense layers are as wide as 9 experts: they count as layers of experts that are not sent."""

PREFILL = replace(V3, attention=2 * (192 + 128) * 128)
DECODE = replace(V3, attention=2 * (576 + 512) * 128, memory=576 * 2)
"""Keys and values are made anew in prefill; in decode all heads share one latent of 576 numbers a token."""

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """A published figure and ours. `error` is ours over it, less 1, or the difference where `absolute`."""

    point: int
    what: str
    unit: str
    published: float
    ours: float
    tolerance: float
    absolute: bool
    tested: bool
    source: str

    @property
    def error(self) -> float:
        return self.ours - self.published if self.absolute else self.ours / self.published - 1

    @property
    def within(self) -> bool:
        return abs(self.error) <= self.tolerance


def even(model: MoE, ranks: int) -> tuple[Experts, Floats]:
    """Experts in order, on as many ranks, all used alike."""
    topology = parse_topology(f"1x{ranks}")
    return in_order(model.experts, [model.experts // ranks] * ranks, topology, 1), np.full(
        (1, model.experts), 1 / model.experts
    )


def setup_of(row: Exchange) -> Setup:
    """The exchange's own benchmark: routing is uniform; of many nodes, a token's experts are on few."""
    nodes, width = max(1, row.ranks // 8), min(8, row.ranks)
    groups = (nodes, row.top_groups) if row.top_groups else (1, 1)
    model = replace(V3, groups=groups[0], top_groups=groups[1], shared=0, rest=0)
    topology = parse_topology(f"{nodes}x{width}:nvlink={row.nvlink:.0f},ib={row.net:.0f}")
    variant = ("none", "flat") if row.unit == "us" else ("rank", "flat") if nodes == 1 else ("node", "two_level")
    return Setup(model, topology, Device("cuda:sm_90"), row.tokens, *variant, payload="fp8")


@cache
def uniform(row: Exchange) -> tuple[Setup, Point]:
    """The exchange, simulated."""
    setup = setup_of(row)
    experts, share = even(setup.model, row.ranks)
    return setup, simulate(setup, experts, share, np.random.default_rng(0), count=1, noise=False)


def exchange(row: Exchange) -> tuple[float, float]:
    """Dispatch and combine in the unit in which they were published."""
    setup, point = uniform(row)
    return _in_unit(row, setup, point, point.times.dispatch, point.times.combine)


def _in_unit(row: Exchange, setup: Setup, point: Point, dispatch: float, combine: float) -> tuple[float, float]:
    """Seconds as published. Bandwidths count all rows of a token, those that stay on its node or rank included."""
    if row.unit == "us":
        return dispatch * 1e6, combine * 1e6
    out, back = row_bytes(setup.model, "fp8")
    rows = row.tokens * (point.nodes if row.unit == "net" else point.reached)
    return rows * out / dispatch / 1e9, rows * back / combine / 1e9


def imbalance(row: Imbalance, share: Floats, rng: np.random.Generator, count: int = 20) -> tuple[float, float]:
    """Excess of the fullest rank, and the deviation of the ranks' rows, on average over layers and batches.

    Args:
        share: [layers, experts].
    """
    topology = parse_topology(f"1x{row.ranks}")
    size = row.slots or share.shape[1] // row.ranks
    experts = in_order(share.shape[1], [size] * row.ranks, topology, len(share))
    if row.slots:
        experts = planned(share, row.ranks, size)
    drawn = batches(share[None], count, ROWS_A_RANK * row.ranks, rng)
    loads = np.array(
        [
            np.bincount(experts.rank_of_slot, experts.rows(layer, counts, False), row.ranks)
            for one in drawn
            for layer, counts in enumerate(one)
        ]
    )
    return float((loads.max(1) / loads.mean(1)).mean()) - 1, float(loads.std(1).mean())


def planned(share: Floats, ranks: int, size: int) -> Experts:
    """EPLB's placement of a histogram, with its equal shares."""
    slots = eplb(share, ranks, size)
    number = np.stack([np.bincount(row, minlength=share.shape[1])[row] for row in slots])
    return Experts(slots, 1.0 / number, np.repeat(np.arange(ranks), size), np.ones(ranks))


def wholes(prefill: Floats, decode: Floats, schedule: str) -> list[float]:
    """Ours for `WHOLES`, in their order. prefill, decode: [layers, experts], how picks spread.

    A rank has 16,384 tokens in prefill; in decode 256 (LMSYS), or 128, as in DeepSeek's profiles. Context is half a
    prompt in prefill, and what the source says in decode.
    """

    def rate(model: MoE, share: Floats, ranks: int, nvlink: int, tokens: int, context: float, best: bool) -> float:
        throughput = model is PREFILL
        topology = parse_topology(f"{ranks // 8}x8:nvlink={nvlink}GB/s,ib=50GB/s")
        variant = ("node", "two_level") if throughput else ("none", "flat")
        setup = Setup(model, topology, Device("cuda:sm_90"), tokens, *variant, "fp8", schedule, context)
        size = -(-288 // ranks) if best else -(-256 // ranks)
        layers = len(share)
        experts = planned(share, ranks, size) if best else in_order(256, [size] * ranks, topology, layers)
        return 8 * simulate(setup, experts, share, np.random.default_rng(0), count=2).rate

    fill = [rate(PREFILL, prefill, 32, 450, 16_384, 1_000, best) for best in (True, False)]
    out = [rate(DECODE, decode, 72, 450, 256, 2_050, best) for best in (True, False)]
    h800 = rate(PREFILL, prefill, 32, 160, 16_384, 2_500, True), rate(DECODE, decode, 144, 160, 128, 4_989, True)
    return [fill[0] / fill[1], out[0] / out[1], fill[0], out[0], *h800]


def rows(prefill: Floats, decode: Floats) -> Iterator[Row]:
    """All points."""
    for one in EXCHANGES:
        ours = exchange(one)
        ways = ((one.point, "dispatch", one.dispatch), (one.back, "combine", one.combine))
        for (point, way, published), got in zip(ways, ours, strict=True):
            unit = "us" if one.unit == "us" else f"GB/s {one.unit}"
            what = f"{one.what}, EP{one.ranks}, {way}"
            yield Row(point, what, unit, published, got, TOLERANCE[point], False, True, one.source)
    rng = np.random.default_rng(0)
    for row in IMBALANCES:
        excess, deviation = imbalance(row, np.concatenate([prefill, decode]), rng)
        planner = bool(row.slots)
        yield Row(5, row.what, "max/mean - 1", row.excess, excess, row.tolerance, planner, True, row.source)
        if row.ranks == 32 and planner:
            what = f"{row.what}, standard deviation"
            yield Row(5, what, "rows", DEVIATION, deviation, 0.1, False, True, TRTLLM)
    for schedule in ("two-batch", "sum"):
        for whole, rate in zip(WHOLES, wholes(prefill, decode, schedule), strict=True):
            what = f"{whole.what}, schedule {schedule}"
            yield Row(whole.point, what, whole.unit, whole.value, rate, whole.tolerance, False, False, whole.source)


def fit() -> dict[str, tuple[float, ...]]:
    """The constants of `links.py` from `EXCHANGES`: latency in us, then shares."""

    def errors(which: str, way: int, make: Callable[[Floats], Kernel], x: Floats) -> Iterator[float]:
        for row in EXCHANGES:
            if (row.unit == "us") == (which == "us"):
                setup, point = uniform(row)
                links, size = (point.rows, point.rows.back)[way], row_bytes(setup.model, "fp8")[way]
                seconds = link_seconds(make(x), links, size, setup.topology)
                yield _in_unit(row, setup, point, seconds, seconds)[way] / (row.dispatch, row.combine)[way] - 1

    def both(x: Floats) -> float:
        return sum(e**8 for way in (0, 1) for e in errors("net", way, lambda x: Kernel(x[0] * 1e-6, x[1], x[2]), x))

    def one(way: int) -> Callable[[Floats], float]:
        return lambda x: sum(e**8 for e in errors("us", way, lambda x: Kernel(x[0] * 1e-6, x[1], x[1]), x))

    return {
        "low latency, dispatch": _least(one(0), (20.0, 0.9)),
        "low latency, combine": _least(one(1), (20.0, 0.9)),
        "throughput": _least(both, (40.0, 0.85, 0.85)),
    }


def _least(cost: Callable[[Floats], float], start: tuple[float, ...]) -> tuple[float, ...]:
    """The nearest least value, by steps along the axes and along what the last ones gained."""
    x = np.array(start)
    step = 0.2 * x
    while float((step / x).max()) > 1e-5:
        before = x.copy()
        for axis in range(len(x)):
            for sign in (1, -1):
                there = x.copy()
                there[axis] += sign * step[axis]
                x = there if cost(there) < cost(x) else x
        there = x + (x - before)
        x = there if cost(there) < cost(x) else x
        step = step / 2 if (x == before).all() else step
    return tuple(x.tolist())


def main() -> None:
    """Measure against the published figures, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("loads", nargs="?")
    parser.add_argument("--fit", action="store_true")
    args = parser.parse_args()
    console = Console()
    if args.fit:
        for name, values in fit().items():
            console.print(f"{name}: {', '.join(f'{value:.4g}' for value in values)}")
        console.print(f"now: {LOW_LATENCY}, {THROUGHPUT}")
        return
    prefill, decode, named = shares(args.loads)
    every = list(rows(prefill, decode))
    table = Table("point", "what", "unit", "published", "ours", "error", "wanted", "", box=None)
    for row in every:
        table.add_row(*cells(row))
    console.print(table)
    write(every, named)


def shares(loads: str | None) -> tuple[Floats, Floats, str]:
    """[layers, experts] of prefill and of decode, every 8th layer; and what they are."""
    if loads is None:
        rng = np.random.default_rng(0)
        return histogram(V3, 8, rng), histogram(V3, 8, rng), "expert loads are drawn"
    read = read_loads([loads])
    share = read.counts / read.counts.sum(2, keepdims=True)
    picked = [[i for i, name in enumerate(read.names) if name.startswith(kind)] for kind in ("prefill", "decode")]
    prefill, decode = (share[some][:, ::8].reshape(-1, share.shape[2]) for some in picked)
    return prefill, decode, f"expert loads: {len(read.names)} recorded workloads of DeepSeek-V3, every 8th layer"


def cells(row: Row) -> list[str]:
    """A row of the table, as text."""
    digits = 3 if abs(row.published) < 10 else 0
    error = f"{row.error:+.3f}" if row.absolute else f"{row.error:+.1%}"
    wanted = f"{row.tolerance:.2f}" if row.absolute else f"{row.tolerance:.0%}"
    verdict = ("within" if row.within else "OUTSIDE") + ("" if row.tested else ", not tuned")
    figures = (f"{row.published:,.{digits}f}", f"{row.ours:,.{digits}f}")
    return [str(row.point), row.what, row.unit, *figures, error, wanted, verdict]


def write(every: list[Row], named: str) -> None:
    """`results/simulate.md` and `.json`."""
    head = ["point", "what", "unit", "published", "ours", "error", "wanted", ""]
    lines = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *map(cells, every))]
    points = {row.source: sorted({str(one.point) for one in every if one.source == row.source}) for row in every}
    sources = "\n".join(f"- {', '.join(some)}: {source}" for source, some in points.items())
    text = (
        f"# The simulator beside published measurements\n\n`python -m benchmarks.simulate`; {named}.\n"
        "Points 1 to 5 are tests. There is one set of constants, fitted to points 1 to 4 and to nothing below.\n"
        "Points 6 to 8 are whole systems. Real ones lie between `two-batch`, where overlap costs nothing, and `sum`,\n"
        "where nothing overlaps, less what is left out: routers, norms, quantisation, sampling, waiting.\n\n"
        + "\n".join(lines)
        + f"\n\nSources by point:\n\n{sources}\n"
    )
    (RESULTS / "simulate.md").write_text(text)
    data = [{**row.__dict__, "error": row.error, "within": row.within} for row in every]
    (RESULTS / "simulate.json").write_text(json.dumps({"loads": named, "rows": data}, indent=1) + "\n")


if __name__ == "__main__":
    main()
