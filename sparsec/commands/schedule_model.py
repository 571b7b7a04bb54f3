"""`sparsec schedule`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from sparsec import pipeline
from sparsec.commands.read_module import module_of
from sparsec.config import Config
from sparsec.console import wide, working
from sparsec.diagnostics import SparsecError
from sparsec.inspect.choices import explain, render
from sparsec.targets import Target


def run(model: str, target: str | None, tokens: Sequence[int], every: bool, weights: str | None, as_json: bool) -> None:
    """Explain the schedule of a model, a text or an artifact. Raises: SparsecError."""
    if every and not tokens:
        raise SparsecError("--all compares at given numbers of tokens\n  hint: add --tokens N")
    with working(as_json) as status:
        status.say(f"read {model}")
        module = module_of(model, weights=weights)
        target = Config.read(target=target or str(module.attrs.get("target", "")) or None).target
        Target.parse(target)
        if target == "cpu":
            raise SparsecError("kernels for CPUs choose by themselves\n  hint: name a GPU: --target cuda:sm_90")
        done = str(module.attrs.get("phase", "capture"))
        if pipeline.PHASES.index(done) < pipeline.PHASES.index("schedule"):
            status.say("compile")
            module = pipeline.run(module, target=target, to="schedule").module
        found = explain(module, target, tokens, every) if tokens else explain(module, target)
    if not found:
        raise SparsecError(f"{model} has no GEMM of experts to schedule\n  hint: see what it has with `sparsec info`")
    if as_json:
        print(json.dumps([asdict(one) for one in found]))
    else:
        wide(render(found, bool(tokens)))
