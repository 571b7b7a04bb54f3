"""Native kernels by every way in: they run where a compiler is, and PyTorch runs the experts where none is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsec
from sparsec import launch
from sparsec.inspect.check import relative
from sparsec.runtime import isa, live_weights, native
from sparsec.runtime.context import KernelCall
from sparsec.runtime.native_library import Library
from sparsec.runtime.plan import Kernel
from tests.codegen.cpu.experts import HERE
from tests.ways_in import modules

ROOT = Path(__file__).parents[2]
X = torch.randn(9, 16, generator=torch.Generator().manual_seed(1))
LACKING = "there is no C++ compiler: SPARSEC_CXX='/nonexistent' runs none"
needs_compiler = pytest.mark.skipif(not HERE, reason="nothing here compiles native code that runs here")

# In a process of its own: nothing that this one compiled is known there but by the user's cache.
LOAD = """
import sys, torch, sparsec
model = sparsec.load(sys.argv[1])
x, wanted = torch.load(sys.argv[2], weights_only=True)
assert torch.equal(model(x), wanted)
print(*{path.isa for path in model.program.paths.values()})
"""


@pytest.fixture
def model() -> Any:
    torch._dynamo.reset()
    live_weights.forget()
    return modules.stack()


@needs_compiler
def test_compiled_and_loaded_without_being_asked(model: Any, tmp_path: Path) -> None:
    compiled = sparsec.compile(model, (X,))
    assert relative(compiled(X), model(X)) < 1e-5
    best = next(name for name in isa.allowed() if name in HERE)
    assert {(path.isa, path.why) for path in compiled.program.paths.values()} == {(best, "")}
    assert not [remark for remark in compiled.remarks if remark.kind == "missed"]
    artifact = compiled.save(tmp_path / "model")
    torch.save((X, compiled(X)), tmp_path / "values.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(artifact), str(tmp_path / "values.pt")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, best), done.stderr


@needs_compiler
def test_torch_compile(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bound, launcher = list[str](), native.launcher

    def counted(kernel: Kernel, library: Library) -> KernelCall:
        bound.append(kernel.op)
        return launcher(kernel, library)

    monkeypatch.setattr(native, "launcher", counted)
    monkeypatch.setattr(launch, "_KERNELS", {})  # what other tests compiled is not bound again
    compiled = torch.compile(model, backend="sparsec", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for x in (X, X[:5], X[:1]):
            assert relative(compiled(x), model(x)) < 1e-5
    assert set(bound) == {"moe.layer"}


def test_without_a_compiler(model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSEC_CXX", "/nonexistent")
    compiled = sparsec.compile(model, (X,))
    assert any(LACKING in remark.message for remark in compiled.remarks)
    assert relative(compiled(X), model(X)) < 1e-5
    loaded = sparsec.load(compiled.save(tmp_path / "model"))
    assert torch.equal(loaded(X), compiled(X))
    (why,) = {str(path) for path in loaded.program.paths.values()}
    assert why == "PyTorch's oneDNN: there was no C++ compiler when it was compiled"
    with torch.no_grad():
        assert relative(torch.compile(model, backend="sparsec", fullgraph=True)(X), model(X)) < 1e-5
