"""The documentation is what the code says, and its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sparsec.dialects  # registers the ops
from sparsec.ir.opdef import REGISTRY

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


@pytest.mark.parametrize("script", ["generate.py", "sessions.py"])
def test_generated_pages_are_fresh(script: str) -> None:
    command = [sys.executable, f"docs/{script}", "--check"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": "."}
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_op_is_documented() -> None:
    text = "".join(path.read_text() for path in (ROOT / "docs" / "dialects").glob("*.md"))
    assert len(sparsec.dialects.__all__) >= 4
    ops = [name for name in REGISTRY if not name.startswith(("aten.", "torch."))]
    assert len(ops) > 5
    assert [name for name in ops if f"## `{name}`" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_resolve(page: Path) -> None:
    assert [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()] == []
