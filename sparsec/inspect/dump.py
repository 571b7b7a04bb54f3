"""The dump folder: the IR after every pass that changed it, diffs, costs, kernels, and a manifest.

    DIR/mixtral-0001/  index.html  manifest.json  remarks.jsonl  costs.json  made.json  plan.json  bench.py
      00-capture.sparsec  04-raise-route.sparsec  04-raise-route.diff ...
      kernels/gather_gemm_0.py  kernels/....ttir .ttgir .ptx .cubin (CPU: .cpp .so .s)
      crash.sparsec (only after a failure)

`costs.json` has what the ops of the last text move and compute, `made.json` for each text the rules that made its new
ops, by line. `python bench.py --bench gather_gemm_0 --tokens 64` times a kernel from these files.
A file is written whole or not at all, and a run never writes into the folder of another.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sparsec.codegen.emit import Emitted
from sparsec.diagnostics import Remark
from sparsec.inspect.unified import diff, diff_lines
from sparsec.ir.core import Module, Op
from sparsec.ir.printer import Printer, format_attr
from sparsec.passes.base import Pass
from sparsec.pipeline import Instrument, PassRecord, Result
from sparsec.runtime import plan_json

__all__ = ["Dump", "diff", "new_run", "write_atomic"]

MAX_RUNS = 9999
SOURCES = (".py", ".cpp")
"""How names of kernels' sources end."""

_BENCH = '''"""Times this run's kernels here: python bench.py [--bench KERNEL ...] [--tokens N ...] [--json]."""

from pathlib import Path

from sparsec.inspect.bench import main

if __name__ == "__main__":
    main(Path(__file__).parent)
'''


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


@dataclass(frozen=True)
class Text:
    """A module's text, and on which line (1-based) each op stands."""

    lines: list[str]
    places: Mapping[Op, int]

    def __str__(self) -> str:
        return "\n".join(self.lines) + "\n"


def text_of(module: Module) -> Text:
    """The short form, as of `print_module`."""
    lines = [f"module {format_attr(module.attrs)}", ""] if module.attrs else []
    places = dict[Op, int]()
    for func in module.funcs.values():
        printer, above = Printer(), len(lines) + 1
        printer.func(func)
        lines += printer.lines
        lines.append("")
        places.update((op, above + first) for op, (first, _) in printer.spans.items())
    return Text(lines[:-1], places)


class Dump(Instrument):
    """Writes one run of the pass manager into a new folder, `self.folder`; several for one module go into the same.

    Args:
        parent: where the run's folder is made.
        name: what the folder is called, before its number.
        kernels: whether `emitted` follows the passes; the page is then written there.
    """

    def __init__(self, parent: Path | str, name: str = "module", kernels: bool = False) -> None:
        self.folder = new_run(Path(parent), name)
        self.to_come = kernels
        self.entries: list[dict[str, Any]] = []
        self.kernels: dict[str, str] = {}
        self._remarks: list[str] = []
        self._text = Text([], {})
        self._made: dict[str, dict[int, str]] = {}

    def start(self, module: Module, passes: Sequence[tuple[str, Pass]]) -> None:
        if not self.entries:
            self._text = text_of(module)
            phase = str(module.attrs.get("phase", "capture"))
            self._enter(f"{phase}", {"number": 0, "phase": phase}, None)
            write_atomic(self.folder / "remarks.jsonl", "")
        self._manifest("running")

    def after(self, record: PassRecord, module: Module) -> None:
        text = text_of(module) if record.changed else self._text
        changed = text.lines != self._text.lines
        entry: dict[str, Any] = {
            "number": len(self.entries),
            "phase": record.phase,
            "pass": record.name,
            "ms": round(record.ms, 3),
            "ops_before": record.ops_before,
            "ops_after": record.ops_after,
            "changed": changed,
            "rules": record.counts,
            "remarks": len(record.remarks),
        }
        previous, self._text = self._text, text
        if changed:
            self._enter(record.name.split("{")[0], entry, previous)
            made = {text.places[op]: rule for op, rule in record.made.items() if op in text.places}
            if made:
                self._made[entry["file"]] = made
        else:
            self.entries.append(entry | {"sha256": self.entries[-1]["sha256"]})
        if record.remarks:
            self._remarks += [json.dumps(_remark_json(remark)) for remark in record.remarks]
            write_atomic(self.folder / "remarks.jsonl", "\n".join(self._remarks) + "\n")
        self._manifest("running")

    def fail(self, reproducer: str) -> Path | None:
        path = self.folder / "crash.sparsec"
        write_atomic(path, reproducer)
        self.to_come = False
        self._close("failed")
        return path

    def finish(self, result: Result) -> None:
        from sparsec.inspect.html.costs_file import write_costs

        write_costs(self.folder, result.module)
        self._close("done")

    def emitted(self, emitted: Emitted) -> None:
        """Add the plan, the kernels with all that they were compiled to, and their benchmark."""
        for name, content in {**emitted.files, **emitted.texts, **_assembly(emitted.files)}.items():
            place = self.folder / name
            place.parent.mkdir(exist_ok=True)
            write_atomic(place, content)
            if name.endswith(SOURCES):
                self.kernels[name] = hashlib.sha256(content).hexdigest()
        write_atomic(self.folder / "plan.json", json.dumps(plan_json.to_json(emitted.plan), allow_nan=False) + "\n")
        write_atomic(self.folder / "bench.py", _BENCH)
        if emitted.remarks:
            self._remarks += [json.dumps(_remark_json(remark)) for remark in emitted.remarks]
            write_atomic(self.folder / "remarks.jsonl", "\n".join(self._remarks) + "\n")
        self.close()

    def close(self) -> None:
        """Nothing follows any more: no kernels either."""
        self.to_come = False
        self._close("done")

    def _file(self) -> str:
        """The newest text."""
        return str(next(entry["file"] for entry in reversed(self.entries) if "file" in entry))

    def _enter(self, name: str, entry: dict[str, Any], before: Text | None) -> None:
        """Write the text as it is now, and its diff, and list them."""
        stem, text = f"{len(self.entries):02}-{name}", str(self._text)
        entry |= {"file": f"{stem}.sparsec", "sha256": hashlib.sha256(text.encode()).hexdigest()}
        write_atomic(self.folder / entry["file"], text)
        if before is not None:
            entry["diff"] = f"{stem}.diff"
            said = diff_lines(before.lines, self._text.lines, self._file(), entry["file"])
            write_atomic(self.folder / entry["diff"], said)
        self.entries.append(entry)

    def _manifest(self, state: str) -> None:
        manifest = {"version": 1, "state": state, "passes": self.entries}
        manifest |= {"kernels": self.kernels} if self.kernels else {}
        write_atomic(self.folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")

    def _close(self, state: str) -> None:
        """What is written once there is nothing more to come, as far as is known."""
        write_atomic(self.folder / "made.json", json.dumps(self._made) + "\n")
        self._manifest(state)
        if not self.to_come:
            from sparsec.inspect.html.page import write_index

            write_index(self.folder)


def _assembly(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The assembly of native libraries, where this machine has a disassembler."""
    from sparsec.codegen.cpu.compiler import disassembled

    libraries = {name: content for name, content in files.items() if name.endswith(".so")}
    texts = {f"{name.removesuffix('.so')}.s": disassembled(content) for name, content in libraries.items()}
    return {name: text.encode() for name, text in texts.items() if text}


def _remark_json(remark: Remark) -> dict[str, Any]:
    loc = remark.loc
    said = {field.name: getattr(remark, field.name) for field in fields(remark)}
    return {**said, "loc": {"file": loc.file, "line": loc.line, "scope": loc.scope, "source": loc.source}}
