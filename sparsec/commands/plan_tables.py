"""The figures of a plan, as tables of at most 80 columns and as JSON."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from sparsec.passes.placement import Loads, Plan
from sparsec.passes.placement.figures import POLICIES, figures, links, traffic

WORST = 5
"""Layers that are shown."""


def measure(plan: Plan, loads: Loads, old: Plan | None) -> dict[str, Any]:
    """What a plan does to some traffic: all scenarios, layers and links, before and after, ready for JSON."""
    found = figures(plan, loads, old)
    mean, *scenarios = found.rows()
    layers = found.layers(plan.layers)
    gaps = [layer["gap"] for layer in layers]
    return {
        "before": "old plan" if old is not None else "unplaced",
        "mean": mean,
        "gap": {"mean": sum(gaps) / len(gaps), "worst": max(gaps)},
        "scenarios": scenarios,
        "layers": layers,
        "traffic": {policy: links(plan, traffic(plan, loads, policy, mean_only=True)[0]) for policy in POLICIES},
    }


def tables(plan: Plan, measured: dict[str, Any]) -> list[Table]:
    """Summary, scenarios, the layers furthest from the bound, and links."""
    return [_summary(plan, measured), _scenarios(measured), _layers(measured), _links(plan, measured)]


def _summary(plan: Plan, measured: dict[str, Any]) -> Table:
    mean, report = measured["mean"], plan.report
    table = _table("fullest rank, over the mean (1: perfect)", "mean of layers", "worst layer")
    for name, key in ((measured["before"], "before"), ("this plan", "planned"), ("lower bound", "bound")):
        table.add_row(name, *_pair(mean[key]))
    table.add_row("gap to the bound", *(f"{measured['gap'][key]:.2%}" for key in ("mean", "worst")))
    if report.get("nodes_per_token"):
        table.add_row("nodes per token, with that routing", f"{report['nodes_per_token']:.3f}", "")
        table.add_row("fullest rank, with that routing", f"{report['load_of_routing']:.4f}", "")
    if report.get("expert_bytes"):
        room = max(rank.memory for rank in plan.topology.ranks)
        table.add_row(
            "experts on the fullest rank",
            f"{max(report['memory']) / 1e9:.2f} GB",
            f"of {room / 1e9:.0f} GB" if room else "",
        )
    if report.get("moved"):
        moved = report["moved"]
        size = f"{moved['bytes'] / 1e9:.2f} GB" if moved["bytes"] else f"of {plan.slots.size} slots"
        table.add_row("experts to load anew", str(moved["experts"]), size)
    return table


def _scenarios(measured: dict[str, Any]) -> Table:
    table = _table("traffic", measured["before"], "this plan", "worst", "best split", "worst")
    for one in measured["scenarios"]:
        before = f"{one['before']['mean']:.3f}"
        table.add_row(_name(one["name"]), before, *_pair(one["planned"], 3), *_pair(one["best"], 3))
    return table


def _layers(measured: dict[str, Any]) -> Table:
    table = _table("furthest from the bound", "before", "this plan", "bound", "gap", "fullest")
    for one in sorted(measured["layers"], key=lambda one: -one["gap"])[:WORST]:
        figures_ = (f"{one[key]:.4f}" for key in ("before", "load", "bound"))
        table.add_row(f"layer {one['layer']}", *figures_, f"{one['gap']:.2%}", f"rank {one['rank']}")
    return table


def _links(plan: Plan, measured: dict[str, Any]) -> Table:
    """Without deduplication, and with tokens that start on all ranks alike."""
    size = float(plan.report.get("row_bytes") or 0)
    unit = "KB per 1000 picks" if size else "rows per 1000 picks"
    table = _table("picks that go", "to own rank", "own node", "other nodes", unit)
    for policy, name in (("static", "by shares"), ("local", "near replicas first")):
        found = measured["traffic"][policy]
        kept = (found["own"], found["inside"]["rows"], found["outside"]["rows"])
        into = found["outside"] if plan.topology.nodes > 1 else found["inside"]
        amount = into["into_fullest"] * (size or 1000)
        table.add_row(name, *(f"{part:.1%}" for part in kept), f"{amount:.2f} into rank {into['into_rank']}")
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column(first, no_wrap=True, overflow="ellipsis")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _name(name: str) -> Text:
    """A name of a stranger's, without markup."""
    return Text(name if len(name) <= 26 else f"{name[:25]}…")


def _pair(summary: dict[str, float], places: int = 4) -> tuple[str, str]:
    return f"{summary['mean']:.{places}f}", f"{summary['worst']:.{places}f}"
