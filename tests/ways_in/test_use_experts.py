"""`sparsec.use_experts`: models that run their experts by sparsec in eager mode and under torch.compile."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsec
from sparsec.frontend.capture import EXPERTS, configs_of
from tests.frontend.helpers import relative_error
from tests.frontend.test_adapters import Bank, H, Layer, adapter, registered
from tests.zoo.families import build


def run(model: Any, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**given, use_cache=False)
    return out.logits if hasattr(out, "logits") else out[0]


def test_a_layer_that_cannot_be_traced_goes_through_torch_compile() -> None:
    layer, x = Layer().eval(), torch.randn(9, H)
    with torch.no_grad():
        expected = layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="sparsec", fullgraph=True, options={"dense": "aten"})

    def named(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return sparsec.ops.experts(
            x, ids, weights, module.ups, module.downs, gate=module.gates,
            activation=sparsec.ops.glu(torch.nn.functional.silu),
        )  # fmt: skip

    with registered(Bank, named), sparsec.use_experts(layer), torch.no_grad():
        assert relative_error(layer(x), expected) < 1e-5
        assert relative_error(compiled(x), expected) < 1e-5
        assert relative_error(copy.deepcopy(layer)(x), expected) < 1e-5


def test_everything_is_as_before_afterwards() -> None:
    layer = Layer()
    with registered(Bank, adapter):
        used = sparsec.use_experts(layer)
        assert layer.bank.forward.__func__ is adapter
        used.restore()
        used.restore()
    assert layer.bank.forward.__func__ is Bank.forward


def test_transformers_interface_is_set_and_put_back() -> None:
    model, given = build("mixtral")
    expected = run(model, given)
    before = [getattr(config, EXPERTS) for config in configs_of(model)]
    with sparsec.use_experts(model):
        assert {getattr(config, EXPERTS) for config in configs_of(model)} == {"sparsec"}
        assert relative_error(run(model, given), expected) < 1e-5
    assert [getattr(config, EXPERTS) for config in configs_of(model)] == before


@pytest.mark.parametrize("family", ["dbrx", "jetmoe", "switch_transformers", "muse_spark"])
def test_families_outside_of_transformers_interface(family: str) -> None:
    model, given = build(family)
    expected = run(model, given)
    torch._dynamo.reset()
    with sparsec.use_experts(model):
        compiled = torch.compile(model, backend="sparsec", fullgraph=True, options={"dense": "aten"})
        assert relative_error(run(compiled, given), expected) < 1e-5
