"""`sparsec compile`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from sparsec import api, pipeline
from sparsec.codegen.artifact import checked_place, write_artifact
from sparsec.codegen.emit import Edit, as_generated
from sparsec.commands.options import DTYPES, TEXTS
from sparsec.config import WEIGHTS, Config
from sparsec.console import Watch, bytes_bar, errors_table, out, passes_table, print_remarks, print_warnings, working
from sparsec.devices import ALONE, Devices
from sparsec.diagnostics import CompileError, Remark, SparsecError
from sparsec.frontend.capture import capture
from sparsec.frontend.models import LoadedModel, describe_absence, load_model
from sparsec.inspect.cost_text import text_of
from sparsec.inspect.dump import Dump, write_atomic
from sparsec.inspect.override import Override
from sparsec.inspect.quantised import LayerError, layer_errors, summarise
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
    weights: Sequence[str],
    activations: str | None,
    devices: str | None,
    plan: Path | None,
    dispatch: str | None,
    policy: str | None,
    chunks: int | None,
    payload: str | None,
    max_length: int | None,
    no_cache: bool,
    dump: Path | None,
    cost: str | None,
    sizes: Sequence[str],
    as_json: bool,
) -> None:
    """Compile a model or go on from the text of a phase. Raises: SparsecError."""
    stored, held = _read_weights(weights)
    given: dict[str, Any] = {"devices": devices, "plan": plan, "dispatch": dispatch, "policy": policy}
    given |= {"chunks": chunks, "payload": payload}
    config = Config.read(target=target, weights=stored, activations=activations, dump=dump, **given)
    placed, target = Devices.of(config), config.target
    Target.parse(target)
    if to == "emit":
        if cost:
            raise SparsecError("--cost goes with a text: stop at a phase with --to")
        checked_place(output)
    if (Path(model) / "manifest.json").is_file():
        raise SparsecError(f"{model} is an artifact already: run it with `sparsec run {model}`")
    if model.endswith(TEXTS):
        text = partial(text_of, cost=cost, given=sizes)
        _from_text(Path(model), output, target, to, start, (stored, activations), held, config, text, as_json)
        return
    if start or held:
        raise SparsecError("--from and --weights ARTIFACT go with the text of a module (FILE.sparsec)")
    began = time.perf_counter()
    with working(as_json) as status:
        status.step(f"load {model}")
        torch_dtype = getattr(torch, DTYPES[dtype]) if dtype else None
        # Up to the lowered text shapes are enough.
        loaded = load_model(model, dtype=torch_dtype, random_weights=random_weights, meta=to != "emit")
        load_seconds = time.perf_counter() - began
        if stored is None and "SPARSEC_WEIGHTS" not in os.environ and target != "cpu":
            config = replace(config, weights=loaded.stored)
        began = time.perf_counter()
        status.step("capture")
        if to != "emit":
            module = api.stored_as(config, _captured(loaded, max_length, no_cache))
            placed.mark(module, config)
            instruments, _, _ = _watching(config, Watch(status), loaded.name, kernels=False)
            result = pipeline.run(module, target=target, to=to, instruments=instruments, verify=config.verify)
            _write_text(output, text_of(result.module, cost, sizes))
            print_remarks(result.remarks)
            return
        compiled = _compiled(loaded, config, max_length, no_cache, Watch(status))
        if absence := describe_absence(compiled.result.ir("capture"), loaded.name):
            raise CompileError([replace(absence, severity="error")])
        status.step("emit kernels")
        remarks = compiled.remarks
        if config.weights != "model":
            status.step("measure the error of quantised experts")
        errors = compiled.weight_errors()
    print_warnings(compiled.warnings)
    print_remarks(remarks)
    compile_seconds = time.perf_counter() - began
    tokenizer = loaded.folder / "tokenizer.json" if loaded.folder else None
    with bytes_bar("write", as_json) as progress:
        path = compiled.save(
            output, tokenizer=tokenizer if tokenizer and tokenizer.is_file() else None, progress=progress
        )
    seconds = {"load": load_seconds, "compile": compile_seconds, "write": time.perf_counter() - began - compile_seconds}
    _report(path, compiled.result, remarks, seconds, errors, as_json)


def _read_weights(given: Sequence[str]) -> tuple[str | None, Path | None]:
    """How weights are to be stored, and the artifact that holds them. Raises: SparsecError."""
    formats = [value for value in given if value in WEIGHTS]
    places = [value for value in given if value not in WEIGHTS]
    if len(formats) > 1 or len(places) > 1:
        raise SparsecError(f"--weights is given {' and '.join(formats if len(formats) > 1 else places)}: choose one")
    return formats[0] if formats else None, Path(places[0]) if places else None


def _is_language_model(loaded: LoadedModel, no_cache: bool) -> bool:
    """Whether the model is one of transformers that generates text."""
    return loaded.config is not None and not no_cache and hasattr(loaded.model, "generation_config")


def _compiled(
    loaded: LoadedModel, config: Config, max_length: int | None, no_cache: bool, watch: Watch
) -> api.CompiledModel:
    given: dict[str, Any] = {"target": config.target, "weights": config.weights, "activations": config.activations}
    given |= {name: getattr(config, name) for name in ("devices", "plan", "dispatch", "policy", "chunks", "payload")}
    given |= {"dump": config.dump, "name": loaded.name, "instruments": [watch]}
    if _is_language_model(loaded, no_cache):
        return api.compile_language_model(loaded.model, max_length=max_length, **given)
    return api.compile_captured(capture(loaded.model, loaded.args, loaded.kwargs), **given)


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
    stored: tuple[str | None, str | None],
    weights: Path | None,
    config: Config,
    text: Callable[[Module], str],
    as_json: bool,
) -> None:
    began = time.perf_counter()
    module = parse_module(source.read_text(), str(source))
    phase = start or str(module.attrs.get("phase", "capture"))
    says = tuple(str(module.attrs.get(name, "model")) for name in ("weights", "activations"))
    wanted = tuple(given or said for given, said in zip(stored, says, strict=True))
    if wanted != says:
        if phase in ("schedule", "lower"):
            raise SparsecError(f"{source} is at phase '{phase}', where weights are packed already: go on from 'fuse'")
        api.stored_as(Config(weights=wanted[0], activations=wanted[1]), module)
    placed = Devices.of(config)
    if placed != ALONE:
        if phase not in ("capture", "raise"):
            raise SparsecError(f"{source} is at phase '{phase}', where experts are placed already: go on from 'raise'")
        placed.mark(module, config)
    if to == "emit" and weights is None:
        raise SparsecError(
            "a text holds no weights: name an artifact of the same model with --weights, or stop earlier with --to"
        )
    with working(as_json) as status:
        last = "lower" if to == "emit" else to
        instruments, dumped, edit = _watching(config, Watch(status), source.stem, kernels=to == "emit")
        result = pipeline.run(module, target=target, start=start, to=last, instruments=instruments)
    print_remarks(result.remarks)
    if weights is None:
        _write_text(output, text(result.module))
        return
    emitted = api.emit_module(result.module, target, edit)
    if dumped:
        dumped.emitted(emitted)
    compile_seconds = time.perf_counter() - began
    held, tables = open_artifact(weights), placed.tables(result.module)

    def of_rank(rank: int) -> DerivedWeights:
        return DerivedWeights(
            result.module, ChainMap(tables, cast("dict[str, torch.Tensor]", held.weights_of(rank))), rank
        )

    with bytes_bar("write", as_json) as progress:
        path = write_artifact(
            output,
            emitted,
            of_rank(0),
            target=target,
            text=print_module(result.module),
            stored=str(module.attrs.get("weights", "model")),
            generation=api.plain(result.module.attrs.get("generation")),
            of_rank=of_rank,
            placement=placed.raw
            or (held.read("placement.json") if "placement.json" in held.manifest["files"] else b""),
            progress=progress,
        )
    remarks = (*result.remarks, *emitted.remarks)
    seconds = {"compile": compile_seconds, "write": time.perf_counter() - began - compile_seconds}
    errors = layer_errors(result.ir("schedule"), held.weights) if any(stored) and "schedule" in result.phases else []
    _report(path, result, remarks, seconds, errors, as_json)


def _watching(
    config: Config, watch: Watch, name: str, kernels: bool
) -> tuple[list[pipeline.Instrument], Dump | None, Edit]:
    """Who watches the passes; the dump among them; what puts edited kernels in."""
    override = Override(config.override_dir) if config.override_dir else None
    dumped = Dump(config.dump, name, kernels) if config.dump else None
    found: list[pipeline.Instrument] = [watch, *(instrument for instrument in (override, dumped) if instrument)]
    return found, dumped, override.source if override else as_generated


def _write_text(output: Path, text: str) -> None:
    """Write a text; `-` is standard output."""
    if str(output) == "-":
        sys.stdout.write(text)
    else:
        write_atomic(output, text)


def _report(
    path: Path,
    result: pipeline.Result,
    remarks: tuple[Remark, ...],
    seconds: dict[str, float],
    errors: Sequence[LayerError],
    as_json: bool,
) -> None:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if as_json:
        summary: dict[str, Any] = {
            "artifact": str(path),
            "bytes": size,
            "seconds": seconds,
            "passes": [{"phase": r.phase, "pass": r.name, "ms": r.ms} for r in result.records],
            "remarks": [{"kind": r.kind, "at": str(r.loc), "message": r.message} for r in remarks],
            "weight_errors": [asdict(layer) for layer in errors],
        }
        print(json.dumps(summary))
        return
    out.print(passes_table([record for record in result.records if record.changed]))
    if errors:
        out.print(errors_table(summarise(errors)))
    took = ", ".join(f"{what} {time:.1f} s" for what, time in seconds.items())
    out.print(f"[green]{path}[/]  {size / 1e6:,.1f} MB ({took})", soft_wrap=True)
