"""What the compiler tells people: diagnostics (errors, with the user's line) and remarks (what was or was not done)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from sparsec.ir.loc import UNKNOWN, Loc


@dataclass(frozen=True)
class Diagnostic:
    """One message.

    Args:
        message: what is wrong, in a sentence.
        loc: the user's line.
        excerpt: lines that show the place (the op, or source with a caret), already laid out.
        notes: further facts, each shown on its own line.
        hint: what to do about it.
        column: 1-based, where the place is in a text of ours; 0 otherwise.
    """

    message: str
    loc: Loc = UNKNOWN
    severity: Literal["error", "warning"] = "error"
    excerpt: str = ""
    notes: tuple[str, ...] = ()
    hint: str = ""
    column: int = 0

    def __str__(self) -> str:
        column = f":{self.column}" if self.column else ""
        place = f"{self.loc}{column}: " if self.loc else ""
        lines = [f"{place}{self.severity}: {self.message}"]
        if self.loc.source:
            lines.append(f"    {self.loc.source}")
        lines += [f"  {line}" for line in self.excerpt.splitlines()]
        lines += [f"  note: {note}" for note in self.notes]
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)


class SparsecError(Exception):
    """Base of every error that sparsec raises on purpose: its text is meant for the user, without a traceback."""


class CompileError(SparsecError):
    """A program that cannot be compiled; holds every diagnostic that was found."""

    def __init__(self, diagnostics: Iterable[Diagnostic] | str, loc: Loc = UNKNOWN, hint: str = "") -> None:
        if isinstance(diagnostics, str):
            diagnostics = [Diagnostic(diagnostics, loc, hint=hint)]
        self.diagnostics = tuple(diagnostics)
        super().__init__("\n".join(map(str, self.diagnostics)))


@dataclass(frozen=True)
class Remark:
    """What a pass did or declined to do at a place.

    Args:
        kind: `passed` (done) or `missed` (declined).
        pass_name: the pass.
        rule: the rule's name and own place, `raise_route (passes/raise_route.py:34)`.
        message: what was done, or why not.
        suggestion: what the user can try.
    """

    kind: Literal["passed", "missed"]
    pass_name: str
    rule: str
    loc: Loc
    message: str
    suggestion: str = ""
