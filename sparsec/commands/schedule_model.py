"""`sparsec schedule`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sparsec import api, pipeline
from sparsec.commands.options import TEXTS
from sparsec.config import Config
from sparsec.console import out, working
from sparsec.diagnostics import SparsecError
from sparsec.frontend.capture import capture
from sparsec.frontend.models import load_model
from sparsec.inspect.choices import explain, render
from sparsec.inspect.info import load_module
from sparsec.ir.core import Module
from sparsec.ir.parser import parse_module
from sparsec.targets import Target


def run(model: str, target: str | None, tokens: Sequence[int], weights: str | None, as_json: bool) -> None:
    """Explain the schedule of a model, a text or an artifact. Raises: SparsecError."""
    with working(as_json) as status:
        status.say(f"read {model}")
        module = _module(model, weights)
        target = Config.read(target=target or str(module.attrs.get("target", "")) or None).target
        Target.parse(target)
        if target == "cpu":
            raise SparsecError("kernels for CPUs choose by themselves\n  hint: name a GPU: --target cuda:sm_90")
        done = str(module.attrs.get("phase", "capture"))
        if pipeline.PHASES.index(done) < pipeline.PHASES.index("schedule"):
            status.say("compile")
            module = pipeline.run(module, target=target, to="schedule").module
        found = explain(module, target, tokens) if tokens else explain(module, target)
    if not found:
        raise SparsecError(f"{model} has no GEMM of experts to schedule\n  hint: see what it has with `sparsec info`")
    if as_json:
        print(json.dumps([asdict(one) for one in found]))
    else:
        out.print(render(found, bool(tokens)))


def _module(model: str, weights: str | None) -> Module:
    """The module of an artifact, a text, or a model, which needs no weights. Raises: SparsecError."""
    if (Path(model) / "manifest.json").is_file():
        return load_module(Path(model))
    if model.endswith(TEXTS):
        return parse_module(Path(model).read_text(), model)
    loaded = load_model(model, meta=True)
    module = capture(loaded.model, loaded.args, loaded.kwargs).module
    return api.stored_as(Config.read(weights=weights), module)
