"""`sparsec trace`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table
from torch.utils._pytree import tree_leaves

from sparsec import pipeline
from sparsec.console import out, working
from sparsec.diagnostics import SparsecError
from sparsec.frontend.capture import capture
from sparsec.frontend.models import load_model
from sparsec.inspect.check import random_inputs
from sparsec.inspect.dump import write_atomic
from sparsec.inspect.html.page import write_index
from sparsec.inspect.trace import Trace, record


def run(
    model: str, output: Path, prompt_ids: str | None, tokens: int, new_tokens: int, random_weights: bool, as_json: bool
) -> None:
    """Trace a model's routers into a file, or into a dump's folder and its page. Raises: SparsecError."""
    prompt = _ids(prompt_ids) if prompt_ids else None
    with working(as_json) as status:
        status.step(f"load {model}")
        loaded = load_model(model, random_weights=random_weights)
        status.step("capture")
        captured = capture(loaded.model, loaded.args, loaded.kwargs)
        examples = [leaf for leaf in tree_leaves((loaded.args, loaded.kwargs)) if isinstance(leaf, torch.Tensor)]
        module = pipeline.run(captured.module, to="raise").module
        takes_ids = bool(examples) and examples[0].dtype == torch.long and examples[0].ndim == 2
        if not takes_ids and (prompt or new_tokens):
            raise SparsecError("the model's first input is no token ids [1, T]: leave out --prompt-ids and -n")
        drawn = random_inputs(module.main, examples, tokens)[0]
        given = prompt or (drawn.reshape(-1).tolist() if takes_ids else list(range(tokens)))

        def inputs(ids: Sequence[int]) -> list[torch.Tensor]:
            made = random_inputs(module.main, examples, len(ids))
            return [torch.tensor([list(ids)]), *made[1:]] if takes_ids else made

        trace = record(module, captured.weights, inputs, given, name=loaded.name, new_tokens=new_tokens, say=status.say)
    path = output / "trace.json" if output.is_dir() else output
    write_atomic(path, json.dumps(trace.json(), separators=(",", ":")) + "\n")
    if as_json:
        print(json.dumps({"trace": str(path), "layers": len(trace.layers), "steps": len(trace.steps)}))
        return
    out.print(_table(trace))
    out.print(f"[green]{path}[/]", soft_wrap=True)
    if output.is_dir() and (output / "manifest.json").is_file():
        out.print(f"[green]{write_index(output)}[/]", soft_wrap=True)


def _table(trace: Trace) -> Table:
    table = Table("layer", "experts", "k", "most", "mean", "without a token", box=None, header_style="dim")
    for i, layer in enumerate(trace.layers):
        counts = [sum(column) for column in zip(*(step.counts[i] for step in trace.steps), strict=True)]
        mean = sum(counts) / len(counts)
        sizes = (str(layer.experts), str(layer.k), str(max(counts)), f"{mean:.1f}", str(counts.count(0)))
        table.add_row(layer.path, *sizes)
    return table


def _ids(text: str) -> list[int]:
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        ids = [-1]
    if min(ids) < 0:
        raise SparsecError(f"--prompt-ids takes token ids separated by commas, not {text!r}")
    return ids
