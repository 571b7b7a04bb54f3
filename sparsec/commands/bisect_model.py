"""`sparsec bisect`."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch
from rich.table import Table
from torch.utils._pytree import tree_flatten

from sparsec.config import Config
from sparsec.console import out, working
from sparsec.diagnostics import SparsecError
from sparsec.frontend.capture import capture
from sparsec.frontend.models import load_model
from sparsec.inspect.bisect import Culprit, Report, bisect
from sparsec.inspect.check import random_inputs
from sparsec.targets import Target

TOKENS = (5, 9, 17)
"""Token counts of the inputs that are tried."""


def run(model: str, target: str | None, random_weights: bool, tolerance: float, as_json: bool) -> None:
    """Search a model for what makes its numbers wrong. Raises: SparsecError if something does."""
    target = Config.read(target=target).target
    Target.parse(target)
    with working(as_json) as status:
        status.step(f"load {model}")
        loaded = load_model(model, random_weights=random_weights)
        status.step("capture")
        captured = capture(loaded.model, loaded.args, loaded.kwargs)
        leaves = [leaf for leaf in tree_flatten((loaded.args, loaded.kwargs))[0] if isinstance(leaf, torch.Tensor)]
        inputs = [random_inputs(captured.module.main, leaves, count) for count in TOKENS]
        report = bisect(captured.module, captured.weights, inputs, target=target, tolerance=tolerance, say=status.say)
    if as_json:
        print(json.dumps({"ok": report.culprit is None, **asdict(report)}, default=str))
    else:
        out.print(_table(report))
        if report.skipped:
            out.print(report.skipped)
    if report.culprit is not None:
        raise SparsecError(describe(report.culprit))


def _table(report: Report) -> Table:
    table = Table("phase", "pass or kernel", "error", box=None, header_style="dim")
    for step in report.steps:
        table.add_row(step.phase, step.name, f"{step.error:.1e}")
    for name, error in report.kernels.items():
        table.add_row("emit", name, f"{error:.1e}")
    return table


def describe(culprit: Culprit) -> str:
    """The finding as an error's text."""
    place = f"{culprit.loc}: " if culprit.loc else ""
    lines = [
        f"{place}error: {culprit.kind} '{culprit.name}' makes wrong numbers: {culprit.error:.1e} of the largest value"
    ]
    lines += [f"    {culprit.loc.source.strip()}"] if culprit.loc.source.strip() else []
    what = "the kernel computes" if culprit.kind == "kernel" else "the first wrong value is of"
    lines += [f"  {what}", *(f"    {line}" for line in culprit.op.splitlines())]
    for text, rules in culprit.made:
        lines += [f"  which reads what the pass made (by {rules})", *(f"    {line}" for line in text.splitlines())]
    for text in culprit.gone:
        lines += ["  which read before what the pass removed", *(f"    {line}" for line in text.splitlines())]
    return "\n".join(lines)
