"""Pages of one file that need no server and no network; `index.html` of a dump.

Texts come from strangers. They are packed (zlib, base64), so that nothing in them can end the element that
holds them; the scripts put them into the page as text nodes only; and the page's policy allows no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from sparsec.inspect.dump import write_atomic
from sparsec.inspect.html.read_dump import read_dump

FILE = "index.html"
BASE = ("core", "list", "heat", "shell")
"""Scripts of every page."""
SCRIPTS = ("text", "phases", "kernels", "layout", "graph", "experts", "tables", "main")
STYLES = ("base", "views")


def write_index(folder: Path) -> Path:
    """(Re)write the page of one run of a dump, of what lies in its folder: `trace.json` too, once it is there.

    Returns: the page's path. Raises: SparsecError if the folder is no run of a dump.
    """
    write_atomic(path := folder / FILE, render(folder.resolve().name, read_dump(folder), SCRIPTS, STYLES))
    return path


def render(name: str, data: Mapping[str, Any], scripts: Sequence[str], styles: Sequence[str]) -> str:
    """A page: data that scripts of ours show. Raises: ValueError for data that is no JSON."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    script, style = _assets(tuple(scripts), tuple(styles))
    return (
        _environment()
        .get_template("index.html.jinja")
        .render(
            name=name,
            data=base64.b64encode(zlib.compress(text.encode("utf-8", "replace"), 9)).decode(),
            script=script,
            style=style,
            policy=f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'",
        )
    )


@cache
def _assets(scripts: tuple[str, ...], styles: tuple[str, ...]) -> tuple[str, str]:
    """Our script and our style."""
    here = files("sparsec.inspect.html")

    def read(name: str) -> str:
        return here.joinpath("assets").joinpath(name).read_text(encoding="utf-8")

    script = "\n".join(["(() => {", '"use strict";', *(read(f"{name}.js") for name in (*BASE, *scripts)), "})();"])
    return script, "\n".join(read(f"{name}.css") for name in styles)


@cache
def _environment() -> Environment:
    loader = PackageLoader("sparsec.inspect.html", "assets")
    return Environment(loader=loader, autoescape=select_autoescape(default=True), undefined=StrictUndefined)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
