"""`torch.compile(model, backend="sparsec")`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import sparsec.hf
from sparsec import backend
from sparsec.diagnostics import SparsecError
from sparsec.inspect.check import relative
from tests.ways_in import tiny

assert sparsec.hf.NAME == "sparsec"


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many launches of kernels each compiled graph has."""
    torch._dynamo.reset()
    seen: list[int] = []
    fuse = backend.fuse

    def counted(*args: Any) -> Any:
        fused = fuse(*args)
        nodes = fused.graph.graph.nodes if fused is not None else ()
        seen.append(sum(node.target is torch.ops.sparsec.launch.default for node in nodes))
        return fused

    monkeypatch.setattr(backend, "fuse", counted)
    return seen


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_one_graph_for_every_token_count(family: str, graphs: list[int]) -> None:
    model = tiny.model(family)
    expected = {shape: model(tiny.ids(*shape), use_cache=False).logits for shape in ((2, 12), (3, 5), (1, 9), (4, 33))}
    model.set_experts_implementation("sparsec")
    compiled = torch.compile(model, backend="sparsec", fullgraph=True, dynamic=True, options={"dense": "aten"})
    with torch.no_grad():
        for shape, logits in expected.items():
            assert relative(compiled(tiny.ids(*shape), use_cache=False).logits, logits) < 1e-5
    # The batch of one has a graph of its own, as everywhere in torch.compile; all others share one.
    assert graphs[0] == 6 and len(graphs) <= 2


def test_dense_rest_by_inductor(graphs: list[int]) -> None:
    model = tiny.model("olmoe").model.layers[0].mlp
    model.config = model.experts.config
    model.config._experts_implementation = "eager"
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = model(x)
        model.config._experts_implementation = "sparsec"
        compiled = torch.compile(model, backend="sparsec", fullgraph=True, dynamic=True)
        assert relative(_first(compiled(x)), _first(expected)) < 1e-5
    assert graphs == [3]


def test_a_changed_weight_is_noticed(graphs: list[int]) -> None:
    model = tiny.model("mixtral")
    model.set_experts_implementation("sparsec")
    compiled = torch.compile(model, backend="sparsec", fullgraph=True, options={"dense": "aten"})
    with torch.no_grad():
        before = compiled(tiny.ids(2, 6), use_cache=False).logits
        model.model.layers[0].mlp.experts.down_proj.mul_(3.0)
        after = compiled(tiny.ids(2, 6), use_cache=False).logits
        assert relative(after, model(tiny.ids(2, 6), use_cache=False).logits) < 1e-5
    assert relative(after, before) > 1e-3
    assert graphs == [6]


def test_a_dense_graph_passes_through(graphs: list[int]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    compiled = torch.compile(model, backend="sparsec", options={"dense": "aten"})
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    assert graphs == [0]


def test_an_unknown_option_is_named() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(torch.nn.Linear(2, 2), backend="sparsec", options={"dence": "aten"})
    with pytest.raises(Exception, match="dence") as caught:
        compiled(torch.zeros(1, 2))
    assert isinstance(caught.value.__cause__, SparsecError) or "takes options" in str(caught.value)


def test_experts_implementation_without_compiling() -> None:
    model = tiny.model("mixtral")
    with torch.no_grad():
        expected = model(tiny.ids(2, 9)).logits
        model.set_experts_implementation("sparsec")
        assert relative(model(tiny.ids(2, 9)).logits, expected) < 1e-5


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
