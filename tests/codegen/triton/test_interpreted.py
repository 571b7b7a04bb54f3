"""Runs the `check_*.py` of this folder in processes of their own, in which Triton interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FOLDER = Path(__file__).parent


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("check_*.py")))
def test_interpreted(name: str) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-x", "--tb=short", "--show-capture=no"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-o", "python_files=check_*.py", str(FOLDER / name)],
        cwd=FOLDER.parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
