"""Modules as people name them on the command line: a text, a dump, an artifact."""

from __future__ import annotations

import json
from pathlib import Path

from sparsec import pipeline
from sparsec.diagnostics import SparsecError
from sparsec.ir.core import Module
from sparsec.ir.parser import parse_module


def read_module(name: str, phase: str | None = None) -> Module:
    """The module of a text (.sparsec), of an artifact, or of one run in a dump folder.

    Args:
        phase: of a dump, the module after this phase; else after the last one.

    Raises: SparsecError for what is none of these, and for a phase that a dump lacks or a text is not at.
    """
    path = Path(name)
    if path.is_dir() and (path / "remarks.jsonl").is_file():
        file = _dumped(path, phase)
        return parse_module(file.read_text(), str(file))
    file = path / "module.sparsec" if path.is_dir() else path
    if not file.is_file():
        raise SparsecError(f"{name} is no text of a module, no artifact and no run of a dump")
    module = parse_module(file.read_text(), str(file))
    if phase is not None and (at := module.attrs.get("phase", "capture")) != phase:
        raise SparsecError(f"{name} is at phase '{at}', not '{phase}': only a dump holds every phase")
    return module


def _dumped(run: Path, phase: str | None) -> Path:
    """The text of a run after a phase: that of the last pass up to its end that changed something."""
    passes = json.loads((run / "manifest.json").read_text())["passes"]
    texts = [(entry["phase"], entry["file"]) for entry in passes if "file" in entry]
    if phase is not None:
        last = pipeline.PHASES.index(phase)
        texts = [(at, file) for at, file in texts if pipeline.PHASES.index(at) <= last]
    if not texts or Path(file := texts[-1][1]).name != file:
        raise SparsecError(f"{run} holds no text of phase '{phase}' or before" if phase else f"{run} holds no text")
    return run / file
