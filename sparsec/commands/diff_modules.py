"""`sparsec diff`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

from rich.text import Text

from sparsec.commands.read_module import read_module
from sparsec.console import out
from sparsec.inspect.structural import Change, compare


def run(a: str, b: str, phase: str | None, as_json: bool) -> int:
    """Say what differs between two modules; the number of differences. Raises: SparsecError, CompileError."""
    changes = compare(read_module(a, phase), read_module(b, phase))
    if as_json:
        print(json.dumps([asdict(change) for change in changes]))
        return len(changes)
    for change in changes:
        out.print(render(change), soft_wrap=True)
    counts = Counter(change.kind for change in changes)
    summary = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    out.print(f"{summary}" if changes else "no difference: they compute the same in the same way")
    return len(changes)


def render(change: Change) -> Text:
    """A change in colour."""
    text = Text()
    for i, line in enumerate(str(change).split("\n")):
        style = "bold" if i == 0 else "red" if line.startswith("  -") else "green"
        text.append(("\n" if i else "") + line, style=style)
    return text
