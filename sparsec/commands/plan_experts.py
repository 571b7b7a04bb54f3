"""`sparsec plan`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsec.commands.plan_tables import measure, tables
from sparsec.console import out, working
from sparsec.diagnostics import SparsecError
from sparsec.passes.placement import (
    Options,
    parse_topology,
    plan,
    read_loads,
    read_plan,
    read_routing,
    write_plan,
)
from sparsec.passes.placement.plan_file import check_writable


def run(
    loads: Sequence[str],
    topology: str,
    output: Path,
    routing: Path | None,
    old: Path | None,
    html: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Plan a placement and write it. Raises: SparsecError for bad input, OSError where it cannot be written."""
    if options["moves"] is not None and routing is not None:
        raise SparsecError("--moves and --routing do not go together\n  hint: leave one of them out")
    if options["moves"] is not None and old is None:
        raise SparsecError("--moves limits what changes of an old plan, and none is given\n  hint: --old plan.json")
    for name in ("expert_bytes", "row_bytes", "seconds"):
        if not math.isfinite(options[name]):
            raise SparsecError(f"--{name.replace('_', '-')} is a number, not {options[name]}")
    for path in filter(None, (output, html)):
        check_writable(path)
    devices = parse_topology(topology)
    with working(as_json) as status:
        status.step(f"read {', '.join(loads)}")
        read = read_loads(loads)
        before = read_plan(old) if old else None
        status.step(f"plan {read.counts.shape[1]} layers of {read.counts.shape[2]} experts")
        made = plan(
            read,
            devices,
            Options(**options),
            routing=read_routing(routing, read.layers, read.counts.shape[2]) if routing else None,
            old=before,
            say=status.say,
        )
        status.say("measure")
        measured = measure(made, read, before)
        made.report.update(measured)
        write_plan(made, output)
        if html:
            from sparsec.inspect.html.plan_page import write_plan_page  # a second, which a plan alone need not wait for

            status.say(f"write {html}")
            write_plan_page(html, made, read, before)
    if as_json:
        print(json.dumps({"ok": True, "output": str(output), "html": str(html) if html else None, **made.report}))
        return
    for table in tables(made, measured):
        out.print(table)
        out.print()
    if read.layers[0]:
        out.print(f"Layers before {read.layers[0]} have no tokens and are taken for dense.")
    if made.report["cut_short"]:
        out.print("The search ran out of time: another run may end elsewhere. More time: --seconds.")
    if any(rank.memory for rank in devices.ranks) and not options["expert_bytes"]:
        out.print("Whether the experts fit into memory was not checked: say how large one is by --expert-bytes.")
    for path in filter(None, (output, html)):
        out.print(f"[green]{path}[/]", soft_wrap=True)
