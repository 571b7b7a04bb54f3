"""Runs the `check_*.py` of this folder in processes of their own, in which Triton interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
FOLDER = Path(__file__).parent


NAMES = sorted(path.name for path in FOLDER.glob("check_*.py"))
SOME_SLOW = [name for name in NAMES if "pytest.mark.slow" in (FOLDER / name).read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", NAMES)
def test_interpreted(name: str) -> None:
    run(name, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME_SLOW)
def test_interpreted_at_length(name: str) -> None:
    run(name, "slow")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_compiled_ones_wait_for_a_gpu(name: str) -> None:
    """Where Triton does not interpret, nothing reaches for a GPU before a test has asked whether there is one."""
    run(name, "slow or not slow", interpreted=False)


def run(name: str, which: str, interpreted: bool = True) -> None:
    """Run the tests of a file that the expression `which` of marks selects."""
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-x", "--tb=short", "--show-capture=no", "-m", which]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-o", "python_files=check_*.py", str(FOLDER / name)],
        cwd=FOLDER.parents[2],
        env={**os.environ, "TRITON_INTERPRET": str(int(interpreted)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert (" passed" if interpreted else " skipped") in done.stdout
