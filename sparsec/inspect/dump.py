"""The dump folder: the IR after every pass that changed it, diffs, and a manifest.

    DIR/mixtral-0001/  manifest.json  remarks.jsonl
      00-capture.sparsec  04-raise-route.sparsec  04-raise-route.diff ...
      crash.sparsec (only after a failure)

A file is written whole or not at all, and a run never writes into the folder of another.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsec.diagnostics import Remark
from sparsec.ir.core import Module
from sparsec.ir.printer import print_module
from sparsec.passes.base import Pass
from sparsec.pipeline import Instrument, PassRecord, Result

MAX_RUNS = 9999


def write_atomic(path: Path, text: str | bytes) -> None:
    """Write a file whole: into a neighbour first, then moved into place. Raises: OSError that names `path`."""
    data = text.encode() if isinstance(text, str) else text
    try:
        _write_atomic(path, data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write_atomic(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def new_run(parent: Path, name: str) -> Path:
    """Make and return `parent/NAME-0001`, or the next number that is free."""
    parent.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
    taken = [
        int(found[1]) for path in parent.iterdir() if (found := re.fullmatch(rf"{re.escape(stem)}-(\d+)", path.name))
    ]
    for number in range(max(taken, default=0) + 1, MAX_RUNS + 1):
        try:
            (run := parent / f"{stem}-{number:04}").mkdir()
        except FileExistsError:
            continue
        return run
    raise FileExistsError(f"{parent} is full of runs named {stem}: remove some")


class Dump(Instrument):
    """Writes one run of the pass manager into a new folder, `self.folder`.

    Args:
        parent: where the run's folder is made.
        name: what the folder is called, before its number.
    """

    def __init__(self, parent: Path | str, name: str = "module") -> None:
        self.folder = new_run(Path(parent), name)
        self.entries: list[dict[str, Any]] = []
        self.remarks: list[Remark] = []
        self._text = ""

    def start(self, module: Module, passes: Sequence[tuple[str, Pass]]) -> None:
        self._text = print_module(module)
        phase = str(module.attrs.get("phase", "capture"))
        write_atomic(self.folder / f"00-{phase}.sparsec", self._text)
        self.entries.append({"number": 0, "phase": phase, "file": f"00-{phase}.sparsec", "sha256": _sha(self._text)})
        self._manifest("running")

    def after(self, record: PassRecord, module: Module) -> None:
        text = print_module(module)
        stem = f"{len(self.entries):02}-{record.name.split('{')[0]}"
        entry: dict[str, Any] = {
            "number": len(self.entries),
            "phase": record.phase,
            "pass": record.name,
            "ms": round(record.ms, 3),
            "ops_before": record.ops_before,
            "ops_after": record.ops_after,
            "changed": text != self._text,
            "rules": record.counts,
            "remarks": len(record.remarks),
            "sha256": _sha(text),
        }
        if text != self._text:
            entry |= {"file": f"{stem}.sparsec", "diff": f"{stem}.diff"}
            previous = next(e["file"] for e in reversed(self.entries) if "file" in e)
            write_atomic(self.folder / entry["file"], text)
            write_atomic(self.folder / entry["diff"], diff(self._text, text, previous, entry["file"]))
        self.entries.append(entry)
        self.remarks += record.remarks
        self._text = text
        self._manifest("running")

    def fail(self, reproducer: str) -> Path | None:
        path = self.folder / "crash.sparsec"
        write_atomic(path, reproducer)
        self._manifest("failed")
        return path

    def finish(self, result: Result) -> None:
        self._manifest("done")

    def _manifest(self, state: str) -> None:
        lines = [json.dumps(_remark_json(remark)) for remark in self.remarks]
        write_atomic(self.folder / "remarks.jsonl", "".join(line + "\n" for line in lines))
        manifest = {"version": 1, "state": state, "passes": self.entries}
        write_atomic(self.folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def diff(before: str, after: str, before_name: str = "before", after_name: str = "after") -> str:
    """A unified diff of two texts, with three lines of context."""
    lines = difflib.unified_diff(before.splitlines(True), after.splitlines(True), before_name, after_name)
    return "".join(lines)


def _remark_json(remark: Remark) -> dict[str, Any]:
    loc = remark.loc
    place = {"file": loc.file, "line": loc.line, "scope": loc.scope, "source": loc.source}
    return {**{k: v for k, v in asdict(remark).items() if k != "loc"}, "loc": place}


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
