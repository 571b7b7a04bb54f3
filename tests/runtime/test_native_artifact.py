"""Artifacts with native code: run where they were compiled, elsewhere by leave, and never damaged."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sparsec
from sparsec.codegen.artifact import write_artifact
from sparsec.codegen.cpu import compiler
from sparsec.codegen.emit import Emitted
from sparsec.runtime import code_cache, isa
from sparsec.runtime.artifact import digest_line, load, open_artifact
from sparsec.runtime.errors import ArtifactError
from sparsec.runtime.plan import Arg, Launch, Output, Plan
from sparsec.runtime.plan import Tensor as Type
from tests.codegen.cpu import scaler

pytestmark = pytest.mark.skipif(
    not set(compiler.isas()) & set(isa.processor()), reason="nothing here compiles native code that runs here"
)
LEAF = {"kind": "leaf", "index": 0}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(code_cache, "_made", set[str]())
    return tmp_path / "cache"


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(scaler.WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def artifact(tmp_path: Path, weight: Tensor) -> Path:
    """x -> (x * w, the kernel's team), by a native kernel, or by PyTorch with no team."""
    made = compiler.build_all(scaler.source())
    files = {f"kernels/scaler.{name}.so": content for name, content in made.items()}
    kernel = scaler.kernel({name: f"kernels/scaler.{name}.so" for name in made})
    plan = Plan(
        args=[
            Arg("x", 0, "input", Type(("s0", scaler.WIDTH), "f32")),
            Arg("w", 1, "param", Type((scaler.WIDTH,), "f32"), "w"),
        ],
        steps=[Launch("scaler", [0, 1, None], [2, 3])],
        outputs=[Output("output", 2, ""), Output("output", 3, "")],
        kernels={"scaler": kernel},
        inputs={"args": {"kind": "tuple", "items": [LEAF]}, "kwargs": {"kind": "dict", "keys": [], "items": []}},
        structure={"kind": "tuple", "items": [LEAF, {"kind": "leaf", "index": 1}]},
    )
    return write_artifact(tmp_path / "scaler", Emitted(plan, files), {"w": weight}, target="cpu")


def forget(cache: Path) -> None:
    """As if another user had compiled what there is."""
    shutil.rmtree(cache)
    code_cache._made.clear()


def test_native_code_runs_where_it_was_compiled(artifact: Path, weight: Tensor) -> None:
    code_cache._made.clear()  # another process of the same user
    x = torch.randn(5, scaler.WIDTH)
    y, team = sparsec.load(artifact)(x)
    torch.testing.assert_close(y, x * weight, rtol=0, atol=0)
    assert team.item() == torch.get_num_threads()
    (choice,) = open_artifact(artifact).paths().values()
    assert choice.isa in isa.processor()


def test_elsewhere_it_runs_by_leave_only(
    artifact: Path, weight: Tensor, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forget(cache)
    x = torch.randn(5, scaler.WIDTH)
    model = sparsec.load(artifact)
    y, team = model(x)
    torch.testing.assert_close(y, x * weight, rtol=0, atol=0)
    assert team.item() == 0
    assert "not compiled here" in model.program.paths["scaler"].why
    assert [record.message for record in caplog.records] == [f"experts run on {model.program.paths['scaler']}"]
    y, team = sparsec.load(artifact, trust_code=True)(x)
    torch.testing.assert_close(y, x * weight, rtol=0, atol=0)
    assert team.item() == torch.get_num_threads()
    assert not list(cache.glob("*.so"))  # leave is given for the call, not for good
    (before,), (after,) = open_artifact(artifact).paths().values(), open_artifact(artifact).paths(True).values()
    assert before.isa is None
    assert after.isa in isa.processor()


@pytest.mark.parametrize("trust_code", [False, True])
@pytest.mark.parametrize("verify", [False, True])
def test_a_library_that_was_replaced_is_refused(artifact: Path, trust_code: bool, verify: bool) -> None:
    other = compiler.build_all(scaler.source(extra="1"))
    for name, content in other.items():
        place = artifact / f"kernels/scaler.{name}.so"
        size = place.stat().st_size
        place.write_bytes(content[:size].ljust(size, b"\0"))
    with pytest.raises(ArtifactError, match=r"is damaged: 'kernels/scaler\..*\.so' is not what was written"):
        load(artifact, verify=verify, trust_code=trust_code)


def test_a_library_that_was_replaced_with_its_hash_is_not_trusted(artifact: Path, weight: Tensor) -> None:
    """Whoever writes the artifact can write its hashes as well; the user's own record is beyond him."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        if name.endswith(".so"):
            content = (artifact / name).read_bytes() + b"\0"
            (artifact / name).write_bytes(content)
            entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    raw = json.dumps(manifest).encode()
    (artifact / "manifest.json").write_bytes(raw)
    (artifact / "manifest.sha256").write_bytes(digest_line(raw))
    x = torch.randn(5, scaler.WIDTH)
    y, team = sparsec.load(artifact)(x)
    torch.testing.assert_close(y, x * weight, rtol=0, atol=0)
    assert team.item() == 0


def test_two_models_in_two_threads(artifact: Path, weight: Tensor) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def work(seed: int) -> bool:
        model, generator = sparsec.load(artifact), torch.Generator().manual_seed(seed)
        inputs = [torch.randn(tokens, scaler.WIDTH, generator=generator) for tokens in range(40)]
        return all(torch.equal(model(x)[0], x * weight) for x in inputs)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(2)))
