"""`sparsec compile`."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparsec import api, pipeline
from sparsec.codegen.artifact import checked_place, write_artifact
from sparsec.commands.options import DTYPES
from sparsec.config import Config
from sparsec.console import Watch, bytes_bar, out, passes_table, print_remarks, print_warnings, working
from sparsec.diagnostics import CompileError, Remark, SparsecError
from sparsec.frontend.capture import capture
from sparsec.frontend.models import LoadedModel, describe_absence, load_model
from sparsec.inspect.dump import Dump, write_atomic
from sparsec.ir.core import Module
from sparsec.ir.interp import DerivedWeights
from sparsec.ir.parser import parse_module
from sparsec.ir.printer import print_module
from sparsec.runtime.artifact import open_artifact
from sparsec.targets import Target


def run(
    model: str,
    output: Path,
    target: str | None,
    dtype: str | None,
    random_weights: bool,
    to: str,
    start: str | None,
    weights: Path | None,
    max_length: int | None,
    no_cache: bool,
    dump: Path | None,
    as_json: bool,
) -> None:
    """Compile a model or go on from the text of a phase. Raises: SparsecError."""
    config = Config.read(target=target, dump=dump)
    target, dump = config.target, config.dump
    Target.parse(target)
    if to == "emit":
        checked_place(output)
    if (Path(model) / "manifest.json").is_file():
        raise SparsecError(f"{model} is an artifact already: run it with `sparsec run {model}`")
    if model.endswith(".sparsec"):
        _from_text(Path(model), output, target, to, start, weights, dump, as_json)
        return
    if start or weights:
        raise SparsecError("--from and --weights go with the text of a module (FILE.sparsec)")
    began = time.perf_counter()
    with working(as_json) as status:
        status.step(f"load {model}")
        torch_dtype = getattr(torch, DTYPES[dtype]) if dtype else None
        # Up to the lowered text shapes are enough.
        loaded = load_model(model, dtype=torch_dtype, random_weights=random_weights, meta=to != "emit")
        load_seconds = time.perf_counter() - began
        began = time.perf_counter()
        status.step("capture")
        if to != "emit":
            module = _captured(loaded, max_length, no_cache)
            instruments = [Watch(status), *([Dump(dump, loaded.name)] if dump else [])]
            result = pipeline.run(module, target=target, to=to, instruments=instruments, verify=config.verify)
            _write_text(output, result.module)
            print_remarks(result.remarks)
            return
        compiled = _compiled(loaded, target, max_length, no_cache, dump, Watch(status))
        if absence := describe_absence(compiled.result.ir("capture"), loaded.name):
            raise CompileError([replace(absence, severity="error")])
        status.step("emit kernels")
        remarks = compiled.remarks
    print_warnings(compiled.warnings)
    print_remarks(remarks)
    compile_seconds = time.perf_counter() - began
    tokenizer = loaded.folder / "tokenizer.json" if loaded.folder else None
    with bytes_bar("write", as_json) as progress:
        path = compiled.save(
            output, tokenizer=tokenizer if tokenizer and tokenizer.is_file() else None, progress=progress
        )
    seconds = {"load": load_seconds, "compile": compile_seconds, "write": time.perf_counter() - began - compile_seconds}
    _report(path, compiled.result, remarks, seconds, as_json)


def _is_language_model(loaded: LoadedModel, no_cache: bool) -> bool:
    """Whether the model is one of transformers that generates text."""
    return loaded.config is not None and not no_cache and hasattr(loaded.model, "generation_config")


def _compiled(
    loaded: LoadedModel, target: str, max_length: int | None, no_cache: bool, dump: Path | None, watch: Watch
) -> api.CompiledModel:
    if _is_language_model(loaded, no_cache):
        return api.compile_language_model(
            loaded.model, max_length=max_length, target=target, dump=dump, name=loaded.name, instruments=[watch]
        )
    captured = capture(loaded.model, loaded.args, loaded.kwargs)
    return api.compile_captured(captured, target, dump=dump, name=loaded.name, instruments=[watch])


def _captured(loaded: LoadedModel, max_length: int | None, no_cache: bool) -> Module:
    if _is_language_model(loaded, no_cache):
        return api.capture_language_model(loaded.model, max_length).module
    return api.with_structure(capture(loaded.model, loaded.args, loaded.kwargs)).module


def _from_text(
    source: Path,
    output: Path,
    target: str,
    to: str,
    start: str | None,
    weights: Path | None,
    dump: Path | None,
    as_json: bool,
) -> None:
    began = time.perf_counter()
    module = parse_module(source.read_text(), str(source))
    if to == "emit" and weights is None:
        raise SparsecError(
            "a text holds no weights: name an artifact of the same model with --weights, or stop earlier with --to"
        )
    with working(as_json) as status:
        instruments = [Watch(status), *([Dump(dump, source.stem)] if dump else [])]
        last = "lower" if to == "emit" else to
        result = pipeline.run(module, target=target, start=start, to=last, instruments=instruments)
    print_remarks(result.remarks)
    if weights is None:
        _write_text(output, result.module)
        return
    emitted = api.emit_module(result.module, target)
    compile_seconds = time.perf_counter() - began
    held = open_artifact(weights)
    with bytes_bar("write", as_json) as progress:
        path = write_artifact(
            output,
            emitted,
            DerivedWeights(result.module, held.weights),
            target=target,
            text=print_module(result.module),
            generation=api.plain(result.module.attrs.get("generation")),
            progress=progress,
        )
    remarks = (*result.remarks, *emitted.remarks)
    seconds = {"compile": compile_seconds, "write": time.perf_counter() - began - compile_seconds}
    _report(path, result, remarks, seconds, as_json)


def _write_text(output: Path, module: Module) -> None:
    """Write the text of a module; `-` is standard output."""
    if str(output) == "-":
        sys.stdout.write(print_module(module))
    else:
        write_atomic(output, print_module(module))


def _report(
    path: Path, result: pipeline.Result, remarks: tuple[Remark, ...], seconds: dict[str, float], as_json: bool
) -> None:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if as_json:
        summary: dict[str, Any] = {
            "artifact": str(path),
            "bytes": size,
            "seconds": seconds,
            "passes": [{"phase": r.phase, "pass": r.name, "ms": r.ms} for r in result.records],
            "remarks": [{"kind": r.kind, "at": str(r.loc), "message": r.message} for r in remarks],
        }
        print(json.dumps(summary))
        return
    out.print(passes_table([record for record in result.records if record.changed]))
    took = ", ".join(f"{what} {time:.1f} s" for what, time in seconds.items())
    out.print(f"[green]{path}[/]  {size / 1e6:,.1f} MB ({took})", soft_wrap=True)
