"""`sparsec tune` without a GPU: a timer that makes its figures up, and what it refuses."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from sparsec import cli
from sparsec.codegen.artifact import write_artifact
from sparsec.diagnostics import SparsecError
from sparsec.inspect.info import info
from sparsec.inspect.tune import tune
from sparsec.ir.core import Func
from sparsec.ir.printer import print_module
from sparsec.runtime.artifact import open_artifact
from sparsec.runtime.plan import Kernel
from tests.codegen.triton import small

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer sizes and families than there are: every one of them is compiled."""
    monkeypatch.setattr("sparsec.inspect.tune.BUCKETS", (1, 64, 4096))
    monkeypatch.setattr("sparsec.inspect.tune.FAMILIES_TRIED", 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact for an H100, as it comes out of the compiler."""
    place, text = tmp_path_factory.mktemp("tune") / "layer.sparsec", print_module(small.lowered("cuda:sm_90"))
    return write_artifact(place, small.emitted("cuda:sm_90"), small.weights(), target="cuda:sm_90", text=text)


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(made, tmp_path / "layer.sparsec"))


class Fake:
    """A GPU on which what the model chose is slow; each timing takes a second by its clock."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, set[tuple[str, int]]()

    def timer(self, func: Func, kernel: Kernel, files: Mapping[str, bytes], tokens: int) -> float:
        self.seconds += 1
        (variant,) = kernel.variants
        assert variant.up_to is None and all(launch["file"] in files for launch in variant.config["launches"])
        first = (kernel.name, tokens) not in self.calls
        self.calls.add((kernel.name, tokens))
        return 2.0 if first else 1.0

    def clock(self) -> float:
        return self.seconds


def test_what_is_measured_faster_is_written(artifact: Path) -> None:
    fake, before = Fake(), open_artifact(artifact)
    changes = tune(artifact, 10_000, fake.timer, fake.clock)
    assert {tokens for _, tokens in fake.calls} == {1, 64, 4096}
    after = open_artifact(artifact)  # compares every hash
    for name in ("up", "down"):
        assert torch.equal(after.weights[name], before.weights[name])
    for kernel in after.plan.kernels.values():
        if "gemm" in kernel.name:
            choices = [variant.config["choice"] for variant in kernel.variants]
            assert all(choice["measured_us"] == 1.0 and choice["predicted_us"] > 1 for choice in choices)
            assert kernel.variants[-1].up_to is None
            for variant in kernel.variants:
                assert all(after.read(launch["file"]) for launch in variant.config["launches"])
    assert all(c.after != c.before and (c.before_us, c.after_us) == (2.0, 1.0) for c in changes)
    assert changes[-1].up_to is None
    assert all(row.measured_us == 1.0 for row in info(artifact).scheduled)
    assert not [name for name in after.manifest["files"] if name not in before.manifest["files"] and "weights" in name]


def test_time_that_is_up_leaves_the_rest_as_it_was(artifact: Path) -> None:
    fake, before = Fake(), open_artifact(artifact).plan
    changes = tune(artifact, 5, fake.timer, fake.clock)
    assert 2 <= len(fake.calls) < 6
    after = open_artifact(artifact).plan
    assert {c.kernel for c in changes} == {name for name in before.kernels if "gemm" in name}
    unmeasured = [change for change in changes if change.after_us is None]
    assert unmeasured and all(change.before == change.after for change in unmeasured)
    assert after.kernels.keys() == before.kernels.keys()


def test_an_error_leaves_the_artifact_as_it_was(artifact: Path) -> None:
    def broken(func: Func, kernel: Kernel, files: Mapping[str, bytes], tokens: int) -> float:
        raise SparsecError("the GPU fell off")

    before = (artifact / "manifest.json").read_bytes()
    with pytest.raises(SparsecError, match="fell off"):
        tune(artifact, 10, broken)
    assert (artifact / "manifest.json").read_bytes() == before
    assert [path.name for path in artifact.parent.iterdir()] == [artifact.name]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sparsec", "tune", str(artifact), "--seconds", "5"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "a program for cuda:sm_90 cannot run here: this machine has no GPU" in capfd.readouterr().err
