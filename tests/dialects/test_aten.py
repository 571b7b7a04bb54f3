"""Ops of the aten dialect are legal where torch's own schema says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsec import dialects
from sparsec.diagnostics import CompileError
from sparsec.dialects.aten import overload
from sparsec.ir.interp import evaluate_module
from sparsec.ir.opdef import lookup
from sparsec.ir.parser import parse_module
from sparsec.ir.verify import verify_module

assert dialects.__all__


def module_of(line: str) -> str:
    args = "%x: tensor<s0x4xf32>, %y: tensor<s0x4xf32>, %i: tensor<2xi64>"
    return f"func @main({args}) -> (tensor<s0x4xf32>) {{\n  {line}\n  return %x\n}}\n"


WRONG = {
    "%z = aten.add.Tensor(%x) : tensor<s0x4xf32>": "needs operand 'other'",
    "%z = aten.add.Tensor(%x, %y, %i) : tensor<s0x4xf32>": "has 3 operands, takes at most 2",
    "%z = aten.softmax.int(%x) : tensor<s0x4xf32>": "needs attribute 'dim'",
    "%z = aten.softmax.int(%x) {dim = 1.5} : tensor<s0x4xf32>": "attribute 'dim' is 1.5, not of type int",
    "%z = aten.softmax.int(%x) {dim = 1, dtype = 6} : tensor<s0x4xf32>": "attribute 'dtype' is 6, not of type",
    "%z = aten.sum.dim_IntList(%x) {dim = [1, none]} : tensor<s0x4xf32>": "not of type Optional[List[int]]",
    "%z = aten.gelu(%x) {approximate = none} : tensor<s0x4xf32>": "attribute 'approximate' is None, not of type str",
    "%z = aten.softmax.int(%x) {dmi = 1, dim = 1} : tensor<s0x4xf32>": "no attribute 'dmi'; did you mean 'dim'?",
    "%z = aten.topk(%x) {k = 2} : tensor<s0x2xf32>": "has 1 results, the operator returns 2",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_the_schema_refuses(line: str) -> None:
    with pytest.raises(CompileError) as raised:
        verify_module(parse_module(module_of(line)))
    assert WRONG[line] in str(raised.value)


RIGHT: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "%z = aten.add.Tensor(%x, %y) {alpha = 2} : tensor<s0x4xf32>": lambda x, y, i: x + 2 * y,
    "%z = aten.softmax.int(%x) {dim = -1, dtype = f32} : tensor<s0x4xf32>": lambda x, y, i: x.softmax(-1),
    "%z = aten.cat(%x, %y) {dim = 1} : tensor<s0x8xf32>": lambda x, y, i: torch.cat([x, y], 1),
    "%z = aten.index.Tensor(%x, [none, %i]) : tensor<s0x2xf32>": lambda x, y, i: x[:, i],
    "%z = aten.view(%x) {size = [(s0*4)]} : tensor<(s0*4)xf32>": lambda x, y, i: x.view(-1),
    "%z = aten.clamp(%x) {max = 0.5} : tensor<s0x4xf32>": lambda x, y, i: x.clamp(max=0.5),
    "%z = aten.sum.dim_IntList(%x) {dim = 1} : tensor<s0xf32>": lambda x, y, i: x.sum(1),
    "%z = aten.layer_norm(%x) {normalized_shape = [4]} : tensor<s0x4xf32>": (
        lambda x, y, i: torch.nn.functional.layer_norm(x, [4])
    ),
    "%z, %rest = aten.split.Tensor(%x) {split_size = 2, dim = 1} : tensor<s0x2xf32>, tensor<s0x2xf32>": (
        lambda x, y, i: x.split(2, 1)[0]
    ),
}


@pytest.mark.parametrize("line", RIGHT)
def test_what_the_schema_accepts_runs(line: str) -> None:
    type_ = line.split(" : ")[1].split(", ", maxsplit=1)[0]
    text = module_of(line).replace("-> (tensor<s0x4xf32>)", f"-> ({type_})").replace("return %x", "return %z")
    module = parse_module(text)
    verify_module(module)
    x, y, i = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([2, 0])
    (z,) = evaluate_module(module, [x, y, i], {})
    assert torch.equal(z, RIGHT[line](x, y, i))


@pytest.mark.parametrize(
    "name", ["aten.nope", "torch.load_library.__call__", "aten.add.Nope", "torch.aten", "aten", "aten.\ud800"]
)
def test_what_is_no_operator(name: str) -> None:
    assert overload(name) is None
    with pytest.raises(KeyError):
        lookup(name)


def test_purity_comes_from_the_schema() -> None:
    assert lookup("aten.add.Tensor").pure
    assert not lookup("aten.add_.Tensor").pure
    assert not lookup("aten.bernoulli").pure
