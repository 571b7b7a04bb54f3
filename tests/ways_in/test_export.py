"""`sparsec export`, and the way back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsec import cli
from sparsec.ir.equal import equal
from sparsec.ir.parser import parse_module
from tests.ir.modules import LAYER


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "layer.sparsec"
    path.write_text(LAYER)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *args: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["sparsec", *map(str, args)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_mlir_and_back(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "layer.mlir"
    assert run(monkeypatch, "export", text, "--mlir", "-o", out) == 0
    assert equal(parse_module(out.read_text()), parse_module(LAYER))
    assert "irdl.operation @experts" in (tmp_path / "layer.irdl.mlir").read_text()
    capsys.readouterr()
    assert run(monkeypatch, "opt", out, "--passes", "dce") == 0
    assert equal(parse_module(capsys.readouterr().out), parse_module(LAYER))
    assert run(monkeypatch, "compile", out, "--to", "fuse", "-o", tmp_path / "fused.sparsec") == 0
    assert "moe.layer" in (tmp_path / "fused.sparsec").read_text()


@pytest.mark.mlir
def test_files_on_disk_verify_together(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ir = pytest.importorskip("torch_mlir.ir")
    irdl: Any = pytest.importorskip("torch_mlir.dialects.irdl")
    out = tmp_path / "layer.mlir"
    assert run(monkeypatch, "export", text, "--phase", "lower", "-o", out) == 0
    with ir.Context() as context, ir.Location.unknown():
        context.allow_unregistered_dialects = True
        irdl.load_dialects(ir.Module.parse((tmp_path / "layer.irdl.mlir").read_text()))
        module = ir.Module.parse(out.read_text())
        assert module.operation.verify()
        assert '"kernel.launch"' in str(module)


def test_standard_output(text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "export", text, "-o", "-") == 0
    assert equal(parse_module(capsys.readouterr().out), parse_module(LAYER))
    assert run(monkeypatch, "export", text, "--to", "irdl", "-o", "-") == 0
    assert "irdl.dialect @moe {" in capsys.readouterr().out


@pytest.mark.mlir
def test_linalg(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch_mlir.fx")
    out = tmp_path / "layer.linalg.mlir"
    args = ("export", text, "--to", "linalg", "--layer", "mlp", "--tokens", 3, "--check", "--json", "-o", out)
    assert run(monkeypatch, *args) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)["results"]}
    assert list(found) == ["y", "ids", "weights"]
    assert found["y"]["error"] < 1e-6 and found["ids"]["differing"] == 0 and found["y"]["values"] == 18
    assert "%arg2: up, tensor<4x10x6xf32>" in out.read_text()
    assert "linalg.batch_matmul" in out.read_text()


WRONG: dict[tuple[str, ...], tuple[int, str]] = {
    ("--layer", "a"): (2, "go with --to linalg"),
    ("--to", "linalg", "--layer", "nowhere"): (1, "no layer is named 'nowhere' (there are: mlp.experts)"),
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_options(
    options: tuple[str, ...],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, message = WRONG[options]
    assert run(monkeypatch, "export", text, *options, "-o", tmp_path / "a.mlir") == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a.mlir").exists()


def test_without_torch_mlir(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch_mlir", None)
    assert run(monkeypatch, "export", text, "--to", "linalg", "-o", tmp_path / "a.mlir") == 1
    assert "torch-mlir is not installed\n  hint: pip install 'sparsec[mlir]'" in capsys.readouterr().err
