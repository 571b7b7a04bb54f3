"""`sparsec view`."""

from __future__ import annotations

from pathlib import Path

from sparsec.diagnostics import SparsecError
from sparsec.inspect.html.page import write_index


def run(folder: Path) -> None:
    """Write the page of a run, the newest one of a folder of runs, and print its path. Raises: SparsecError."""
    if not (folder / "manifest.json").is_file() and folder.is_dir():
        runs = [path for path in folder.iterdir() if (path / "remarks.jsonl").is_file()]
        if not runs:
            raise SparsecError(f"{folder} holds no run of a dump: make one with `sparsec compile --dump {folder}`")
        folder = max(runs, key=lambda path: path.stat().st_mtime)
    print(write_index(folder))
