"""Costs beside ops, against counts by hand; texts with costs still parse."""

from __future__ import annotations

import pytest

from sparsec import pipeline
from sparsec.diagnostics import SparsecError
from sparsec.inspect.cost_text import print_costs
from sparsec.inspect.costs import Roof, op_costs, roof, sizes
from sparsec.ir.core import Module
from sparsec.ir.equal import equal
from sparsec.ir.parser import parse_module
from sparsec.ir.types import DType

LAYER = """module {phase = "raise", version = 1}

func @main(
  %x: tensor<s0x64xbf16> {kind = "input"},
  %gate: tensor<8x64xbf16> {kind = "param", source = "gate"},
  %up: tensor<8x96x64xbf16> {kind = "param", source = "up"},
  %down: tensor<8x64x48xbf16> {kind = "param", source = "down"}
) -> (tensor<s0x1x64xbf16> {kind = "output"}) {
  %z = aten.linear(%x, %gate) : tensor<s0x8xbf16>
  %ids, %weights = moe.route(%z) : tensor<s0x2xi64>, tensor<s0x2xbf16> {
    body(%l: tensor<s0x8xbf16>):
      %p = aten.softmax.int(%l) {dim = -1} : tensor<s0x8xbf16>
      %w, %e = aten.topk(%p) {k = 2} : tensor<s0x2xbf16>, tensor<s0x2xi64>
      yield %e, %w
  }
  %y = moe.experts(%x, %ids, %weights, %up, %down) : tensor<s0x64xbf16> {
    activation(%a: tensor<rx48xbf16>, %b: tensor<rx48xbf16>):
      %g = aten.silu(%a) : tensor<rx48xbf16>
      %h = aten.mul.Tensor(%g, %b) : tensor<rx48xbf16>
      yield %h
  }
  %v = aten.unsqueeze(%y) {dim = 1} : tensor<s0x1x64xbf16>
  return %v
}
"""


@pytest.fixture
def module() -> Module:
    return parse_module(LAYER)


def test_counts(module: Module) -> None:
    costs = {op.name: cost for op, cost in op_costs(module, {"s0": 16}).items()}
    linear = costs["aten.linear"]
    assert linear.flops == 2 * 16 * 64 * 8
    assert linear.bytes == 2 * (16 * 64 + 8 * 64 + 16 * 8)
    assert linear.intensity == linear.flops / linear.bytes
    assert (costs["aten.unsqueeze"].bytes, costs["aten.unsqueeze"].flops) == (0, 0)
    # 16 tokens of 2 experts each, three matrices of 64 x 48
    assert costs["moe.experts"].flops >= 2 * 32 * 3 * 64 * 48
    assert not costs["moe.experts"].limiter


def test_roof(module: Module) -> None:
    narrow = op_costs(module, {"s0": 16}, Roof("slow memory", 1e6, {None: 1e15}))
    wide = op_costs(module, {"s0": 16}, Roof("slow units", 1e15, {None: 1e6}))
    for op, cost in narrow.items():
        if cost.bytes:
            assert cost.limiter == "memory" and cost.us == pytest.approx(cost.bytes)
            if cost.flops:
                assert wide[op].limiter == "compute" and wide[op].us == pytest.approx(cost.flops)


@pytest.mark.parametrize("target", ["cpu", "cuda:sm_90"])
def test_launches_cost_what_their_kernels_do(module: Module, target: str) -> None:
    lowered = pipeline.run(module, target=target, start="raise").module
    costs = op_costs(lowered, {"s0": 16}, roof("37GB/s,6.7TFLOP/s"))
    launches = [op for op in lowered.main.body.ops if op.name == "kernel.launch"]
    inner = [op for func in lowered.funcs.values() if func.name != "main" for op in func.body.ops if op in costs]
    assert sum(costs[op].flops for op in launches) == sum(costs[op].flops for op in inner)
    assert sum(costs[op].flops for op in launches) >= 2 * 32 * 3 * 64 * 48


def test_text_with_costs_parses(module: Module) -> None:
    text = print_costs(module, {"s0": 16}, roof("cuda:sm_90"))
    assert "costs with s0 = 16" in text and "NVIDIA H100" in text and "FLOP/B" in text
    assert equal(parse_module(text), module)


def test_sizes(module: Module) -> None:
    assert sizes(module, {}) == {"s0": 128}
    with pytest.raises(SparsecError, match="no size 'batch'"):
        sizes(module, {"batch": 4})


@pytest.mark.parametrize("name", ["cuda:sm_91", "37GB/s", "0GB/s,1TFLOP/s", ""])
def test_no_such_chip(name: str) -> None:
    with pytest.raises(SparsecError, match="no chip"):
        roof(name)


def test_this_cpu_is_measured() -> None:
    on = roof("cpu")
    assert on == roof("cpu"), "once in a process"
    assert "measured" in on.name and 1e8 < on.bandwidth < 1e13
    assert on.rate(DType.f32) > 1e8 and on.rate(DType.bf16) > 1e7
