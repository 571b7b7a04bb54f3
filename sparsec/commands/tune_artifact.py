"""`sparsec tune`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from sparsec.console import wide, working
from sparsec.inspect.tune import tune


def run(artifact: Path, seconds: float, as_json: bool) -> None:
    """Tune an artifact and say what changed. Raises: SparsecError, ArtifactError."""
    with working(as_json) as status:
        status.step(f"time kernels for at most {seconds:g} s")
        changes = tune(artifact, seconds)
    if as_json:
        print(json.dumps([asdict(change) for change in changes]))
        return
    table = Table("kernel", "up to", "was", "us", "is", "us", "predicted us", box=None, header_style="dim")
    for change in changes:
        ends = "any" if change.up_to is None else f"{change.up_to} tokens"
        times = ["not measured" if us is None else f"{us:.1f}" for us in (change.before_us, change.after_us)]
        kept = change.before == change.after
        is_now = "the same" if kept else change.after
        table.add_row(change.kernel, ends, change.before, times[0], is_now, times[1], f"{change.predicted_us:.1f}")
    wide(table)
