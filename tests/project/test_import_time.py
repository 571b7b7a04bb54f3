"""`import sparsec` is cheap, and a compiled model runs without the compiler being loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def fresh(code: str) -> str:
    """What a new interpreter prints for `code`."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_import_takes_under_50_ms() -> None:
    code = "import time; t = time.perf_counter(); import sparsec; print(time.perf_counter() - t)"
    assert min(float(fresh(code)) for _ in range(5)) < 0.050  # seconds


def test_import_loads_no_heavy_library() -> None:
    heavy = {"torch", "transformers", "triton", "numpy", "lark", "rich", "networkx"}
    loaded = fresh("import sys, sparsec; print(*sys.modules)").split()
    assert heavy & set(loaded) == set()


def test_the_command_answers_without_torch() -> None:
    loaded = fresh("import sys, sparsec.cli; print(*sys.modules)").split()
    assert "torch" not in loaded
    assert "transformers" not in loaded


def test_only_texts_need_the_grammar() -> None:
    """On a machine with a GPU there is PyTorch, Triton and pytest: layers compile there, and tests of kernels run."""
    tests = sorted(path.stem for path in (ROOT / "tests/codegen/triton").glob("check_*.py"))
    assert "check_decode" in tests
    names = ["sparsec.api", "sparsec.backend", "sparsec.training", "benchmarks.gpu.variants", "benchmarks.gpu.engines"]
    names += ["tests.benchmarks.test_gpu", "tests.codegen.triton.test_gpu", "tests.codegen.triton.test_bank_operator"]
    names += [f"tests.codegen.triton.{name}" for name in tests]
    code = f"""
import importlib, sys, pytest
sys.modules["lark"] = None
for name in {names}:
    try:
        importlib.import_module(name)
    except pytest.skip.Exception as reason:
        print(name.rpartition(".")[2], end=" ")
"""
    assert set(fresh(code).split()) == {"check_layers"}
