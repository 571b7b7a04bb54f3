"""`sparsec plan`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from sparsec.console import out, working
from sparsec.diagnostics import SparsecError
from sparsec.passes.placement import (
    Options,
    Plan,
    parse_topology,
    plan,
    read_loads,
    read_plan,
    read_routing,
    write_plan,
)


def run(
    loads: Sequence[str],
    topology: str,
    output: Path,
    routing: Path | None,
    old: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Plan a placement and write it. Raises: SparsecError for bad input, OSError where it cannot be written."""
    if options["moves"] is not None and routing is not None:
        raise SparsecError("--moves and --routing do not go together\n  hint: leave one of them out")
    if options["moves"] is not None and old is None:
        raise SparsecError("--moves limits what changes of an old plan, and none is given\n  hint: --old plan.json")
    with working(as_json) as status:
        status.step(f"read {', '.join(loads)}")
        read = read_loads(loads)
        status.step(f"plan {read.counts.shape[1]} layers of {read.counts.shape[2]} experts")
        made = plan(
            read,
            parse_topology(topology),
            Options(**options),
            routing=read_routing(routing, read.layers, read.counts.shape[2]) if routing else None,
            old=read_plan(old) if old else None,
            say=status.say,
        )
        write_plan(made, output)
    if as_json:
        print(json.dumps({"ok": True, "output": str(output), **made.report}))
        return
    for table in tables(made):
        out.print(table)
    if made.report["cut_short"]:
        out.print("The search ran out of time: another run may end elsewhere. More time: --seconds.")


def tables(plan: Plan) -> list[Table]:
    """The plan's figures: one table over all layers, one of the scenarios."""
    figures = plan.report
    whole = Table("", "mean of layers", "worst layer", box=None, header_style="dim")
    whole.add_row("fullest rank, of the mean load", *_pair(figures["load"]))
    whole.add_row("lower bound", *_pair(figures["bound"]))
    whole.add_row("gap", *(f"{figures['gap'][key]:.2%}" for key in ("mean", "worst")))
    for side, name in (("inside", "to the fullest rank from its node"), ("outside", "from other nodes")):
        link = figures["links"][side]
        bytes_ = f"{link['bytes_per_pick']:.1f} B/pick" if link["bytes_per_pick"] else ""
        whole.add_row(name, f"{link['rows_per_pick']:.5f} rows/pick", bytes_)
    if figures["nodes_per_token"] is not None:
        whole.add_row("nodes per token", f"{figures['nodes_per_token']:.3f}", "")
        whole.add_row("fullest rank, as those tokens go", f"{figures['load_of_routing']:.4f}", "")
    if any(figures["memory"]):
        whole.add_row("memory of the fullest rank", f"{max(figures['memory']) / 1e9:.2f} GB", "")
    if figures["moved"] is not None:
        change = figures["moved"]
        whole.add_row("experts to load anew", str(change["experts"]), f"{change['bytes'] / 1e9:.2f} GB")
    each = Table("scenario", "planned split", "worst", "best split", "worst", box=None, header_style="dim")
    for one in figures["scenarios"]:
        each.add_row(one["name"], *_pair(one["planned"]), *_pair(one["best"]))
    return [whole, each]


def _pair(summary: dict[str, float]) -> tuple[str, str]:
    return f"{summary['mean']:.4f}", f"{summary['worst']:.4f}"
