"""sparsec's own adapters compute what the modules compute that they stand in for, and whole models are captured."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsec.frontend.adapters import registry
from sparsec.frontend.capture import Captured, capture
from tests.frontend.helpers import outputs, relative_error
from tests.zoo.families import build, inputs

LAYERS = 2
FAMILIES = {
    "dbrx": {"moe.experts": LAYERS},
    "ernie4_5_vl_moe": {"moe.experts": LAYERS},
    "ernie4_5_vl_moe+images": {"moe.experts": 2 * LAYERS},
    "jetmoe": {"moe.experts": LAYERS, "moe.grouped_linear": 2 * LAYERS},
    "llama4": {"moe.experts": LAYERS},
    "longcat_flash": {"moe.experts": 1},
    "step3p7": {"moe.experts": LAYERS},
    "switch_transformers": {"moe.experts": 2 * LAYERS, "moe.capacity": 2 * LAYERS},
}
SIZES = [(1, 1), (1, 37), (3, 100)]


def run(model: Any, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**given, use_cache=False)
    return out.logits if hasattr(out, "logits") else out[0]


def compare(captured: Captured, family: str, model: Any) -> None:
    """The captured module with the model as it is, whose modules run their own code again."""
    assert not any({"forward", "map", "reduce"} & vars(module).keys() for module in model.modules())
    if family.startswith("ernie"):
        model.set_experts_implementation("eager")
    for batch, length in SIZES:
        given = inputs(family, model, batch, length)
        expected = run(model, given)
        found = next(value for value in outputs(captured, *given.values()) if value.shape == expected.shape)
        assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_captured_model_computes_what_the_untouched_one_does(family: str) -> None:
    model, given = build(family)
    captured = capture(model, (), given)
    assert not any("forward" in vars(module) for module in model.modules())
    ops = Counter(op.name for op in captured.module.walk() if (op.dialect == "moe" and op.regions) or "moe." in op.name)
    assert {name: ops[name] for name in FAMILIES[family]} == FAMILIES[family]
    for batch, length in SIZES:
        given = inputs(family, model, batch, length)
        expected = run(model, given)
        found = next(value for value in outputs(captured, *given.values()) if value.shape == expected.shape)
        assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("family", [*FAMILIES, "doge", "nllb_moe"])
def test_adapted_modules_run_eagerly_too(family: str) -> None:
    model, given = build(family)
    expected = run(model, given)
    with registry.adapted(model):
        assert relative_error(run(model, given), expected) < 1e-5


def test_an_encoder_without_a_mask() -> None:
    model, given = build("switch_transformers")
    given = {name: ids for name, ids in given.items() if "mask" not in name}
    captured = capture(model, (), given)
    expected = run(model, given)
    found = next(value for value in outputs(captured, *given.values()) if value.shape == expected.shape)
    assert relative_error(found, expected) < 1e-5
