"""Packed and quantised weights by every way in: the API, the command line, artifacts, torch.compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import sparsec
from sparsec import cli
from sparsec.diagnostics import SparsecError
from sparsec.inspect.quantised import summarise
from sparsec.runtime import live_weights
from sparsec.runtime.artifact import open_artifact
from tests.ways_in import modules

ROOT = Path(__file__).parents[2]
X = torch.randn(9, 128, generator=torch.Generator().manual_seed(1))
MOST = {"int8": 0.012, "int4": 0.15}


@pytest.fixture
def model() -> Any:
    return modules.stack(hidden=128, width=128)


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    live_weights.forget()
    yield
    torch._dynamo.reset()


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.detach() - wanted.detach()).norm() / wanted.detach().norm())


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised(model: Any, weights: str, tmp_path: Path) -> None:
    plain, compiled = sparsec.compile(model, (X,)), sparsec.compile(model, (X,), weights=weights)
    found = compiled.weight_errors()
    assert [layer.scope for layer in found] == ["layers.0", "layers.1"]
    assert all(MOST[weights] / 4 < layer.error < MOST[weights] for layer in found)
    (row,) = summarise(found)
    assert (row.layers, row.packing, row.experts, row.hidden, row.width) == (2, weights, 4, 128, 128)
    assert row.least <= row.median <= row.most
    assert 1e-5 < error(compiled(X), model(X)) < MOST[weights]
    assert plain.weight_errors() == [] and error(plain(X), model(X)) < 1e-6
    paths = [made.save(tmp_path / name) for name, made in (("plain", plain), ("quantised", compiled))]
    assert [open_artifact(path).manifest["weights"] for path in paths] == ["model", weights]
    sizes = [sum(file.stat().st_size for file in (path / "weights").iterdir()) for path in paths]
    assert sizes[1] < sizes[0] / (3 if weights == "int8" else 5)
    assert torch.equal(sparsec.load(paths[1])(X), compiled(X))
    assert f'weights = "{weights}"' in (paths[1] / "module.sparsec").read_text()


@pytest.mark.parametrize(
    ("weights", "activations", "most"), [("fp8", "model", 0.06), ("mxfp4", "model", 0.3), ("fp8", "fp8", 0.08)]
)
def test_quantised_for_a_gpu(model: Any, weights: str, activations: str, most: float, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    plain = sparsec.compile(model, (X,), target="cuda:sm_90")
    compiled = sparsec.compile(model, (X,), weights=weights, activations=activations, target="cuda:sm_90")
    assert plain.weight_errors() == []
    found = compiled.weight_errors()
    assert [layer.scope for layer in found] == ["layers.0", "layers.1"]
    assert all(most / 4 < layer.error < most and layer.activations == activations for layer in found)
    (row,) = summarise(found)
    assert (row.layers, row.packing, row.experts, row.hidden, row.width) == (2, weights, 4, 128, 128)
    path = compiled.save(tmp_path / "quantised")
    assert open_artifact(path).manifest["weights"] == weights
    sizes = [sum(file.stat().st_size for file in (made / "weights").iterdir())
             for made in (path, plain.save(tmp_path / "plain"))]  # fmt: skip
    assert sizes[0] < sizes[1] / (3.5 if weights == "fp8" else 6)
    kernels = [kernel for kernel in compiled.emitted.plan.kernels.values() if kernel.op == "moe.gather_gemm"]
    assert kernels and all(kernel.backend == "triton" for kernel in kernels)


def test_the_environment_asks_too(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEC_WEIGHTS", "int8")
    assert sparsec.compile(model, (X,)).weight_errors()
    assert not sparsec.compile(model, (X,), weights="model").weight_errors()


def test_what_cannot_be_quantised_so(model: Any) -> None:
    with pytest.raises(SparsecError, match="stored as model, int8, int4, fp8, mxfp4, not as 'int3'"):
        sparsec.compile(model, (X,), weights="int3")
    with pytest.raises(SparsecError, match="int8 weights are for target cpu, not for cuda:sm_90, which has fp8"):
        sparsec.compile(model, (X,), weights="int8", target="cuda:sm_90")
    with pytest.raises(SparsecError, match="mxfp4 weights are for GPUs, not for cpu, which has int8 and int4"):
        sparsec.compile(model, (X,), weights="mxfp4")


def test_weights_without_values_have_no_error() -> None:
    with torch.device("meta"):
        model = modules.stack()
    compiled = sparsec.compile(model, (X[:, :16].to("meta"),), weights="int4")
    assert compiled.weight_errors() == []
    assert all(compiled.weights[name].is_meta for name in compiled.weights)


def test_packed_weights_are_read_where_they_lie(model: Any, tmp_path: Path) -> None:
    """Every packed tensor begins on a cache line of the mapped file."""
    path = sparsec.compile(model, (X,), weights="int4").save(tmp_path / "model")
    seen = 0
    for file in (path / "weights").iterdir():
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name.endswith((".int4", ".scales")):
                    seen += 1
                    assert tensors.get_tensor(name).data_ptr() % 64 == 0
    assert seen == 8


FACTORY = """
import torch
from tests.ways_in import modules

def make():
    return modules.stack(hidden=128, width=128), (torch.randn(9, 128),)
"""


def command(monkeypatch: pytest.MonkeyPatch, *args: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["sparsec", *map(str, args)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.py").write_text(FACTORY)
    factory, place = f"{tmp_path / 'model.py'}:make", tmp_path / "made.sparsec"
    assert command(monkeypatch, "compile", factory, "-o", place, "--weights", "int8") == 0
    told = capfd.readouterr().out
    assert "int8" in told and "error: least" in told and "%" in told
    assert command(monkeypatch, "compile", factory, "-o", place, "--weights", "int4", "--json") == 0
    summary = json.loads(capfd.readouterr().out)
    assert [layer["packing"] for layer in summary["weight_errors"]] == ["int4", "int4"]
    assert open_artifact(place).manifest["weights"] == "int4"


def test_command_line_from_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A text of an early phase is quantised like the artifact whose weights it takes; a late one is what it is."""
    model = modules.stack(hidden=128, width=128)
    compiled = sparsec.compile(model, (X,), weights="int8")
    artifact = compiled.save(tmp_path / "made")
    for phase in ("fuse", "lower"):
        (tmp_path / f"{phase}.sparsec").write_text(compiled.ir(phase).replace(', weights = "int8"', ""))
    text, output = tmp_path / "fuse.sparsec", tmp_path / "again.sparsec"
    assert command(monkeypatch, "compile", text, "-o", output, "--weights", "int8", "--weights", artifact) == 0
    assert torch.equal(sparsec.load(output)(X), compiled(X))
    capfd.readouterr()
    late = tmp_path / "lower.sparsec"
    assert command(monkeypatch, "compile", late, "-o", output, "--weights", "int4", "--weights", artifact) == 1
    assert "weights are packed already: go on from 'fuse'" in capfd.readouterr().err
    assert command(monkeypatch, "compile", text, "-o", output, "--weights", "int4", "--weights", "int8") == 1
    assert "int4 and int8: choose one" in capfd.readouterr().err


@pytest.mark.parametrize("weights", ["model", "int8", "int4"])
def test_torch_compile(model: Any, weights: str, fresh: None) -> None:
    made: Any = torch.compile(model, backend="sparsec", options={"dense": "aten", "weights": weights})
    with torch.no_grad():
        expected = sparsec.compile(model, (X,), weights=weights)(X)
        assert torch.equal(made(X), expected)
        kept = {key: id(entry.value) for key, entry in live_weights._made.items()}
        assert torch.equal(made(X), expected)
        assert kept == {key: id(entry.value) for key, entry in live_weights._made.items()}  # packed once
        model.layers[0].experts[0].up.weight.mul_(1.5)
        changed = made(X)
        assert error(changed, model(X)) < {"model": 1e-6, **MOST}[weights]
        assert not torch.equal(changed, expected)


def test_torch_compile_takes_known_options_only(model: Any, fresh: None) -> None:
    wrong: list[dict[str, Any]] = [{"weights": "int3"}, {"free_weights": 1}, {"wheights": "int8"}]
    for options in wrong:
        with pytest.raises(Exception, match=r"int3|takes options="), torch.no_grad():
            torch.compile(model, backend="sparsec", options=options)(X)


FREED = """
import ctypes
import gc
import sparsec.ops
import torch
from pathlib import Path
from tests.ways_in import modules

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed in small pieces too
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

torch.set_num_threads(1)
model = modules.stack(layers=2, hidden=256, width=512, experts=32)
x = torch.randn(9, 256)
with torch.no_grad():
    expected = model(x)
    size = sum(p.nbytes for p in model.parameters()) / 2**20
    before = resident()
    made = torch.compile(model, backend="sparsec", options={"dense": "aten", "free_weights": FREE})
    first = made(x)
    assert torch.allclose(first, expected, atol=1e-4), (first - expected).abs().max()
    assert torch.equal(made(x), first)
    more = torch.cat([x, x])
    assert torch.allclose(made(more)[:9], first, atol=1e-5)  # compiled again for other sizes, from what is packed
    print(size, resident() - before, model(x).isnan().all().item())
    model.layers[0].experts[0].up.weight.zero_()
    try:
        made(x)
        print("ran")
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is given back on Linux")
def test_torch_compile_gives_back_the_memory_of_what_is_packed() -> None:
    def run(free: bool) -> tuple[float, float, str, str]:
        code = FREED.replace("FREE", str(free))
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=environment()
        )
        numbers, said = done.stdout.strip().split("\n")[-2:]
        size, grown, broken = numbers.split()
        return float(size), float(grown), broken, said

    size, grown, broken, said = run(False)
    assert broken == "False" and said == "ran"
    assert size > 90 and grown > 0.9 * size  # packed beside the originals
    freed_size, freed, broken, said = run(True)
    assert freed_size == size and freed < grown - 0.8 * size
    assert broken == "True"  # nothing that is computed of them can pass for a result
    assert "given back once it was packed (free_weights=True)" in said


LOADED = """
import sys, torch
from pathlib import Path
from sparsec.runtime.artifact import load

def resident(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024

torch.set_num_threads(1)
path = Path(sys.argv[1])
before, anonymous = resident("VmRSS"), resident("RssAnon")
program = load(path)
program(torch.randn(512, 256))
size = sum(file.stat().st_size for file in (path / "weights").iterdir()) / 2**20
native = bool(program.paths) and all(choice.isa for choice in program.paths.values())
print(native, size, resident("VmRSS") - before, resident("RssAnon") - anonymous)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("weights", ["model", "int4"])
def test_weights_stay_in_their_files(tmp_path: Path, weights: str) -> None:
    """Kernels read packed banks out of the mapped artifact: a run holds them once, and not as memory of its own."""
    x = torch.randn(9, 256)
    path = sparsec.compile(modules.stack(hidden=256, width=512, experts=32), (x,), weights=weights).save(tmp_path / "m")
    code = [sys.executable, "-c", LOADED, str(path)]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, check=True, env=environment())
    native, size, grown, anonymous = done.stdout.split()
    if native != "True":
        pytest.skip("no native code here")
    rest = 45.0  # code of the runtime, rows and scratch
    assert float(anonymous) < rest
    assert float(size) * 0.5 < float(grown) < 1.05 * float(size) + rest


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}
