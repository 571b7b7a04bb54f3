"""Expert layers written by hand: one capture, any number of tokens, and what became of the layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sparsec
from sparsec.diagnostics import CompileError
from tests.zoo import handwritten_more, handwritten_others
from tests.zoo.checks import error, found
from tests.zoo.families import randomised
from tests.zoo.handwritten import FORMS, Layer

TOKENS = (1, 37, 300)
assert handwritten_more and handwritten_others  # imported to complete the forms


def forms(expect: str) -> list[str]:
    return [name for name, form in FORMS.items() if form.expect == expect]


def layer_of(name: str) -> Layer:
    torch.manual_seed(0)
    return randomised(FORMS[name]()).to(FORMS[name].dtype)


def tokens_for(layer: Layer, batch: int, length: int) -> Tensor:
    x = torch.randn(batch, length, layer.width, generator=torch.Generator().manual_seed(length)).to(layer.dtype)
    return x if layer.rank == 3 else x.flatten(0, 1)


def compiled(layer: Layer) -> sparsec.CompiledModel:
    return sparsec.compile(layer, (tokens_for(layer, 2, 6),))


def check_results(layer: Layer, model: sparsec.CompiledModel) -> None:
    """Equal to eager at every number of tokens; bf16 is compared to the same layer in f32, and eager's own distance."""
    for count in TOKENS:
        x = tokens_for(layer, 1, count)
        with torch.no_grad():
            expected, result = layer(x), model(x)
        bound = 1e-5 if layer.dtype == torch.float32 else 2e-2
        assert error([result], [expected]) <= bound, f"{count} tokens"


@pytest.mark.parametrize("name", forms("fused"))
def test_it_becomes_one_router_and_one_bank(name: str) -> None:
    layer = layer_of(name)
    model = compiled(layer)
    got = found(model)
    assert (got.routes, got.experts, got.loose) == (1, 1, ()), got
    check_results(layer, model)


@pytest.mark.parametrize("name", forms("left"))
def test_what_is_no_bank_stays_as_it_is(name: str) -> None:
    layer = layer_of(name)
    model = compiled(layer)
    got = found(model)
    assert (got.routes, got.experts) == (0, 0)
    if "topk" in got.loose:
        assert any("tests/zoo/handwritten" in remark for remark in got.missed), "no remark with the user's line"
    check_results(layer, model)


@pytest.mark.parametrize("name", forms("right"))
def test_experts_that_are_not_alike_are_not_taken_for_alike(name: str) -> None:
    layer = layer_of(name)
    check_results(layer, compiled(layer))


@pytest.mark.parametrize("name", forms("refused"))
def test_what_cannot_be_traced_ends_in_the_line_and_a_hint(name: str) -> None:
    with pytest.raises(CompileError) as caught:
        compiled(layer_of(name))
    diagnostic = caught.value.diagnostics[0]
    assert "tests/zoo/handwritten" in str(diagnostic.loc) and diagnostic.loc.source
    assert FORMS[name].hint in diagnostic.hint
