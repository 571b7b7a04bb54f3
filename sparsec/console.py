"""What the command line shows: progress while it works, tables of what was done, errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from sparsec.diagnostics import Diagnostic, Remark
from sparsec.ir.core import Module
from sparsec.passes.base import Pass
from sparsec.pipeline import Instrument, PassRecord

if TYPE_CHECKING:
    from sparsec.inspect.quantised import Summary

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


WIDTH = 160
"""Columns of a table that goes into a file or a pipe, which have no width of their own."""


def wide(table: RenderableType) -> None:
    """Print a table of many columns; where there is no terminal and none is asked for, as wide as WIDTH."""
    bounded = out.is_terminal or "COLUMNS" in os.environ
    (out if bounded else Console(highlight=False, width=WIDTH)).print(table)


class Watch(Instrument):
    """Shows the pass that runs."""

    def __init__(self, status: Status) -> None:
        self.status = status

    def before(self, phase: str, pass_: Pass, module: Module) -> None:
        self.status.say(f"{phase}: {pass_}")


class Status:
    """One line that says what is going on: a spinner on a terminal, plain lines for long steps elsewhere."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None) if progress is not None else None

    def say(self, what: str) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=what)

    def step(self, what: str) -> None:
        """A step that takes seconds: also told where there is no terminal."""
        self.say(what)
        if self._progress is None:
            err.print(what)


@contextmanager
def working(quiet: bool = False) -> Iterator[Status]:
    """A status line for as long as the work lasts."""
    if not err.is_terminal or quiet:
        yield _Silent(None) if quiet else Status(None)
        return
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=err, transient=True
    ) as bar:
        yield Status(bar)


class _Silent(Status):
    def step(self, what: str) -> None:
        """Nothing: the output is for a program."""


@contextmanager
def bytes_bar(what: str, quiet: bool = False) -> Iterator[Any]:
    """A progress bar over bytes; yields a function of (done, total)."""
    if not err.is_terminal or quiet:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def passes_table(records: Sequence[PassRecord]) -> Table:
    """What each pass did to the number of ops, and how long it took."""
    table = Table("phase", "pass", "ops before", "after", "ms", "did", box=None, header_style="dim")
    for record in records:
        did = sum(record.counts.values())
        row = (record.phase, record.name, str(record.ops_before), str(record.ops_after), f"{record.ms:.1f}")
        table.add_row(*row, f"{did} changes" if did else "", style="" if did else "dim")
    return table


def errors_table(rows: Sequence[Summary]) -> Table:
    """How far quantised experts are from the model's, for layers that are alike."""
    table = Table("weights", "layers", "experts", "hidden", "width", "error: least", "median", "most", box=None)
    table.header_style = "dim"
    for row in rows:
        kind = row.packing if row.activations == "model" else f"{row.packing} x {row.activations}"
        sizes = (kind, *map(str, (row.layers, row.experts, row.hidden, row.width)))
        table.add_row(*sizes, *(f"{100 * error:.2f} %" for error in (row.least, row.median, row.most)))
    return table


def print_remarks(remarks: Sequence[Remark]) -> None:
    """The remarks on what was declined, with what to try."""
    for remark in remarks:
        if remark.kind == "missed":
            tail = f"; {remark.suggestion}" if remark.suggestion else ""
            text = f"{remark.loc}: not done by {remark.pass_name}: {remark.message}{tail}"
            err.print(text, markup=False, soft_wrap=True)


def print_warnings(warnings: Sequence[Diagnostic]) -> None:
    for warning in warnings:
        err.print(str(warning), markup=False, soft_wrap=True)


def fail(message: str) -> None:
    """Print an error, with `error:` in front unless it names its own place."""
    text = message if "error: " in message.split("\n", 1)[0] else f"error: {message}"
    print(text, file=sys.stderr)
