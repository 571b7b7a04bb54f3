"""Adapters for engines whose files are given by `--peers DIR`; what DIR holds, `benchmarks.gpu` says.

None of their code is here: each adapter imports what it finds in DIR and calls it as its own project does.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.gpu.engines import Missing, Setting


def folder_of(setting: Setting, name: str) -> Path:
    """`DIR/name`, with DIR on Python's path. Raises: Missing."""
    if setting.peers is None:
        raise Missing("its files were not given: --peers DIR")
    found = setting.peers.resolve() / name
    if not found.is_dir():
        raise Missing(f"DIR has no folder '{name}'")
    if str(setting.peers.resolve()) not in sys.path:
        sys.path.append(str(setting.peers.resolve()))
    return found
