"""`set_experts_implementation("sparsec")`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sparsec.diagnostics import CompileError
from sparsec.frontend import experts_hook
from sparsec.frontend.capture import capture
from sparsec.frontend.experts_op import TARGET
from tests.frontend.helpers import logits, mixtral, outputs, relative_error, token_ids, zoo_model
from tests.zoo.families import build


@pytest.fixture
def model() -> Any:
    found = mixtral()
    experts_hook.register()
    return found


def test_it_runs_eagerly(model: Any) -> None:
    ids = token_ids(2, 6)
    expected = logits(model, ids)
    model.set_experts_implementation("sparsec")
    with torch.no_grad():
        assert relative_error(model(input_ids=ids).logits, expected) < 1e-6


def test_it_is_one_operator_per_layer_under_torch_compile(model: Any) -> None:
    ids = token_ids(2, 6)
    expected = logits(model, ids)
    model.set_experts_implementation("sparsec")
    graphs = list[torch.fx.GraphModule]()

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(model, backend=backend, fullgraph=True)(input_ids=ids, use_cache=False).logits
    assert relative_error(found, expected) < 1e-6
    (graph,) = graphs
    called = [node.target for node in graph.graph.nodes]
    assert sum(target in (TARGET, TARGET.overloadpacket) for target in called) == 2


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "beam"])
def test_other_layouts_and_activations(family: str) -> None:
    experts_hook.register()
    model, inputs = zoo_model(family)
    expected = logits(model, inputs["input_ids"])
    model.set_experts_implementation("sparsec")
    with torch.no_grad():
        assert relative_error(model(**inputs, use_cache=False).logits, expected) < 1e-6


def bank(model: Any) -> Any:
    return model.model.layers[0].mlp.experts


def test_a_norm_after_each_expert_is_its_tail() -> None:
    model, inputs = build("muse_spark")
    model.set_experts_implementation("eager")
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).last_hidden_state
    captured = capture(model, (inputs["input_ids"],))
    for op in (found := [op for op in captured.module.walk() if op.name == "moe.experts"]):
        assert [len(region.args) for region in op.regions] == [2, 2]  # gate and up; rows and the norm's weight
    assert len(found) == 2
    assert relative_error(outputs(captured, inputs["input_ids"])[0], expected) < 1e-6


def test_a_norm_over_several_rows_is_refused(model: Any) -> None:
    class Centred(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(0, keepdim=True)

    bank(model).has_post_expert_norm, bank(model).post_expert_norm = True, Centred()
    with pytest.raises(CompileError, match="mixes rows"):
        experts_hook.regions_of(bank(model), torch.float32)


def test_an_activation_over_columns_is_refused(model: Any) -> None:
    class Softmaxed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.shape[0]

    bank(model).act_fn = Softmaxed()
    with pytest.raises(CompileError, match="number of rows"):
        experts_hook.regions_of(bank(model), torch.float32)
