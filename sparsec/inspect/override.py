"""Edit what a dump holds, and have the compiler use it: `SPARSEC_OVERRIDE_DIR=DIR/mixtral-0001`.

A text `NN-pass.sparsec` takes the place of the module after that pass, `00-capture.sparsec` that of the module as it
comes in, and `kernels/NAME.py` or `.cpp` that of the source which is compiled. Where the folder has the manifest of a
dump, only files that differ from what was dumped count, so that passes behind an edit run on the edit; of a folder
without one, every file does.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsec.diagnostics import CompileError, Diagnostic, SparsecError
from sparsec.inspect.dump import SOURCES, text_of
from sparsec.ir.core import Module
from sparsec.ir.equal import equal
from sparsec.ir.types import Type
from sparsec.ir.verify import problems, verify_module
from sparsec.passes.base import Pass
from sparsec.pipeline import Instrument, PassRecord, Result

_log = logging.getLogger("sparsec")


class Override(Instrument):
    """Puts edited texts and kernels in the place of the compiler's own.

    Args:
        folder: a run of a dump, or a folder laid out like one.

    Raises: SparsecError if it holds neither texts nor kernels.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = _listed(folder)
        self.edited = frozenset(path for path in _files(folder) if _digest(path) != listed.get(_name(folder, path)))
        self.number = 0
        self._left = {path for path in self.edited if path.suffix == ".sparsec"}

    def start(self, module: Module, passes: Sequence[tuple[str, Pass]]) -> None:
        if self.number == 0:
            self._take(f"00-{module.attrs.get('phase', 'capture')}.sparsec", module, "the module given")

    def override(self, record: PassRecord, module: Module) -> str:
        self.number += 1
        return self._take(f"{self.number:02}-{record.name.split('{')[0]}.sparsec", module, f"pass '{record.name}'")

    def finish(self, result: Result) -> None:
        if "lower" in result.phases:
            for path in sorted(self._left):
                _log.warning("%s is not used: no pass of this name has this number", path)

    def source(self, name: str, generated: str) -> str:
        """The source to compile for a kernel's file, `kernels/layer_0.cpp` (`sparsec.codegen.emit.Edit`)."""
        path = self.folder / name
        if path not in self.edited or (text := path.read_text(encoding="utf-8")) == generated:
            return generated
        _log.warning("%s is compiled in place of what was generated", path)
        return text

    def _take(self, name: str, module: Module, maker: str) -> str:
        """Put the text `name` into the module, where it is edited; says what was done. Raises: CompileError."""
        path = self.folder / name
        if path not in self.edited:
            return ""
        self._left.discard(path)
        from sparsec.ir.parser import parse_module  # nobody who edits nothing needs the grammar

        taken = parse_module(path.read_text(encoding="utf-8"), str(path))
        if equal(taken, module):
            return ""
        if (given := _interface(taken)) != (wanted := _interface(module)):
            raise CompileError(
                f"{path} is of another model: its inputs and results are {_list(given)}, here they are {_list(wanted)}",
                hint="edit the dump of this model, made with the same example inputs",
            )
        _verify(taken, path)
        module.funcs, module.attrs = taken.funcs, taken.attrs
        said = f"the override {path}"
        _log.warning("%s takes the place of what %s made", path, maker)
        return said


def _files(folder: Path) -> list[Path]:
    """The texts and sources of a folder. Raises: SparsecError."""
    found = [*folder.glob("[0-9][0-9]-*.sparsec"), *(folder / "kernels").glob("*")] if folder.is_dir() else []
    files = [path for path in found if path.suffix in (".sparsec", *SOURCES) and path.is_file()]
    if not files:
        raise SparsecError(
            f"{folder} holds nothing to override with: it is no run of a dump\n  hint: SPARSEC_OVERRIDE_DIR names one "
            "run (DIR/NAME-0001) of what `--dump DIR` wrote"
        )
    return files


def _listed(folder: Path) -> dict[str, str]:
    """File -> hash, as the manifest says, if there is one. Raises: SparsecError."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return {}
    try:
        data: Any = json.loads(manifest.read_text(encoding="utf-8"))
        texts = {entry["file"]: entry["sha256"] for entry in data["passes"] if "file" in entry}
        return {**texts, **data.get("kernels", {})}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SparsecError(f"{manifest} is no manifest of a dump: {error}") from error


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _interface(module: Module) -> tuple[tuple[Type, ...], tuple[Type, ...]]:
    """Types of the inputs and results of `main`. Raises: CompileError if there is none."""
    if "main" not in module.funcs:
        raise CompileError("the module has no function @main")
    main = module.main
    kinds = ((arg, main.arg_attrs.get(arg, {}).get("kind", "input")) for arg in main.body.args)
    return tuple(arg.type for arg, kind in kinds if kind == "input"), main.result_types


def _list(types: tuple[tuple[Type, ...], tuple[Type, ...]]) -> str:
    ins, outs = (", ".join(map(str, side)) for side in types)
    return f"({ins}) -> ({outs})"


def _verify(module: Module, path: Path) -> None:
    """Check an edited text; each problem names the line of the file. Raises: CompileError."""
    try:
        verify_module(module)
    except CompileError as error:
        # The text as it would be printed has its ops on the lines of the file, unless lines were put in or taken out.
        places = text_of(module).places
        lines = [places.get(problem.op) if problem.op else None for problem in problems(module)]
        raise CompileError(
            Diagnostic(found.message, found.loc, excerpt=found.excerpt, notes=(*found.notes, _at(path, line)))
            for found, line in zip(error.diagnostics, lines, strict=True)
        ) from error


def _at(path: Path, line: int | None) -> str:
    return f"in the override {path}" + (f":{line}" if line else "")
