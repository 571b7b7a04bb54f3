"""What a dump holds, by every way in, and its kernels' benchmark."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import sparsec
from sparsec import pipeline
from sparsec.cli import cli
from sparsec.codegen.cpu import compiler
from sparsec.codegen.emit import Emitted
from sparsec.inspect.bench import bench
from sparsec.inspect.dump import Dump
from sparsec.inspect.unified import diff
from sparsec.ir.parser import parse_module
from sparsec.pipeline import PHASES
from sparsec.runtime.plan import Plan

FACTORY = """
import torch
from tests.inspect.test_dump_ways import Layer

def model():
    return Layer(), (torch.randn(5, 32),)
"""


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 8, bias=False)
        self.up = nn.Parameter(torch.randn(8, 96, 32) / 6)
        self.down = nn.Parameter(torch.randn(8, 32, 48) / 7)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2)
        rows = x.new_zeros(x.shape)
        for e in range(8):
            gate, up = torch.nn.functional.linear(x, self.up[e]).chunk(2, -1)
            y = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, self.down[e])
            rows = rows + y * ((ids == e) * weights).sum(-1, keepdim=True)
        return x + rows


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEC_ISAS", "avx2")
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for the CPU without native code, which takes long to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEC_CXX", "/nonexistent")
        sparsec.compile(Layer(), (torch.randn(5, 32),), dump=(folder := tmp_path_factory.mktemp("dump")))
    return folder / "model-0001"


def test_what_a_finished_run_holds(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["state"] == "done"
    (kernel,) = manifest["kernels"]
    assert kernel == "kernels/layer_0.cpp"
    assert hashlib.sha256((run / kernel).read_bytes()).hexdigest() == manifest["kernels"][kernel]
    assert set(json.loads((run / "plan.json").read_text())["kernels"]) == {"layer_0"}
    assert any(
        row["callee"] == "layer_0" for row in json.loads((run / "costs.json").read_text())["ops"] if "callee" in row
    )
    assert (run / "index.html").stat().st_size > 10_000
    made = json.loads((run / "made.json").read_text())
    file = next(name for name in made if name.endswith("fuse-layer.sparsec"))
    lines = (run / file).read_text().splitlines()
    (line,) = [int(n) for n in made[file] if "moe.layer" in lines[int(n) - 1]]
    assert "fuse_layer" in made[file][str(line)]
    missed = [json.loads(line) for line in (run / "remarks.jsonl").read_text().splitlines()]
    assert any(r["pass_name"] == "emit" and "C++ compiler" in r["message"] for r in missed)


def test_every_text_parses_and_every_diff_applies(run: Path) -> None:
    files = sorted(run.glob("*.sparsec"))
    for before, after in pairwise(files):
        parse_module(after.read_text(), str(after))
        said = after.with_suffix(".diff").read_text()
        assert said == diff(before.read_text(), after.read_text(), before.name, after.name)


def test_the_variable_reaches_every_way_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEC_CXX", "/nonexistent")
    monkeypatch.setenv("SPARSEC_DUMP", str(tmp_path / "d"))
    x = torch.randn(5, 32)
    sparsec.compile(Layer(), (x,))
    source, text = tmp_path / "zoo.py", tmp_path / "x.sparsec"
    source.write_text(FACTORY)
    done = CliRunner().invoke(cli, ["compile", f"{source}:model", "--to", "fuse", "-o", str(text)])
    assert done.exit_code == 0, done.output
    CliRunner().invoke(cli, ["compile", str(text), "--to", "lower", "-o", str(tmp_path / "y.sparsec")])
    with torch.no_grad():
        torch.compile(Layer(), backend="sparsec", options={"dense": "aten"})(x)
    runs = {path.name for path in (tmp_path / "d").iterdir()}
    assert {"model-0001", "x-0001", "graph-0001"} < runs and len(runs) == 4
    for name in runs:
        assert (tmp_path / "d" / name / "index.html").is_file()


def test_torch_compile_dumps_each_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEC_CXX", "/nonexistent")
    options: dict[str, Any] = {"dense": "aten", "dump": str(tmp_path)}
    with torch.no_grad():
        torch.compile(Layer(), backend="sparsec", options=options)(torch.randn(5, 32))
        torch.compile(nn.Linear(4, 4), backend="sparsec", options=options)(torch.randn(5, 4))
    fused, dense = (json.loads((tmp_path / f"graph-000{i}" / "manifest.json").read_text()) for i in (1, 2))
    assert list(fused["kernels"]) == ["kernels/layer_0.cpp"]
    assert [entry["number"] for entry in fused["passes"]] == list(range(len(fused["passes"])))
    assert {entry["phase"] for entry in fused["passes"]} == {*PHASES}
    assert "kernels" not in dense and dense["state"] == "done"
    assert (tmp_path / "graph-0002" / "index.html").is_file()


def test_a_graph_that_is_differentiated_is_dumped(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dense": "aten", "dump": str(tmp_path)}
    torch.compile(Layer(), backend="sparsec", options=options)(torch.randn(5, 32))
    (run,) = tmp_path.iterdir()
    manifest = json.loads((run / "manifest.json").read_text())
    assert [entry["pass"] for entry in manifest["passes"] if entry.get("diff")][-1] == "dce"
    assert (run / "index.html").is_file()


def test_a_folder_that_is_none_is_refused() -> None:
    with pytest.raises(Exception, match="takes options="), torch.no_grad():
        torch.compile(nn.Linear(4, 4), backend="sparsec", options={"dump": 3})(torch.randn(5, 4))


def test_kernels_are_timed_from_the_run(run: Path) -> None:
    one, many = bench(run, ["kernels/layer_0.cpp"], [1, 8])
    assert (one.kernel, one.op, one.tokens, many.tokens) == ("layer_0", "moe.layer", 1, 8)
    assert one.us > 0 and one.gigabytes_per_second > 0 and one.teraflops > 0
    assert one.ran.startswith("PyTorch")
    with pytest.raises(sparsec.SparsecError, match=r"no kernel 'layer_9' \(there are: layer_0\)"):
        list(bench(run, ["layer_9"]))
    with pytest.raises(sparsec.SparsecError, match="at least one token"):
        list(bench(run, [], [0]))
    with pytest.raises(sparsec.SparsecError, match="no finished run"):
        list(bench(run / "kernels"))


def test_the_runner_stands_alone(run: Path) -> None:
    command = [sys.executable, str(run / "bench.py"), "--bench", "layer_0", "--tokens", "2", "--json"]
    root = str(Path(sparsec.__file__).parents[1])
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": root, "PATH": "/usr/bin"}, check=True
    )
    assert json.loads(done.stdout)["tokens"] == 2


@pytest.mark.skipif(not compiler.isas() or not shutil.which("objdump"), reason="needs a C++ compiler and objdump")
def test_native_kernels_come_with_their_assembly(tmp_path: Path) -> None:
    library = compiler.build('extern "C" __attribute__((visibility("default"))) int seven() { return 7; }', "avx2")
    name = "kernels/layer_0.avx2"
    dump = Dump(tmp_path)
    emitted = Emitted(Plan([], [], [], {}, None, None), {f"{name}.so": library})
    pipeline.run(
        parse_module("func @main(%x: tensor<2xf32>) -> (tensor<2xf32>) {\n  return %x\n}\n"), instruments=[dump]
    )
    dump.emitted(emitted)
    text = (dump.folder / f"{name}.s").read_text()
    assert "<seven>:" in text and "$0x7" in text and "ret" in text


@pytest.mark.slow
def test_gpu_kernels_come_with_what_triton_made_of_them(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    sparsec.compile(Layer().bfloat16(), (torch.randn(5, 32).bfloat16(),), target="cuda:sm_90", dump=tmp_path)
    run = tmp_path / "model-0001"
    manifest = json.loads((run / "manifest.json").read_text())
    assert all(name.endswith(".py") for name in manifest["kernels"])
    images = sorted((run / "kernels").glob("*.cubin"))
    assert images
    for image in images:
        assert "tt.func" in image.with_suffix(".ttir").read_text()
        assert "ttg." in image.with_suffix(".ttgir").read_text()
        assert ".target sm_90" in image.with_suffix(".ptx").read_text()
    if not torch.cuda.is_available():
        with pytest.raises(sparsec.SparsecError, match=r"compiled for cuda:sm_90, and this machine has no GPU"):
            list(bench(run))


def test_a_failing_run_has_its_page(tmp_path: Path) -> None:
    dump = Dump(tmp_path, kernels=True)
    module = parse_module("func @main(%x: tensor<2xf32>) -> (tensor<2xf32>) {\n  return %x\n}\n")
    dump.start(module, [])
    assert dump.fail("// why\n") == dump.folder / "crash.sparsec"
    assert (dump.folder / "index.html").is_file()


def test_diffs_of_long_texts() -> None:
    lines = [f"%x{i} = op.a(%x{i - 1})" for i in range(3000)]
    changed = [line.replace("op.a", "op.b") if i % 500 == 0 else line for i, line in enumerate(lines)]
    said = diff("\n".join(lines), "\n".join([*changed[:100], "new", *changed[101:]])).splitlines()
    assert [line for line in said if line[0] == "+"][1:4] == ["+%x0 = op.b(%x-1)", "+new", "+%x500 = op.b(%x499)"]
    assert said[2] == "@@ -1,4 +1,4 @@" and sum(line.startswith("@@") for line in said) == 7
