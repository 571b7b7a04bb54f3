"""The reference interpreter: results, symbols, observers, overrides, memory, and what it refuses."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from sparsec import dialects
from sparsec.diagnostics import CompileError
from sparsec.ir.core import Op
from sparsec.ir.interp import evaluate_module
from sparsec.ir.parser import parse_module
from sparsec.ir.verify import verify_module
from tests.ir.modules import LAYER

assert dialects.__all__
torch.set_num_threads(1)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"gate": torch.randn(4, 6), "up": torch.randn(4, 10, 6), "down": torch.randn(4, 6, 5)}


def eager(x: torch.Tensor, weights: dict[str, torch.Tensor], ids: torch.Tensor | None = None) -> torch.Tensor:
    scores = (x @ weights["gate"].T).softmax(-1)
    top, chosen = scores.topk(2)
    chosen = chosen if ids is None else ids
    a, b = torch.einsum("th,tkih->tki", x, weights["up"][chosen]).chunk(2, -1)
    y = torch.einsum("tki,tkhi->tkh", torch.nn.functional.silu(a) * b, weights["down"][chosen])
    return (y * top[..., None]).sum(1)


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_results(weights: dict[str, torch.Tensor], tokens: int) -> None:
    x = torch.randn(tokens, 6)
    (y,) = evaluate_module(parse_module(LAYER), [x], weights)
    torch.testing.assert_close(y, eager(x, weights), rtol=1e-5, atol=1e-5)


def test_observer_sees_every_op(weights: dict[str, torch.Tensor]) -> None:
    seen: list[tuple[Op, tuple[Any, ...]]] = []
    module = parse_module(LAYER)
    evaluate_module(module, [torch.randn(3, 6)], weights, observer=lambda op, outputs: seen.append((op, outputs)))
    outside = [op.name for op, _ in seen if op.block is module.main.body]
    assert outside == ["aten.linear", "moe.route", "moe.experts"]
    assert {"aten.topk", "aten.silu"} <= {op.name for op, _ in seen}
    assert all(len(outputs) == len(op.results) for op, outputs in seen)


def test_override_forces_values(weights: dict[str, torch.Tensor]) -> None:
    module = parse_module(LAYER)
    ids = module.main.body.ops[1].results[0]
    x, forced = torch.randn(3, 6), torch.tensor([[3, 0], [1, 2], [0, 1]])
    expected = eager(x, weights, forced)
    (y,) = evaluate_module(module, [x], weights, override={ids: forced})
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    (z,) = evaluate_module(module, [x], weights, override=lambda value, computed: forced if value is ids else computed)
    assert torch.equal(y, z)


def test_dead_values_are_freed() -> None:
    module = parse_module("""
func @main(%x: tensor<s0xf32>) -> (tensor<s0xf32>) {
  %a = aten.exp(%x) : tensor<s0xf32>
  %unused = aten.exp(%x) : tensor<s0xf32>
  %b = aten.exp(%a) : tensor<s0xf32>
  %c = aten.exp(%b) : tensor<s0xf32>
  return %c
}""")
    alive: list[int] = []
    made: list[weakref.ref[torch.Tensor]] = []

    def observe(op: Op, outputs: tuple[Any, ...]) -> None:
        made.append(weakref.ref(outputs[0]))
        alive.append(sum(ref() is not None for ref in made))

    evaluate_module(module, [torch.ones(4)], {}, observer=observe)
    assert alive == [1, 2, 2, 2]  # while an op runs its operand lives; what nobody reads never does after


def test_symbols_come_from_arguments_and_results() -> None:
    module = parse_module("""
func @main(%x: tensor<s0xf32>, %n: sym<s1>, %scale: tensor<(2*s0)xf32>) -> (tensor<(u0 + s1)xf32>, sym<s1>) {
  %i = aten.nonzero(%x) : tensor<u0x1xi64>
  %y = aten.full() {size = [(u0 + s1)], fill_value = s0, dtype = f32} : tensor<(u0 + s1)xf32>
  return %y, %n
}""")
    verify_module(module)
    y, n = evaluate_module(module, [torch.tensor([1.0, 0.0, 2.0]), 4, torch.ones(6)], {})
    assert torch.equal(y, torch.full((6,), 3.0))
    assert n == 4
    with pytest.raises(CompileError, match=r"%scale has a size of 5 where .* has \(2\*s0\) = 6"):
        evaluate_module(module, [torch.ones(3), 4, torch.ones(5)], {})


def test_launch_runs_the_callee_with_its_own_symbols() -> None:
    module = parse_module("""
func @main(%x: tensor<s0x4xf32>) -> (tensor<(2*s0)x4xf32>) {
  %d = aten.cat(%x, %x) : tensor<(2*s0)x4xf32>
  %b = kernel.alloc() : tensor<(2*s0)x4xf32>
  %y = kernel.launch([%d, none], [%b]) {callee = "k"} : tensor<(2*s0)x4xf32>
  return %y
}

func @k(%x: tensor<tx4xf32>) -> (tensor<tx4xf32>) {tokens = t} {
  %y = aten.mul.Scalar(%x) {other = t} : tensor<tx4xf32>
  return %y
}""")
    verify_module(module)
    (y,) = evaluate_module(module, [torch.ones(3, 4)], {})
    assert torch.equal(y, torch.full((6, 4), 6.0))


def test_mutations_are_results() -> None:
    module = parse_module("""
func @main(%x: tensor<4xf32> {kind = "input"}, %b: tensor<4xf32> {kind = "buffer", source = "count"})
    -> (tensor<4xf32> {kind = "output"}, tensor<4xf32> {kind = "mutation", source = "count"}) {
  %y = aten.add.Tensor(%x, %b) : tensor<4xf32>
  return %x, %y
}""")
    count = torch.ones(4)
    out, new = evaluate_module(module, [torch.ones(4)], {"count": count})
    assert torch.equal(new, torch.full((4,), 2.0))
    assert torch.equal(out, count)


@pytest.mark.parametrize(
    "inputs, message",
    [
        ([], "takes more inputs than the 0 given: %x has none"),
        ([torch.ones(3, 6)] * 2, "takes fewer inputs than the 2 given"),
        ([torch.ones(3, 7)], "%x has a size of 7 where tensor<s0x6xf32> has 6"),
        ([torch.ones(3)], r"%x is torch.float32 of shape \[3\], not tensor<s0x6xf32>"),
        ([torch.ones(3, 6).double()], r"%x is torch.float64 of shape \[3, 6\], not tensor<s0x6xf32>"),
        ([3], "%x is a int, not a tensor<s0x6xf32>"),
    ],
)
def test_bad_inputs(weights: dict[str, torch.Tensor], inputs: list[Any], message: str) -> None:
    with pytest.raises(CompileError, match=message):
        evaluate_module(parse_module(LAYER), inputs, weights)


def test_bad_weights(weights: dict[str, torch.Tensor]) -> None:
    del weights["up"]
    with pytest.raises(CompileError, match="no weight is named 'up' \\(for %up of @main\\)"):
        evaluate_module(parse_module(LAYER), [torch.ones(3, 6)], weights)


def test_a_wrong_type_is_found_at_its_op(weights: dict[str, torch.Tensor]) -> None:
    wrong = LAYER.replace("{k = 2}", "{k = 3}")
    with pytest.raises(CompileError, match=r"small\.py:9: error: 'aten.topk' result 0 has a size of 3 where"):
        evaluate_module(parse_module(wrong), [torch.ones(3, 6)], weights)


def test_a_failing_op_names_its_place(weights: dict[str, torch.Tensor]) -> None:
    with pytest.raises(CompileError, match=r"small.py:9: error: 'aten.topk' fails on \(\[3, 4\]\): .*"):
        evaluate_module(parse_module(LAYER.replace("{k = 2}", "{k = 9}")), [torch.ones(3, 6)], weights)
