"""The shape of the source tree: short files, links that resolve, no traces of one machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("sparsec", "passes", "codegen", "runtime", "tests", "examples", "benchmarks", "docs", ".ci")
TEXT = {".py", ".lark", ".md", ".toml", ".yaml", ".txt", ".json", ".sparsec", ".mlir", ""}
LIMIT = 500  # lines
FOREIGN = "|".join(["work", "tmp", "root", "home", "opt", "mnt", "Users"])  # the first folder of a machine's own path
MACHINE_PATH = re.compile(rf"(?<![\w.-])/(?:{FOREIGN})/\w")


def files() -> Iterator[Path]:
    """Every file of the project's own folders once, and those at the top; links to folders are not followed."""
    yield from (path for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".coverage"))
    for top in FOLDERS:
        for folder, subfolders, names in os.walk(ROOT / top):
            subfolders[:] = [name for name in subfolders if name != "__pycache__"]
            yield from (Path(folder) / name for name in names)


def test_files_are_short() -> None:
    sources = [path for path in files() if path.suffix in {".py", ".lark"}]
    assert len(sources) > 20
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources}
    assert {name: length for name, length in lengths.items() if length > LIMIT} == {}


@pytest.mark.parametrize("name", ["passes", "codegen", "runtime"])
def test_links_are_relative_and_resolve(name: str) -> None:
    link = ROOT / "sparsec" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert (link / "__init__.py").samefile(ROOT / name / "__init__.py")


def test_no_path_of_one_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in files()
        if path.suffix in TEXT and path.name != "tokenizer.json"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


def test_the_path_check_finds_a_planted_path() -> None:
    for word in ("work", "tmp", "home"):
        assert MACHINE_PATH.search(f'open("/{word}/x.json")')
    assert not MACHINE_PATH.search("docs/work/x, https://example.org/home/page, a/tmp/b")
