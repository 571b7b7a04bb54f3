"""`sparsec view`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparsec.diagnostics import SparsecError
from sparsec.inspect.html.page import write_index
from sparsec.inspect.html.plan_page import write_plan_page
from sparsec.passes.placement import read_loads, read_plan
from sparsec.passes.placement.plan_file import check_writable


def run(path: Path, loads: Sequence[str], old: Path | None, output: Path | None) -> None:
    """Write the page of a run, the newest of a folder of runs, or of a plan; print its path. Raises: SparsecError."""
    if path.is_file():
        print(_plan(path, loads, old, output))
        return
    if loads or old or output:
        raise SparsecError(f"{path} is no plan: --load, --old and -o are for the page of a plan")
    if not (path / "manifest.json").is_file() and path.is_dir():
        runs = [folder for folder in path.iterdir() if (folder / "remarks.jsonl").is_file()]
        if not runs:
            raise SparsecError(f"{path} holds no run of a dump: make one with `sparsec compile --dump {path}`")
        path = max(runs, key=lambda folder: folder.stat().st_mtime)
    print(write_index(path))


def _plan(path: Path, loads: Sequence[str], old: Path | None, output: Path | None) -> Path:
    plan = read_plan(path)
    if not loads:
        raise SparsecError(f"{path}: the page shows a plan under some traffic\n  hint: --load FILE, counts as for plan")
    output = output or path.with_suffix(".html")
    check_writable(output)
    read, before = read_loads(loads), read_plan(old) if old else None
    write_plan_page(output, plan, read, before)
    return output
