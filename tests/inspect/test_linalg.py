"""An independent oracle: layers lowered by torch-mlir compute on MLIR's ExecutionEngine what the references say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sparsec import dialects
from sparsec.diagnostics import CompileError, SparsecError
from sparsec.inspect.layers import cut_layer, expert_layers, find_layer, sizes_for, with_sizes
from sparsec.inspect.linalg import to_linalg
from sparsec.inspect.mlir_engine import compare
from sparsec.ir.core import Module
from sparsec.ir.parser import parse_module
from sparsec.ir.verify import verify_module
from tests.ir.modules import LAYER

assert dialects.__all__
GOLDENS = Path(__file__).parents[1] / "passes" / "raise_route"
ROUTERS = sorted(path.stem for path in GOLDENS.glob("*.sparsec"))
QUICK = {"deepseek_v3", "gpt_oss", "phimoe_bf16", "cumsum.missed"}
EXACT = 0.0


SILU = """activation(%a: tensor<rx5xf32>, %b: tensor<rx5xf32>):
      %g = aten.silu(%a) : tensor<rx5xf32>
      %h = aten.mul.Tensor(%g, %b) : tensor<rx5xf32>
      yield %h"""
TANH = """activation(%a: tensor<rx5xf32>):
      %h = aten.tanh(%a) : tensor<rx5xf32>
      yield %h"""
TAIL = """tail(%z: tensor<rx6xf32>, %n: tensor<6xf32>):
      %s = aten.softmax.int(%z) {dim = -1} : tensor<rx6xf32>
      %t = aten.mul.Tensor(%s, %n) : tensor<rx6xf32>
      yield %t"""
# Experts of every kind: 4 of width 5 for tokens of width 6, ids and weights given.
KINDS = {
    "concat": ("%up, %down)", SILU),
    "interleaved": ('%up, %down) {layout = "interleaved"}', SILU),
    "single": ('%one, %down) {layout = "single", up_transposed = true}', TANH),
    "biases": ("%up, %down, %up_bias, %down_bias)", SILU),
    "input": ('%up, %down) {weight_on = "input"}', SILU),
    "tail": ("%up, %down, none, none, none, none, %n)", f"{SILU}\n    {TAIL}"),
}


def banks(*kinds: str) -> str:
    """A module with a bank of each kind."""
    lines = [
        "func @main(%x: tensor<s0x6xf32>, %i: tensor<s0x2xi64>, %w: tensor<s0x2xf32>, %up: tensor<4x10x6xf32>,",
        "  %one: tensor<4x6x5xf32>, %down: tensor<4x6x5xf32>, %up_bias: tensor<4x10xf32>, %down_bias: tensor<4x6xf32>,",
        f"  %n: tensor<6xf32>) -> ({', '.join(['tensor<s0x6xf32>'] * len(kinds))}) {{",
    ]
    for kind in kinds:
        operands, regions = KINDS[kind]
        lines.append(f"  %{kind} = moe.experts(%x, %i, %w, {operands} : tensor<s0x6xf32> {{\n    {regions}\n  }}")
    lines.append(f"  return {', '.join(f'%{kind}' for kind in kinds)}\n}}")
    return "\n".join(lines)


def static(module: Module, tokens: int) -> Module:
    made = with_sizes(module, sizes_for(module, tokens))
    verify_module(made)
    return made


def agree(module: Module, tolerance: float) -> None:
    for one in compare(module, to_linalg(module)):
        assert one.error <= tolerance, one


@pytest.mark.mlir
@pytest.mark.parametrize(
    ("tokens", "kinds"),  # fewer pairs than experts, and more
    [(1, ("interleaved", "biases", "input")), (7, ("concat", "single", "biases", "input", "tail"))],
    ids=["few", "many"],
)
def test_experts(tokens: int, kinds: tuple[str, ...]) -> None:
    pytest.importorskip("torch_mlir.fx")
    agree(static(parse_module(banks(*kinds)), tokens), 1e-6)


@pytest.mark.mlir
def test_ids_out_of_range_are_skipped() -> None:
    import torch

    pytest.importorskip("torch_mlir.fx")
    from sparsec.inspect.mlir_engine import Engine, random_arguments
    from sparsec.ir.interp import evaluate_module

    module = static(parse_module(banks("concat")), 3)
    args = random_arguments(module, 0)
    args[1] = torch.tensor([[0, -1], [4, 2], [7, -9]])
    args[2][2, 0] = torch.nan  # of a pair that is skipped
    (wanted,) = evaluate_module(module, args, {})
    found = torch.full_like(wanted, torch.nan)
    Engine(to_linalg(module)).run(args, [found])
    assert torch.allclose(found, wanted, atol=1e-6)
    assert not found[2].any()


@pytest.mark.mlir
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ROUTERS]
)
def test_blocks_of_models(name: str) -> None:
    """Whole blocks, with each family's router raised; only ops that every MLIR compiler knows."""
    pytest.importorskip("torch_mlir.fx")
    given, _, raised = (GOLDENS / f"{name}.sparsec").read_text().partition("// ----- expect")
    module = static(parse_module(raised or given), 6)
    text = to_linalg(module)
    assert set(re.findall(r" ([a-z_]+)\.[a-z_]+[ (]", re.sub(r"//.*", "", text))) <= {
        "arith", "cf", "func", "linalg", "math", "tensor",
    }  # fmt: skip
    for one in compare(module, text):
        assert one.error <= (2**-7 if "bf16" in name else 1e-5), one


@pytest.mark.mlir
def test_slots_whose_order_a_router_leaves_open() -> None:
    """PyTorch's own top-k does not sort where it need not."""
    pytest.importorskip("torch_mlir.fx")
    text = """
    func @main(%z: tensor<s0x64xf32>) -> (tensor<s0x6xi64>, tensor<s0x6xf32>) {
      %i, %w = moe.route(%z) : tensor<s0x6xi64>, tensor<s0x6xf32> {
        body(%l: tensor<s0x64xf32>):
          %v, %e = aten.topk(%l) {k = 6, sorted = false} : tensor<s0x6xf32>, tensor<s0x6xi64>
          yield %e, %v
      }
      return %i, %w
    }
    """
    agree(static(parse_module(text), 9), EXACT)


CAPACITY = """
func @main(%i: tensor<s0x2xi64>) -> (tensor<s0x2xi64>, tensor<s0x2xi64>) {
  %a = moe.capacity(%i) {num_experts = 2, capacity = 2} : tensor<s0x2xi64>
  %b = moe.capacity(%i) {num_experts = 1, capacity = 1, order = "token", groups = 2} : tensor<s0x2xi64>
  return %a, %b
}
"""


@pytest.mark.mlir
def test_capacity() -> None:
    pytest.importorskip("torch_mlir.fx")
    agree(static(parse_module(CAPACITY), 6), EXACT)


@pytest.mark.mlir
def test_a_wrong_number_is_seen() -> None:
    """The oracle is worth something: linalg of another activation is found out."""
    pytest.importorskip("torch_mlir.fx")
    module = static(parse_module(banks("concat")), 2)
    other = static(parse_module(banks("concat").replace("aten.silu", "aten.gelu")), 2)
    (one,) = compare(module, to_linalg(other))
    assert one.error > 1e-2


def test_a_layer_is_cut_out_with_its_router() -> None:
    module = parse_module(LAYER)
    assert list(expert_layers(module)) == ["mlp.experts"]
    cut = cut_layer(module, find_layer(module, "mlp"))
    verify_module(cut)
    assert [op.name for op in cut.main.body.ops] == ["moe.route", "moe.experts", "func.return"]
    assert [cut.main.arg_attrs[arg].get("source") for arg in cut.main.body.args] == [None, None, "up", "down"]
    sized = static(cut, 5)
    assert str(sized.main.body.args[0].type) == "tensor<5x4xf32>"
    assert str(sized.main.body.ops[1].regions[0].args[0].type) == "tensor<rx5xf32>"  # a region's own symbol stays


SHARED = """
func @main(%z: tensor<s0x4xf32>, %x: tensor<s0x6xf32>, %up: tensor<4x10x6xf32>, %down: tensor<4x6x5xf32>)
  -> (tensor<s0x6xf32>) {
  %i, %w = moe.route(%z) : tensor<s0x2xi64>, tensor<s0x2xf32> {
    body(%l: tensor<s0x4xf32>):
      %v, %e = aten.topk(%l) {k = 2} : tensor<s0x2xf32>, tensor<s0x2xi64>
      yield %e, %v
  }
  %kept = moe.capacity(%i) {num_experts = 4, capacity = 2} : tensor<s0x2xi64>
  %shared = aten.relu(%x) : tensor<s0x6xf32>
  loc "a.py":1 in "layers.0.mlp"
  %y = moe.experts(%x, %kept, %w, %up, %down) : tensor<s0x6xf32> {
    ACTIVATION
  }
  loc "a.py":2 in "layers.1.mlp"
  %y2 = moe.experts(%shared, %i, %w, %up, %down) : tensor<s0x6xf32> {
    ACTIVATION
  }
  %sum = aten.add.Tensor(%y, %y2) : tensor<s0x6xf32>
  return %sum
}
""".replace("ACTIVATION", SILU)


@pytest.mark.parametrize(
    ("layer", "ops"),
    [("layers.0", ["moe.route", "moe.capacity", "moe.experts"]), ("layers.1.mlp", ["moe.route", "moe.experts"])],
)
def test_what_stands_between_router_and_experts_comes_along(layer: str, ops: list[str]) -> None:
    module = parse_module(SHARED)
    cut = cut_layer(module, find_layer(module, layer))
    verify_module(cut)
    assert [op.name for op in cut.main.body.ops] == [*ops, "func.return"]


def test_a_layer_that_is_not_there() -> None:
    module = parse_module(SHARED)
    with pytest.raises(SparsecError, match=r"no layer is named 'layers.2' \(there are: layers.0.mlp, layers.1.mlp\)"):
        find_layer(module, "layers.2")
    with pytest.raises(SparsecError, match="2 layers are named 'mlp'"):
        find_layer(module, "mlp")
    with pytest.raises(SparsecError, match=r"no `moe.experts`"):
        find_layer(parse_module(CAPACITY), None)


def test_tokens_that_a_module_cannot_have() -> None:
    module = parse_module(banks("concat").replace("s0", "8"))
    with pytest.raises(SparsecError, match="rows of 8 cannot be 5 tokens"):
        sizes_for(module, 5)


def test_what_has_no_static_form() -> None:
    pytest.importorskip("torch_mlir.fx")
    text = """
    func @main(%i: tensor<4x2xi64>) -> (tensor<8xi32>, tensor<5xi32>) {
      %order, %offsets = moe.group(%i) {num_experts = 4} : tensor<8xi32>, tensor<5xi32>
      return %order, %offsets
    }
    """
    with pytest.raises(CompileError, match=r"'moe.group' has no form of static shapes: export the phase `raise`"):
        to_linalg(parse_module(text))
