"""`sparsec bisect`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from rich.table import Table
from torch.utils._pytree import tree_flatten

from sparsec.config import Config
from sparsec.console import out, working
from sparsec.diagnostics import SparsecError
from sparsec.frontend.capture import capture
from sparsec.frontend.models import load_model
from sparsec.inspect.bisect import Report, bisect
from sparsec.inspect.check import random_inputs
from sparsec.inspect.culprit import describe
from sparsec.inspect.dump import Dump
from sparsec.targets import Target

TOKENS = (5, 17, 150)
"""Token counts of the inputs that are tried: few, and enough that experts of limited capacity are full."""


def run(
    model: str, target: str | None, random_weights: bool, tolerance: float, dump: Path | None, as_json: bool
) -> None:
    """Search a model for what makes its numbers wrong. Raises: SparsecError if something does."""
    config = Config.read(target=target, dump=dump)
    Target.parse(config.target)
    with working(as_json) as status:
        status.step(f"load {model}")
        loaded = load_model(model, random_weights=random_weights)
        status.step("capture")
        captured = capture(loaded.model, loaded.args, loaded.kwargs)
        leaves = [leaf for leaf in tree_flatten((loaded.args, loaded.kwargs))[0] if isinstance(leaf, torch.Tensor)]
        inputs = [random_inputs(captured.module.main, leaves, count) for count in TOKENS]
        dumped = Dump(config.dump, f"{loaded.name}-bisect") if config.dump else None
        report = bisect(
            captured.module,
            captured.weights,
            inputs,
            target=config.target,
            tolerance=tolerance,
            instruments=[dumped] if dumped else [],
            say=status.say,
        )
        if dumped:
            dumped.close()
    if as_json:
        print(json.dumps({"ok": report.culprit is None, **asdict(report)}, default=str))
    else:
        out.print(_table(report, tolerance))
        if report.skipped:
            out.print(report.skipped)
    if report.culprit is not None:
        raise SparsecError("\n".join([describe(report.culprit), *_further(model, report, dumped)]))
    if not as_json:
        out.print(f"nothing is wrong: {len(report.steps)} passes, {len(report.kernels)} kernels")


def _table(report: Report, tolerance: float) -> Table:
    table = Table("phase", "pass or kernel", "error", box=None, header_style="dim")
    rows = [(step.phase, step.name, step.error) for step in report.steps]
    wrong = report.culprit.name if report.culprit is not None else ""
    for phase, name, error in [*rows, *(("emit", name, error) for name, error in report.kernels.items())]:
        mark = "[red]" if error > tolerance and name == wrong else ""
        table.add_row(phase, f"{mark}{name}", f"{mark}{error:.1e}")
    return table


def _further(model: str, report: Report, dumped: Dump | None) -> list[str]:
    """Where to look next."""
    culprit = report.culprit
    assert culprit is not None
    if culprit.kind == "kernel":
        return [f"  its source: sparsec compile {model} -o OUT --dump DIR, then DIR/*/kernels/{culprit.name}.*"]
    if dumped is None:
        return [f"  what else it changed: sparsec bisect {model} --dump DIR"]
    texts = [entry for entry in dumped.entries if "file" in entry]
    files = [str(dumped.folder / entry["file"]) for entry in texts]
    return [
        f"  all that it changed: {dumped.folder / texts[-1]['diff']}",
        f"  the pass alone: sparsec opt {files[-2]} --passes '{culprit.name}'",
    ]
