"""`sparsec opt`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from sparsec import pipeline
from sparsec.console import err, out, print_remarks
from sparsec.inspect.cost_text import text_of
from sparsec.inspect.dump import write_atomic
from sparsec.ir.core import Module
from sparsec.ir.mlir import print_generic
from sparsec.ir.parser import parse_module
from sparsec.passes.base import PASSES, options
from sparsec.targets import Target


def run(
    source: Path | None,
    passes: str | None,
    target: str | None,
    output: Path,
    generic: bool,
    cost: str | None,
    sizes: Sequence[str],
    list_passes: bool,
    reduce: bool,
    seconds: float,
) -> None:
    """Run passes over a text. Raises: CompileError, click.UsageError."""
    if list_passes:
        for name, cls in sorted(PASSES.items()):
            out.print(f"[bold]{name}[/]  {(cls.__doc__ or '').splitlines()[0]}")
            for option in options(cls):
                out.print(f"    {option.name} ({option.type}, default {option.default}): {option.doc}", markup=False)
        return
    if source is None:
        raise click.UsageError("name the text of a module, or - for standard input")
    text = sys.stdin.read() if str(source) == "-" else source.read_text()
    module = parse_module(text, "<stdin>" if str(source) == "-" else str(source))
    header = pipeline.reproducer_header(text)
    if passes is None:
        if header is None and cost is None:
            raise click.UsageError("name the passes with --passes: the text is no crash reproducer that says its own")
        passes = header[0] if header else ""
    planned_for = target or (header[1] if header else str(module.attrs.get("target", "cpu")))
    Target.parse(planned_for)
    if reduce:
        _reduce(module, passes, planned_for, seconds, output)
        return
    result = pipeline.run_passes(module, passes, target=planned_for)
    print_remarks(result.remarks)
    if generic and cost:
        raise click.UsageError("--generic has no place for costs")
    written = print_generic(result.module) if generic else text_of(result.module, cost, sizes)
    _write(output, written)


def _reduce(module: Module, passes: str, target: str, seconds: float, output: Path) -> None:
    """Write the least of a module that fails as it does. Raises: SparsecError if it does not fail."""
    from sparsec.inspect.reduce import reduce

    left = reduce(module, passes, target, seconds)
    _write(output, left.text)
    err.print(f"{left.ops} of {left.ops_before} ops are left after {left.tries} tries, and fail with:", markup=False)
    err.print(f"  {left.message}", markup=False)


def _write(output: Path, text: str) -> None:
    if str(output) == "-":
        sys.stdout.write(text)
    else:
        write_atomic(output, text)
