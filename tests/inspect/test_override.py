"""SPARSEC_OVERRIDE_DIR: what is edited in a dump is what the compiler uses."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsec
from sparsec.codegen.cpu import compiler
from sparsec.diagnostics import CompileError, SparsecError
from sparsec.inspect.override import Override
from tests.inspect.test_dump_ways import Layer


@pytest.fixture(autouse=True)
def _no_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEC_CXX", "/nonexistent")


@pytest.fixture(scope="module")
def model() -> Layer:
    torch.manual_seed(0)
    return Layer()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(5, 32)


@pytest.fixture(scope="module")
def dumped(model: Layer, x: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEC_CXX", "/nonexistent")
        sparsec.compile(model, (x,), dump=(folder := tmp_path_factory.mktemp("dump")))
    return folder / "model-0001"


@pytest.fixture
def run(dumped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run that may be edited, and is the override."""
    shutil.copytree(dumped, folder := tmp_path / "run")
    monkeypatch.setenv("SPARSEC_OVERRIDE_DIR", str(folder))
    return folder


def edit(run: Path, pattern: str, change: Callable[[str], str]) -> Path:
    (path,) = run.glob(pattern)
    path.write_text(change(path.read_text()))
    return path


def silu_to_relu(text: str) -> str:
    assert "aten.silu" in text
    return text.replace("aten.silu", "aten.relu")


def as_relu(model: Layer, x: Tensor) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "silu", torch.nn.functional.relu)
        return model(x)


def test_what_is_not_edited_changes_nothing(run: Path, model: Layer, x: Tensor) -> None:
    compiled = sparsec.compile(model, (x,))
    assert not any("override" in rule for record in compiled.result.records for rule in record.counts)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("pattern", ["00-capture.sparsec", "*-fuse-layer.sparsec", "*-lower-kernels.sparsec"])
def test_an_edited_text_is_used(
    run: Path, model: Layer, x: Tensor, pattern: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Texts of later passes lie in the folder too: only the edited one counts, and later passes run on it."""
    path = edit(run, pattern, silu_to_relu)
    with caplog.at_level(logging.WARNING, "sparsec"):
        compiled = sparsec.compile(model, (x,))
    torch.testing.assert_close(compiled(x), as_relu(model, x))
    assert "aten.relu" in compiled.ir("lower") and "aten.silu" not in compiled.ir("lower")
    assert [message for message in caplog.messages if f"{path} takes the place" in message]


def test_a_text_that_is_edited_in_words_only_is_not_taken(run: Path, model: Layer, x: Tensor) -> None:
    edit(run, "*-fuse-layer.sparsec", lambda text: "// my notes\n" + text)
    compiled = sparsec.compile(model, (x,))
    assert not any("override" in rule for record in compiled.result.records for rule in record.counts)


def test_a_folder_without_a_manifest(run: Path, model: Layer, x: Tensor) -> None:
    """Every file of it counts."""
    edit(run, "*-fuse-layer.sparsec", silu_to_relu)
    shutil.rmtree(run / "kernels")
    for path in run.iterdir():
        if path.is_file() and "fuse-layer" not in path.name:
            path.unlink()
    torch.testing.assert_close(sparsec.compile(model, (x,))(x), as_relu(model, x))


def test_the_dump_of_an_overridden_run_shows_the_edit(run: Path, model: Layer, x: Tensor, tmp_path: Path) -> None:
    path = edit(run, "*-fuse-layer.sparsec", silu_to_relu)
    sparsec.compile(model, (x,), dump=tmp_path / "again")
    assert "aten.relu" in (tmp_path / "again" / "model-0001" / path.name).read_text()


def test_torch_compile_takes_it_too(model: Layer, x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"dense": "aten", "dump": str(tmp_path)}
    with torch.no_grad():
        torch.compile(model, backend="sparsec", options=options)(x)
        edit(tmp_path / "graph-0001", "*-fuse-layer.sparsec", silu_to_relu)
        monkeypatch.setenv("SPARSEC_OVERRIDE_DIR", str(tmp_path / "graph-0001"))
        torch._dynamo.reset()
        y = torch.compile(model, backend="sparsec", options={"dense": "aten"})(x)
        torch.testing.assert_close(y, as_relu(model, x))


def test_errors_point_into_the_file(run: Path, model: Layer, x: Tensor) -> None:
    path = edit(run, "*-fuse-layer.sparsec", lambda text: text.replace("aten.silu(", "aten.silly("))
    line = next(i for i, line in enumerate(path.read_text().splitlines(), 1) if "silly" in line)
    with pytest.raises(CompileError, match=rf"{path}:{line}:\d+: error: unknown op 'aten.silly'"):
        sparsec.compile(model, (x,))
    path.write_text(path.read_text().replace("aten.silly(%", "aten.silu(%a, %"))
    with pytest.raises(CompileError, match=rf"takes at most 1(.|\n)*in the override {path}:{line}\b"):
        sparsec.compile(model, (x,))


def test_a_text_of_another_model_is_refused(run: Path, model: Layer) -> None:
    edit(run, "00-capture.sparsec", lambda text: text.replace("s0", "s7"))
    with pytest.raises(CompileError, match="is of another model: its inputs and results are"):
        sparsec.compile(model, (torch.randn(5, 2, 32),))


def test_a_text_that_no_pass_has_is_said(run: Path, model: Layer, x: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    (run / "03-no-such-pass.sparsec").write_text((run / "00-capture.sparsec").read_text())
    sparsec.compile(model, (x,))
    assert any("03-no-such-pass.sparsec is not used" in message for message in caplog.messages)


def test_a_folder_that_is_no_run(tmp_path: Path, model: Layer, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEC_OVERRIDE_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(SparsecError, match=r"holds nothing to override with(.|\n)*DIR/NAME-0001"):
        sparsec.compile(model, (x,))


def test_an_edited_kernel_is_compiled(run: Path, model: Layer, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[str]()

    def build(source: str) -> dict[str, bytes]:
        seen.append(source)
        return {}

    monkeypatch.setattr(compiler, "build_all", build)
    edit(run, "kernels/layer_0.cpp", lambda text: text + "// mine\n")
    emitted = sparsec.compile(model, (x,)).emitted
    assert seen[0].endswith("// mine\n") and emitted.files["kernels/layer_0.cpp"].endswith(b"// mine\n")


def test_an_edited_kernel_that_does_not_compile_is_an_error(run: Path, model: Layer, x: Tensor) -> None:
    """Else PyTorch would run the layer, as where the generated source cannot be compiled."""
    edit(run, "kernels/layer_0.cpp", lambda text: text + "mistake")
    with pytest.raises(CompileError, match="no C\\+\\+ compiler"):
        _ = sparsec.compile(model, (x,)).emitted


def test_sources_are_told_apart_by_name(run: Path) -> None:
    path = edit(run, "kernels/layer_0.cpp", lambda text: "new")
    override = Override(run)
    assert override.source("kernels/layer_0.cpp", "old") == "new"
    assert override.source("kernels/layer_1.cpp", "old") == "old"
    assert override.edited == {path}
