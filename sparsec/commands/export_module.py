"""`sparsec export`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from sparsec import pipeline
from sparsec.commands.read_module import module_of
from sparsec.console import err, out, working
from sparsec.diagnostics import SparsecError
from sparsec.inspect.dump import write_atomic
from sparsec.inspect.layers import cut_layer, expert_layers, find_layer, sizes_for, with_sizes
from sparsec.inspect.linalg import to_linalg
from sparsec.inspect.mlir_engine import Agreement, compare
from sparsec.ir.core import Module
from sparsec.ir.irdl import print_irdl
from sparsec.ir.mlir import print_generic
from sparsec.ir.verify import verify_module

TOLERANCE = 1e-5
"""Relative error that `--check` allows in f32; of narrower floats what a rounding of their last place is, twice."""


def run(
    model: str,
    to: str,
    output: Path,
    phase: str | None,
    target: str | None,
    layer: str | None,
    tokens: int | None,
    check: bool,
    as_json: bool,
) -> None:
    """Write a module as MLIR, or one of its layers as linalg. Raises: SparsecError, click.UsageError."""
    if to != "linalg" and (layer or tokens or check):
        raise click.UsageError("--layer, --tokens and --check go with --to linalg")
    if check and str(output) == "-" and not as_json:
        raise click.UsageError("--check prints what it found: name a file with -o")
    with working(as_json) as status:
        status.say(f"read {model}")
        module = _module(model, phase or ("raise" if to == "linalg" else None), target or "cpu")
        found = list[Agreement]()
        if to == "mlir":
            _write(output, print_generic(module))
            if str(output) != "-":
                _write(irdl_path(output), print_irdl(module))
        elif to == "irdl":
            _write(output, print_irdl(module))
        else:
            status.say("lower to linalg")
            module = static_layer(module, layer, tokens or 16)
            text = to_linalg(module)
            _write(output, text)
            if check:
                status.say("run on MLIR's ExecutionEngine")
                found = compare(module, text)
    if as_json:
        print(json.dumps({"output": str(output), "to": to, "results": [asdict(one) for one in found]}))
    elif str(output) != "-":
        beside = f" and {irdl_path(output)}" if to == "mlir" else ""
        out.print(f"[green]{output}[/]{beside}", soft_wrap=True)
        for one in found:
            what = f"{one.differing} of {one.values} values differ from the reference's"
            out.print(f"  %{one.name}: {what}, by {one.error:.1e} of the largest at most", markup=False, soft_wrap=True)
    if check:
        _judge(module, found)


def static_layer(module: Module, layer: str | None, tokens: int) -> Module:
    """One expert layer as a module of known sizes. Raises: SparsecError."""
    names = expert_layers(module)
    experts = find_layer(module, layer)
    if layer is None and len(names) > 1:
        err.print(f"the first of {len(names)} layers; name another with --layer", markup=False)
    cut = cut_layer(module, experts)
    static = with_sizes(cut, sizes_for(cut, tokens))
    verify_module(static)
    return static


def irdl_path(output: Path) -> Path:
    """Where the IRDL of a module is written that is written to `output`."""
    return output.with_name(f"{output.stem}.irdl.mlir")


def _module(model: str, phase: str | None, target: str) -> Module:
    """The module that is named, at least at a phase if one is given. Raises: SparsecError."""
    module = module_of(model, phase)
    at = str(module.attrs.get("phase", "capture"))
    if phase is not None and pipeline.PHASES.index(at) < pipeline.PHASES.index(phase):
        return pipeline.run(module, target=target, to=phase).module
    return module


def _write(output: Path, text: str) -> None:
    if str(output) == "-":
        sys.stdout.write(text)
    else:
        write_atomic(output, text)


def _judge(module: Module, found: list[Agreement]) -> None:
    """Raises: SparsecError where MLIR's numbers are not the reference's."""
    for one, value in zip(found, module.main.body.terminator.operands, strict=True):
        allowed = {"bf16": 2**-7, "f16": 2**-10}.get(value.tensor.dtype.value, TOLERANCE)
        if one.error > (allowed if value.tensor.dtype.is_float else 0):
            raise SparsecError(f"%{one.name} differs from the reference by {one.error:.1e}; {allowed:.0e} is allowed")
