"""`sparsec check`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
import torch
from rich.table import Table
from torch import nn

from sparsec.commands.options import DTYPES
from sparsec.config import Config
from sparsec.console import out, working
from sparsec.diagnostics import SparsecError
from sparsec.frontend.models import load_model
from sparsec.inspect.check import Comparison, check
from sparsec.inspect.dump import Dump


def run(model: str, dtype: str | None, random_weights: bool, tokens: str, dump: Path | None, as_json: bool) -> None:
    """Compare and print. Raises: SparsecError where a figure exceeds its bound; click.UsageError."""
    try:
        counts = [int(part) for part in tokens.split(",")]
    except ValueError:
        raise click.UsageError(f"--tokens takes numbers separated by commas, not {tokens!r}") from None
    if min(counts) < 1:
        raise click.UsageError(f"--tokens takes numbers from 1 on, not {min(counts)}")
    with working(as_json) as status:
        status.step(f"load {model}")
        loaded = load_model(
            model, dtype=getattr(torch, DTYPES[dtype]) if dtype else None, random_weights=random_weights
        )
        if not isinstance(loaded.model, nn.Module):
            raise SparsecError("an exported program cannot be run eagerly: give the model itself")
        status.step("capture and compile")
        folder = Config.read(dump=dump).dump
        dumped = Dump(folder, f"{loaded.name}-check", kernels=True) if folder else None
        found = check(
            loaded.model,
            loaded.args,
            loaded.kwargs,
            tokens=counts,
            instruments=[dumped] if dumped else [],
            emitted_to=dumped.emitted if dumped else lambda emitted: None,
            say=status.say,
        )
    wrong = [comparison for comparison in found if not comparison.ok]
    if as_json:
        print(json.dumps({"ok": not wrong, "comparisons": [{**asdict(c), "ok": c.ok} for c in found]}))
    else:
        out.print(_table(found))
    if wrong:
        worst = max(wrong, key=lambda comparison: comparison.error / comparison.bound)
        raise SparsecError(
            f"{len(wrong)} of {len(found)} comparisons exceed their bound; the worst is {worst.what} of {worst.place} "
            f"at {worst.tokens} tokens: {worst.error:.2e} where {worst.bound:.2e} is allowed"
        )


def _table(found: list[Comparison]) -> Table:
    table = Table("tokens", "block", "what", "error", "bound", "", box=None, header_style="dim")
    for c in found:
        mark = "[green]ok" if c.ok else "[red]too far"
        table.add_row(str(c.tokens), c.place, c.what, f"{c.error:.1e}", f"{c.bound:.1e}", mark)
    return table
