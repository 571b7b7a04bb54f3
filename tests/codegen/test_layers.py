"""Layers of every kind, from `raise` to plans and torch.fx graphs, against the ops' own references."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

import sparsec
from sparsec import pipeline
from sparsec.codegen.emit import emit
from sparsec.codegen.fx import to_fx
from sparsec.ir.core import Module
from sparsec.ir.equal import clone_module, equal
from sparsec.ir.interp import evaluate_module
from sparsec.ir.mlir import print_generic
from sparsec.ir.parser import parse_module
from sparsec.ir.printer import print_module
from sparsec.launch import register
from sparsec.runtime.executor import Program
from sparsec.runtime.plan_json import from_json, to_json
from tests.codegen.layers import LAYERS, inputs

torch.set_num_threads(1)
CPU = torch.device("cpu")


def lowered(module: Module) -> Module:
    return pipeline.run(clone_module(module), target="cpu").module


@pytest.mark.parametrize("name", LAYERS)
def test_a_plan_computes_what_the_ops_mean(name: str) -> None:
    module = LAYERS[name].module()
    plan = emit(lowered(module), "cpu").plan
    assert asdict(from_json(json.loads(json.dumps(to_json(plan))))) == asdict(plan)
    program = Program(plan, {})
    for tokens in (0, 1, 7, 60, 300):  # batched and streamed
        given = inputs(module, tokens)
        for got, wanted in zip(program(*given), evaluate_module(module, given, {}), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_a_graph_for_inductor_computes_the_same(name: str) -> None:
    module = LAYERS[name].module()
    low = lowered(module)
    emitted = emit(low, "cpu")
    kernels = {key: register(kernel, CPU, emitted.files) for key, kernel in emitted.plan.kernels.items()}
    graph = to_fx(low.main, kernels, CPU, {}, None)
    for tokens in (1, 9):
        given = inputs(module, tokens)
        for got, wanted in zip(graph(*given), evaluate_module(module, given, {}), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_text_and_generic_form_hold_every_phase(name: str) -> None:
    module = LAYERS[name].module()
    for phase in ("raise", "fuse", "lower"):
        after = pipeline.run(clone_module(module), target="cpu", to=phase).module
        assert equal(parse_module(print_module(after)), after)
        assert equal(parse_module(print_generic(after)), after)


def test_banks_in_half_precision_are_close_to_f32() -> None:
    """What a tail does in a narrow dtype stays within that dtype's rounding."""
    case = LAYERS["input_and_tail"]
    module = case.module()
    exact = inputs(module, 33, seed=3)
    wanted = evaluate_module(module, exact, {})[0]
    narrow = parse_module(print_module(module).replace("xf32>", "xbf16>"))
    given = [value.bfloat16() if value.dim() else value for value in exact]
    (got,) = Program(emit(lowered(narrow), "cpu").plan, {})(*given)
    same = (got.float() - wanted).norm(dim=1) < 0.05 * wanted.norm(dim=1)
    assert same.float().mean() > 0.9  # near ties bf16 may choose another expert


class Heads(torch.nn.Module):
    """Linears by expert around a pointwise op, for as many pairs as there is room for."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = ((4, 32), (4, 24, 32), (4, 32, 24))
        drawn = [torch.randn(shape, generator=generator) * 0.2 for shape in shapes]
        self.gate, self.heads, self.back = map(torch.nn.Parameter, drawn)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = torch.topk(torch.softmax(x @ self.gate.T, -1), 2)
        ids = torch.ops.sparsec.capacity(ids, 4, x.shape[0] // 3 + 1)
        h = torch.ops.sparsec.grouped_linear(x, ids, self.heads)
        return torch.ops.sparsec.grouped_linear(torch.tanh(h), ids, self.back, None, weights)


def test_capacities_and_linears_under_torch_compile_and_as_a_model() -> None:
    model = Heads().eval()
    compiled = torch.compile(model, backend="sparsec", dynamic=True)
    program = sparsec.compile(model, (torch.randn(9, 32),))
    with torch.no_grad():
        for tokens in (9, 5, 40):
            x = torch.randn(tokens, 32)
            wanted = model(x)
            for run in (compiled, program):
                torch.testing.assert_close(run(x), wanted, rtol=1e-5, atol=1e-5)
