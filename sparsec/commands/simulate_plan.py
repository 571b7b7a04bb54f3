"""`sparsec simulate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from sparsec.console import out, working
from sparsec.diagnostics import SparsecError
from sparsec.passes.placement import Plan, read_plan
from sparsec.simulate.cases import Traffic, counts, of_size, placed, planned, shares
from sparsec.simulate.compute import device
from sparsec.simulate.layer import Setup
from sparsec.simulate.links import FITTED_RANKS
from sparsec.simulate.model import MoE
from sparsec.simulate.run import Point

ORIGIN = {
    "dispatch, combine": "fitted: latency and share of bandwidth, to DeepEP's published times of "
    f"EP8 to {FITTED_RANKS}",
    "experts, shared, rest": "data sheet of the chip, less the shares that published kernels lose; routers, norms and "
    "what launches cost beside GEMMs are left out",
    "links": "data sheet: the topology's bandwidths",
    "routing": "recorded loads, batches drawn around them",
    "hidden": "the schedule at its best: what runs beside costs nothing",
}
DRAWN = "drawn: a power law, groups of hot experts, batches around it, as recorded of DeepSeek-V3"
REPLAYED = "recorded tokens"


PARTS = ("rest", "shared", "dispatch", "experts", "combine", "hidden", "total")
LONG = 0.01  #: seconds of a layer from which it is told in milliseconds
NUMBERS = ("hidden", "intermediate", "experts", "k", "layers", "dtype", "shared", "groups", "top_groups", "rest")


def run(
    model: str | None,
    plan: Path | None,
    devices: str | None,
    topology: str | None,
    target: str,
    loads: tuple[str, ...],
    routing: Path | None,
    policy: str,
    batches: int,
    seed: int,
    slots: int | None,
    placement: str,
    split: str,
    algo: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Simulate a plan, or a number of devices, and print. Raises: SparsecError."""
    if (plan is None) == (devices is None):
        raise SparsecError("name what is simulated\n  hint: --plan plan.json, or --devices 8..2048")
    for name, used in (("--routing", routing is not None), ("--policy", policy != "static")):
        if used and plan is None:
            raise SparsecError(f"{name} is of a plan's layers\n  hint: --plan plan.json")
    for name, used in (("--topology", topology is not None), ("--slots", slots is not None)):
        if used and plan is not None:
            raise SparsecError(f"{name} is of --devices: the plan has its own")
    algo = algo or ("two_level" if options["dedup"] == "node" else "flat")
    numbers = {key: options.pop(key) for key in NUMBERS}
    points, unfit = list[Point](), dict[str, str]()
    with working(as_json) as status:
        status.say("read")
        made = None if plan is None else read_plan(plan)
        moe = moe_of(model, numbers, made)
        on, traffic = device(target), Traffic(shares(loads, moe, made), routing, policy, batches, seed)
        cases = [made.topology] if made else [of_size(topology or "1x8", ranks) for ranks in counts(devices or "")]
        status.step("simulate")
        for where in cases:
            status.say(f"simulate {len(where.ranks)} ranks")
            setup = Setup(moe, where, on, algo=algo, best=split == "best", **options)
            try:
                points.append(planned(setup, made, traffic) if made else placed(setup, slots, placement, traffic))
            except SparsecError as error:
                if len(cases) == 1:
                    raise
                unfit[f"{len(where.ranks)} ranks"] = str(error).partition("\n")[0].removeprefix("error: ")
    if not points:
        raise SparsecError(f"on no number of devices: {', '.join(f'{case}: {why}' for case, why in unfit.items())}")
    notes = ORIGIN | ({} if loads else {"routing": DRAWN}) | ({"routing": REPLAYED} if routing else {})
    if any(one.extrapolated for one in points):
        notes["*"] = f"extrapolated: nothing is published beyond EP{FITTED_RANKS}"
    if as_json:
        found = [to_json(one) for one in points]
        print(json.dumps({"ok": True, "model": asdict(moe), "points": found, "unfit": unfit, "origin": notes}))
        return
    for table in tables(points):
        out.print(table)
        out.print()
    for what, why in (unfit | notes).items():
        out.print(f"{what}: {why}", style="dim")


def moe_of(name: str | None, numbers: dict[str, Any], plan: Plan | None) -> MoE:
    """The model: as `sparsec info` reads it, then as the options say, then as the plan does.

    Raises: SparsecError naming what is missing, or what does not agree.
    """
    known = of_model(name) if name else {}
    known |= {key: value for key, value in numbers.items() if value is not None}
    if plan is not None:
        for key, value in (("experts", plan.experts), ("layers", len(plan.layers))):
            if known.setdefault(key, value) != value:
                raise SparsecError(f"the plan is of {value} {key}, the model has {known[key]}")
    missing = [key for key in ("hidden", "intermediate", "experts", "k", "layers") if key not in known]
    if missing:
        flags = " ".join(f"--{'top-k' if key == 'k' else key} N" for key in missing)
        raise SparsecError(f"the model is not known: {', '.join(missing)} missing\n  hint: name it, or give {flags}")
    return MoE(**known)


def of_model(name: str) -> dict[str, Any]:
    """What `sparsec info` finds. Raises: SparsecError for a model without experts, or whose width is not found."""
    from sparsec.frontend.models import load_model
    from sparsec.inspect.info import info

    if (Path(name) / "manifest.json").is_file():
        found = info(Path(name))
    else:
        loaded = load_model(name, meta=(Path(name) / "config.json").is_file())
        given: Any = loaded.model
        found = info(given, loaded.args, loaded.kwargs)
    if not found.routed:
        raise SparsecError(f"{name} has no expert layer that could be found\n  hint: `sparsec info {name}` says why")
    kind = max(found.routed, key=lambda kind: kind.parameters)
    if kind.hidden is None:
        raise SparsecError(f"{name}: the width of a token was not found\n  hint: --hidden N")
    names = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float8_e4m3fn": "fp8", "float8_e5m2": "fp8"}
    dtype = max(found.dtypes, key=lambda dtype: found.dtypes[dtype])
    routed = sum(one.parameters * one.k // one.experts for one in found.routed)
    beside = found.active_without_embedding - routed - (kind.shared_parameters or 0) * kind.layers
    return {
        "hidden": kind.hidden,
        "intermediate": kind.expert_parameters // (3 * kind.hidden),
        "experts": kind.experts,
        "k": kind.k,
        "layers": kind.layers,
        "dtype": names.get(dtype, "bf16"),
        "shared": kind.shared_experts or 0.0,
        "rest": max(0, beside) // kind.layers,
        "memory": (found.kv_bytes_per_token or 0) / max(1, found.layers),
    }


def to_json(point: Point) -> dict[str, Any]:
    """A point as JSON: times in microseconds, bytes of one layer's dispatch and combine."""
    times = asdict(point.times) | {"total": point.times.total}
    return {
        "ranks": point.ranks,
        "nodes": point.node_count,
        "slots_per_rank": point.slots,
        "load": point.load,
        "nodes_per_token": point.nodes,
        "ranks_per_token": point.reached,
        "bytes": {"inside": point.inside, "outside": point.net},
        "memory": point.memory,
        "layer_us": {name: value * 1e6 for name, value in times.items()},
        "step_ms": point.step * 1e3,
        "tokens_per_second_per_rank": point.rate,
        "extrapolated": point.extrapolated,
    }


def tables(points: list[Point]) -> list[Table]:
    """A row for each point: what is where and sent, then the times of a layer. Parts that nothing has are left out."""
    balance = _table("ranks", "slots", "fullest rank/\nmean", "nodes/\ntoken", "MB/link\nin node", "MB/link\noutside")
    parts = [part for part in PARTS if any(getattr(one.times, part) for one in points)]
    unit, scale = ("us", 1e6) if max(one.times.total for one in points) < LONG else ("ms", 1e3)
    times = _table("ranks", *(f"{part}\n{unit}" for part in parts), "step\nms", "tokens\n/s/rank")
    for one in points:
        ranks = f"{one.ranks}{'*' if one.extrapolated else ''}"
        balance.add_row(
            ranks, str(one.slots), f"{one.load:.3f}", *map(_short, (one.nodes, one.inside / 1e6, one.net / 1e6))
        )
        signed = [getattr(one.times, part) * (-scale if part == "hidden" else scale) for part in parts]
        times.add_row(ranks, *map(_short, signed), _short(one.step * 1e3), f"{one.rate:,.0f}")
    return [balance, times]


def _table(*heads: str) -> Table:
    shown = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    for head in heads:
        shown.add_column(head, justify="right", no_wrap=True)
    return shown


def _short(value: float) -> str:
    """Three digits or more, in few columns."""
    size = abs(value)
    return f"{value:.2f}" if size < 9.995 else f"{value:.1f}" if size < 99.95 else f"{value:.0f}"
