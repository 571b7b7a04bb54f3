"""Modules as people name them on the command line: a model, a text, an artifact, a run of a dump."""

from __future__ import annotations

import json
from pathlib import Path

from sparsec import api, pipeline
from sparsec.commands.options import TEXTS
from sparsec.config import Config
from sparsec.diagnostics import SparsecError
from sparsec.frontend.capture import capture
from sparsec.frontend.models import load_model
from sparsec.inspect.info import load_module
from sparsec.ir.core import Module
from sparsec.ir.parser import parse_module


def module_of(name: str, phase: str | None = None, *, weights: str | None = None) -> Module:
    """What a text, an artifact or a dump holds, or what capture makes of a model, which needs no weights.

    Args:
        phase: of a dump, the module after this phase; else after the last one.
        weights: how a model's experts are to be stored, as of `Config`.

    Raises: SparsecError, also where a dump holds no such phase.
    """
    if is_dump(Path(name)):
        return read_module(name, phase)
    if name.endswith(TEXTS) or Path(name, "manifest.json").is_file():
        return read_module(name)
    loaded = load_model(name, meta=not name.endswith(".pt2"))
    captured = api.with_structure(capture(loaded.model, loaded.args, loaded.kwargs))
    return api.stored_as(Config.read(weights=weights), captured.module)


def read_module(name: str, phase: str | None = None) -> Module:
    """The module of a text (.sparsec, .mlir), of an artifact, or of one run in a dump folder.

    Args:
        phase: of a dump, the module after this phase; else after the last one.

    Raises: SparsecError for what is none of these, and for a phase that a dump lacks or a text is not at.
    """
    path = Path(name)
    if is_dump(path):
        file = _dumped(path, phase)
        return parse_module(file.read_text(), str(file))
    if path.is_dir() and (path / "manifest.json").is_file():
        module = load_module(path)
    elif path.is_file():
        module = parse_module(path.read_text(), name)
    else:
        raise SparsecError(f"{name} is no text of a module, no artifact and no run of a dump")
    if phase is not None and (at := module.attrs.get("phase", "capture")) != phase:
        raise SparsecError(f"{name} is at phase '{at}', not '{phase}': only a dump holds every phase")
    return module


def is_dump(path: Path) -> bool:
    """Whether a folder is a run of a dump."""
    return (path / "remarks.jsonl").is_file()


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
