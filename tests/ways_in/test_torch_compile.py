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
from tests.zoo import handwritten_others
from tests.zoo.handwritten import FORMS

assert sparsec.hf.NAME == "sparsec" and handwritten_others


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
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "sparsec"])
def test_one_graph_for_every_token_count(family: str, implementation: str, graphs: list[int]) -> None:
    model = tiny.model(family)  # transformers' own default is grouped_mm
    expected = {shape: model(tiny.ids(*shape), use_cache=False).logits for shape in ((2, 12), (3, 5), (1, 9), (4, 33))}
    model.set_experts_implementation(implementation)
    compiled = torch.compile(model, backend="sparsec", fullgraph=True, dynamic=True, options={"dense": "aten"})
    with torch.no_grad():
        for shape, logits in expected.items():
            assert relative(compiled(tiny.ids(*shape), use_cache=False).logits, logits) < 1e-5
    # The batch of one has a graph of its own, as everywhere in torch.compile; all others share one.
    assert graphs[0] == 2 and len(graphs) <= 2


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
    assert graphs == [1]


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
    assert graphs == [2]


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


@pytest.mark.parametrize("form", ["MaskedSum", "StackThenGather", "WeightsOfEachToken", "BmmOfEachPair"])
def test_a_layer_written_by_hand(form: str, graphs: list[int]) -> None:
    layer = hand_written(form)
    compiled = torch.compile(layer, backend="sparsec", fullgraph=True, dynamic=True, options={"dense": "aten"})
    with torch.no_grad():
        for rows in (12, 5, 1):
            x = rows_of(layer, rows)
            assert relative(compiled(x), layer(x)) < 1e-5
    assert graphs == [1, 1]  # one token has a graph of its own


def test_a_loop_over_places(graphs: list[int]) -> None:
    """`torch.where(ids == e)`: one graph once Dynamo is told to go on behind shapes that depend on data."""
    layer = hand_written("OldMixtral")
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(layer, backend="sparsec", fullgraph=True, dynamic=True, options={"dense": "aten"})
        for rows in (12, 6):
            x = rows_of(layer, rows)
            assert relative(compiled(x), layer(x)) < 1e-5
    assert graphs == [1]


class _Broken(torch.nn.Module):
    """Two layers with something between them that Dynamo cannot trace; the second graph takes and returns sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = hand_written("MaskedSum"), hand_written("MaskedSum")

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        rows = 2 * x.shape[-2]
        y = self.first(x)
        torch._dynamo.graph_break()
        return self.second(y), rows


def test_graphs_on_both_sides_of_a_break(graphs: list[int]) -> None:
    model = _Broken().eval()
    compiled = torch.compile(model, backend="sparsec", dynamic=True, options={"dense": "aten"})
    with torch.no_grad():
        for rows in (12, 6):
            x = rows_of(model.first, rows)
            (y, doubled), (expected, _) = compiled(x), model(x)
            assert relative(y, expected) < 1e-5 and doubled == 2 * rows
    assert graphs == [1, 1]


def test_gradients_are_those_of_pytorch(graphs: list[int]) -> None:
    layer = hand_written("MaskedSum")
    compiled = torch.compile(layer, backend="sparsec", options={"dense": "aten"})
    x = rows_of(layer, 8)
    layer(x).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    compiled(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert expected[name] is not None and relative(parameter.grad, expected[name]) < 1e-5
    assert graphs == []
    with torch.no_grad():
        assert relative(compiled(x), layer(x)) < 1e-5
        for parameter in layer.parameters():
            parameter.sub_(0.1 * parameter.grad)
        assert relative(compiled(x), layer(x)) < 1e-5
    assert graphs == [1]


def test_what_is_not_raised_is_said(graphs: list[int]) -> None:
    layer = hand_written("ThreeLayers")
    compiled = torch.compile(layer, backend="sparsec", dynamic=True, options={"dense": "aten"})
    x = rows_of(layer, 8)
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        with pytest.warns(UserWarning, match=r"leaves a part .*\n.*handwritten.py:\d+: warning: a router"):
            y = compiled(x)
        assert relative(y, layer(x)) < 1e-5
    assert graphs == [0]


def hand_written(form: str) -> Any:
    """A random layer of `tests.zoo`."""
    torch.manual_seed(0)
    layer = FORMS[form]()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.2)
    return layer.eval()


def rows_of(layer: Any, rows: int) -> torch.Tensor:
    """An input of so many tokens, always the same."""
    shape = (rows, layer.width) if layer.rank == 2 else (1, rows, layer.width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(rows))


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
