"""Write the reference pages from the code: one page per dialect from its op classes, one for the passes.

    python docs/generate.py            # rewrite docs/dialects and docs/passes.md
    python docs/generate.py --check    # exit 1 where a page is not what the code says

An op's page holds its docstring, and a row for each declared operand, result, attribute and region with the text of
its `#:` comment. Nothing on these pages is written by hand.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_origin

from sparsec import dialects
from sparsec.ir.opdef import REGISTRY, OpDef
from sparsec.passes.base import PASSES, Pass
from sparsec.pipeline import PIPELINES

DOCS = Path(__file__).parent
NOTE = "<!-- Written by docs/generate.py: edit the docstrings instead. -->\n"
FIELD = re.compile(r"^    (?P<name>\w+)\s*:[^#\n]*#:\s*(?P<text>.*)$", re.MULTILINE)


def comments(cls: type[Any]) -> dict[str, str]:
    """The `#:` comment of each field that has one."""
    return {match["name"]: match["text"].strip() for match in FIELD.finditer(inspect.getsource(cls))}


def spelled(annotation: Any) -> str:
    """An attribute's type as a reader writes it."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("sparsec.ir.types.", "")


def docstring(cls: type[Any]) -> str:
    """A class's docstring less the indentation of the class body, so that an example alone keeps its own."""
    node = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(node, ast.ClassDef)
    lines = (ast.get_docstring(node, clean=False) or "").splitlines()
    return "\n".join(line.removeprefix("    ").rstrip() for line in lines).strip()


def cell(text: str) -> str:
    """Text inside a table."""
    return text.replace("|", "\\|")


def rows(op: type[OpDef]) -> Iterator[tuple[str, str, str]]:
    """(field, kind, comment) in the order of the text form."""
    fields, said = op.fields(), comments(op)
    kinds = {"OptOperand": "operand, or `none`", "Operands": "operands, any number", "Results": "results, any number"}
    for name, kind in {**fields.operands, **fields.results}.items():
        yield name, kinds.get(kind, kind.lower()), said.get(name, "")
    for name, annotation in fields.attrs.items():
        default = f", default `{fields.defaults[name]!r}`" if name in fields.defaults else ""
        yield name, f"attribute `{spelled(annotation)}`{default}", said.get(name, "")
    for name in fields.regions:
        yield name, "region", said.get(name, "")


def op_section(name: str, op: type[OpDef]) -> str:
    """One op: heading, docstring, table of fields."""
    lines = [f"## `{name}`", "", docstring(op), ""]
    table = list(rows(op))
    if table:
        lines += ["| field | what | |", "| --- | --- | --- |"]
        lines += [f"| `{field}` | {cell(kind)} | {cell(comment)} |" for field, kind, comment in table]
        lines.append("")
    return "\n".join(lines)


def dialect_page(module: types.ModuleType) -> str:
    """The page of one module of `sparsec.dialects`."""
    title = module.__name__.rpartition(".")[2]
    ops = [(name, op) for name, op in REGISTRY.items() if f"{op.__module__}.".startswith(f"{module.__name__}.")]
    intro = inspect.cleandoc(module.__doc__ or "")
    return "\n".join([NOTE, f"# {title}", "", intro, "", *(op_section(name, op) for name, op in ops)]).rstrip() + "\n"


def pass_section(cls: type[Pass]) -> str:
    """One pass: heading, docstring, table of options."""
    lines = [f"## `{cls.name}`", "", docstring(cls), ""]
    options, said = dataclasses.fields(cls), comments(cls)
    if options:
        lines += ["| option | default | |", "| --- | --- | --- |"]
        for option in options:
            lines.append(
                f"| `{option.name.replace('_', '-')}` | `{option.default}` | {cell(said.get(option.name, ''))} |"
            )
        lines.append("")
    return "\n".join(lines)


def passes_page() -> str:
    """The page of all passes, and of the phases that they make up."""
    lines = [NOTE, "# Passes", "", "| phase | passes |", "| --- | --- |"]
    for phase, passes in PIPELINES.items():
        lines.append(f"| `{phase}` | {', '.join(f'`{name}`' for name in passes.split(',') if name)} |")
    own = [cls for cls in PASSES.values() if cls.__module__.startswith("sparsec.")]
    return "\n".join([*lines, "", *map(pass_section, own)]).rstrip() + "\n"


def summary(text: str | None) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())


def pages() -> dict[Path, str]:
    """Every generated page: path and text."""
    modules: dict[str, types.ModuleType] = {name: getattr(dialects, name) for name in dialects.__all__}
    found = {DOCS / "dialects" / f"{name}.md": dialect_page(module) for name, module in modules.items()}
    index = [f"- [{name}]({name}.md): {summary(module.__doc__)}" for name, module in modules.items()]
    found[DOCS / "dialects" / "README.md"] = "\n".join([NOTE, "# Dialects", "", *index]) + "\n"
    found[DOCS / "passes.md"] = passes_page()
    return found


def main() -> int:
    """Write the pages, or with `--check` say which are stale. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page is stale")
    check: bool = parser.parse_args().check
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{path.relative_to(DOCS.parent)} {'is stale: run `make docs`' if check else 'written'}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(pages()[path])
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
