"""Weights that are computed of a model's own: once, when an artifact is written or a graph first runs."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsec
from sparsec import cli
from sparsec.inspect.check import relative
from sparsec.inspect.info import info
from sparsec.ir.derived import derivations
from sparsec.ir.interp import DerivedWeights
from sparsec.ir.mlir import print_generic
from sparsec.ir.parser import parse_module
from sparsec.ir.verify import verify_module
from sparsec.runtime import live_weights
from sparsec.runtime.artifact import open_artifact
from sparsec.runtime.errors import ArtifactError
from tests.ways_in import modules

X = torch.randn(9, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of weights made for graphs of torch.compile."""
    torch._dynamo.reset()
    live_weights.forget()
    names: list[str] = []
    fresh = live_weights.LiveWeight._fresh

    def counted(self: Any, parts: Any) -> Any:
        names.append(self.name)
        return fresh(self, parts)

    monkeypatch.setattr(live_weights.LiveWeight, "_fresh", counted)
    return names


def test_equal_layers_share_their_functions() -> None:
    model = modules.stack(layers=3)
    compiled = sparsec.compile(model, (X,))
    raised = compiled.result.ir("raise")
    assert [name for name in raised.funcs if name != "main"] == ["derive_0", "derive_1"]
    kinds = [attrs["kind"] for attrs in raised.main.arg_attrs.values()]
    assert kinds.count("derived") == 6 and kinds.count("param") == 3  # the routers' are left
    assert not any(op.name in ("aten.stack", "aten.cat") for op in raised.main.body.ops)
    assert relative(compiled(X), model(X)) < 1e-5


def test_an_artifact_holds_what_is_read(tmp_path: Path) -> None:
    model = modules.stack()
    compiled = sparsec.compile(model, (X,))
    path = compiled.save(tmp_path / "model")
    names = set(open_artifact(path).weights)
    assert names == {
        *(f"layers.{i}.router.weight" for i in range(2)),
        *(f"derived/layers.{i}.experts.*.*.weight.tiles" for i in range(2)),
        *(f"derived/layers.{i}.experts.*.down.weight.tiles" for i in range(2)),
    }
    assert torch.equal(sparsec.load(path)(X), compiled(X))
    banks = sum(parameter.numel() for name, parameter in model.named_parameters() if "experts" in name)
    found = info(path)
    assert found.total == sum(parameter.numel() for parameter in model.parameters())
    assert found.active == found.total - banks // 2


def test_one_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With small shards, what is derived for one layer is gone before the next one is made."""
    from sparsec.codegen.artifact import write_artifact

    compiled = sparsec.compile(modules.stack(layers=4), (X,))
    get, alive, most = DerivedWeights.__getitem__, list[Any](), 0

    def watched(self: DerivedWeights, source: str) -> torch.Tensor:
        nonlocal most
        tensor = get(self, source)
        if source in self.made:
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(DerivedWeights, "__getitem__", watched)
    write_artifact(tmp_path / "model", compiled.emitted, compiled.weights, target="cpu", shard=1)
    assert len(alive) == 8 and most <= 2


def test_on_from_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = sparsec.compile(modules.stack(), (X,))
    path = compiled.save(tmp_path / "model")
    for phase in ("capture", "raise", "lower"):
        text = tmp_path / f"{phase}.sparsec"
        text.write_text(compiled.ir(phase))
        output = tmp_path / f"{phase}-again.sparsec"
        arguments = ["sparsec", "compile", str(text), "--weights", str(path), "-o", str(output), "--json"]
        monkeypatch.setattr(sys, "argv", arguments)
        cli.main()
        assert torch.equal(sparsec.load(output)(X), compiled(X))


def test_texts_round_trip() -> None:
    module = sparsec.compile(modules.stack(), (X,)).result.ir("lower")
    assert len(derivations(module)) == 4
    generic = print_generic(module)
    assert print_generic(parse_module(generic)) == generic


def test_on_the_meta_device(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = modules.stack()
    compiled = sparsec.compile(model, (X.to("meta"),))
    assert all(compiled.weights[name].is_meta for name in compiled.weights)
    with pytest.raises(ArtifactError, match="on the meta device"):
        compiled.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('function = "derive_0"', 'function = "derive_9"', "derived by @derive_9, which is no function"),
        ('function = "derive_0"', 'function = "main"', "derived by @main, which is no function"),
        ('of = ["a", "b"]', 'of = ["a"]', "computed of 1 weights, @derive_0 takes 2"),
        ('of = ["a", "b"]', "of = 3", "does not say what it is computed `of`"),
        ("%w: tensor<2x4xf32>", "%w: tensor<2x5xf32>", "@derive_0 returns \\(tensor<2x4xf32>\\)"),
    ],
)
def test_what_does_not_fit_is_said(old: str, new: str, message: str) -> None:
    text = """
        module {phase = "raise"}
        func @main(%w: tensor<2x4xf32> {kind = "derived", source = "w", function = "derive_0", of = ["a", "b"]})
            -> (tensor<2x4xf32> {kind = "output"}) {
          return %w
        }
        func @derive_0(%a: tensor<4xf32>, %b: tensor<4xf32>) -> (tensor<2x4xf32>) {role = "derive"} {
          %s = aten.stack([%a, %b]) : tensor<2x4xf32>
          return %s
        }
    """
    verify_module(parse_module(text))
    changed = text.replace(old, new)
    if "2x5" in new:
        changed = changed.replace("-> (tensor<2x4xf32> {kind", "-> (tensor<2x5xf32> {kind")
    with pytest.raises(sparsec.CompileError, match=message):
        verify_module(parse_module(changed))


def test_torch_compile_makes_each_once(made: list[str]) -> None:
    model = modules.stack()
    compiled = torch.compile(model, backend="sparsec", fullgraph=True, dynamic=True, options={"dense": "aten"})
    with torch.no_grad():
        for rows in (9, 5, 9, 2):
            assert relative(compiled(X[:rows]), model(X[:rows])) < 1e-5
    assert len(made) == 4 and len(set(made)) == 2  # two banks in each of two layers, by two functions
    with torch.inference_mode():
        assert relative(compiled(X), model(X)) < 1e-5
        assert compiled(X[:1]).shape == (1, 16)  # a graph of its own, the same weights
    assert len(made) == 4


def test_torch_compile_notices_a_change(made: list[str]) -> None:
    model = modules.stack()
    compiled = torch.compile(model, backend="sparsec", fullgraph=True, options={"dense": "aten"})
    with torch.no_grad():
        before = compiled(X)
        model.layers[0].experts[1].down.weight.mul_(3.0)
        after = compiled(X)
        assert relative(after, model(X)) < 1e-5 and relative(after, before) > 1e-3
        model.layers[1].experts[0].up.weight.data = torch.randn(24, 16)
        assert relative(compiled(X), model(X)) < 1e-5
    assert len(made) == 6


def test_torch_compile_lets_go(made: list[str]) -> None:
    model: Any = modules.stack()
    compiled: Any = torch.compile(model, backend="sparsec", fullgraph=True, options={"dense": "aten"})
    with torch.no_grad():
        compiled(X)
    assert len(live_weights._made) == 4
    del model, compiled
    torch._dynamo.reset()
    gc.collect()
    assert not live_weights._made


def test_a_view_of_a_weight_does_not_keep_it_alive() -> None:
    live_weights.forget()
    weight = live_weights.LiveWeight("turned", lambda parts: parts[0].transpose(0, 1)[1:])
    part = torch.randn(3, 4)
    for _ in range(2):
        assert torch.equal(weight([part]), part.t()[1:])
    assert weight([part]).untyped_storage().data_ptr() == part.untyped_storage().data_ptr()
    del part
    gc.collect()
    assert not live_weights._made


def test_parts_made_in_inference_mode_are_never_kept() -> None:
    live_weights.forget()
    weight = live_weights.LiveWeight("stacked", lambda parts: torch.stack(list(parts)))
    with torch.inference_mode():
        parts = [torch.zeros(3), torch.zeros(3)]
    assert weight(parts).sum() == 0
    with torch.inference_mode():
        parts[1].add_(1)
    assert weight(parts).sum() == 3
    assert not live_weights._made
