"""Run the sessions in the pages that show some, and write what they print.

    python docs/sessions.py            # rewrite the pages
    python docs/sessions.py --check    # exit 1 where a page shows something else

A session is a block of a page fenced as `console`: lines that begin with `$ ` are run, one after the other, in the
root of the repository with a folder of their own as `$TMP`; the rest of the block is what they printed. `| head -3`
behind a command keeps its first lines, `| grep TEXT` those that hold a text; nothing else of a shell is understood.
Lines are cut at the page's width. Errors of arithmetic (`1.2e-07`) are not compared: they depend on the processor.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path
from unittest import mock

from sparsec import cli, pipeline

DOCS = Path(__file__).parent
PAGES = ("debugging.md", "simulate.md")
WIDTH = 118
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)
ERROR = re.compile(r"\d\.\de-\d\d")


def run(command: str, folder: str) -> list[str]:
    """The lines that a command prints."""
    said, *filters = (part.strip() for part in command.split(" | "))
    name, *words = shlex.split(said.replace("$TMP", folder))
    if name != "sparsec":
        raise ValueError(f"a session runs sparsec, not {name!r}")
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["sparsec", *words]),
        mock.patch.dict(os.environ, COLUMNS=str(WIDTH), NO_COLOR="1"),
        mock.patch.dict(pipeline.PIPELINES),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        contextlib.suppress(SystemExit),
    ):
        cli.main()
    lines = [line.rstrip().replace(folder, "$TMP") for line in printed.getvalue().splitlines()]
    for step in filters:
        tool, given = shlex.split(step)
        lines = lines[: -int(given)] if tool == "head" else [line for line in lines if given in line]
    return [line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…" for line in lines]


def played(page: str) -> str:
    """The page with what its sessions print now."""

    def play(block: re.Match[str]) -> str:
        lines = list[str]()
        with tempfile.TemporaryDirectory() as folder:
            for line in block[1].splitlines():
                if line.startswith("$ "):
                    lines += [line, *run(line[2:], folder)]
        return "\n".join(["```console", *lines, "```"])

    return BLOCK.sub(play, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="only say whether the pages are fresh")
    check = parser.parse_args().check
    stale = list[str]()
    for path in (DOCS / name for name in PAGES):
        before = path.read_text(encoding="utf-8")
        after = played(before)
        if ERROR.sub("", after) != ERROR.sub("", before):
            stale.append(path.name)
            if not check:
                path.write_text(after, encoding="utf-8")
    if check and stale:
        sys.exit(f"stale: {', '.join(stale)}; run python docs/sessions.py")


if __name__ == "__main__":
    main()
