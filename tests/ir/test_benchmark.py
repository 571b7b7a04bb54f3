"""The benchmark of the IR runs, and reports what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.ir import TARGETS, benchmark


def test_benchmark_measures_each_step() -> None:
    result = benchmark(ops=150, repeats=2)
    assert result["ops"] == 151
    assert set(result["ms"]) == {*TARGETS, "parse generic", "print generic"}
    assert set(result["dump"]) == {"cpu", "cuda:sm_90"}
    assert all(ms["passes"] > ms["copies"] > 0 for ms in result["dump"].values())
    assert all(0 < ms["min"] <= ms["median"] <= ms["max"] for ms in result["ms"].values())


def test_json_output() -> None:
    command = [sys.executable, "-m", "benchmarks.ir", "--ops", "30", "--repeats", "1", "--json"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["ops"] == 31
