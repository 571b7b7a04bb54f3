"""Texts of the IR, and diffs of them, in colour."""

from __future__ import annotations

import re

from rich.text import Text

_STYLES = {
    r"//[^\n]*": "dim",
    r"^ *loc [^\n]*": "dim",
    r"%[\w$.-]+": "cyan",
    r"@[\w$.]+": "bold",
    r"\b(?:moe|kernel|dist)\.\w+": "bold magenta",
    r"\baten\.[\w.]+": "blue",
    r"(?:tensor|sym)<[^<>\n]*>": "green",
    r'"[^"\n]*"': "yellow",
}
_TOKEN = re.compile("|".join(f"({pattern})" for pattern in _STYLES), re.MULTILINE)
_SIDES = {"+++": "bold", "---": "bold", "+": "green", "-": "red", "@": "cyan"}


def colour(text: str) -> Text:
    """The text with styles: by its tokens, or a diff by its sides."""
    if text.startswith("--- "):
        return Text("\n").join(Text(line, _side(line)) for line in text.splitlines())
    made, styles = Text(text), tuple(_STYLES.values())
    for found in _TOKEN.finditer(text):
        assert found.lastindex is not None
        made.stylize(styles[found.lastindex - 1], *found.span())
    return made


def _side(line: str) -> str:
    return next((style for start, style in _SIDES.items() if line.startswith(start)), "")
