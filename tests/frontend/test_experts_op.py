"""The operator `sparsec::experts`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsec.hf
from sparsec.diagnostics import CompileError
from sparsec.dialects.moe import Experts
from sparsec.frontend import experts_op, region
from sparsec.frontend.capture import capture
from sparsec.ir.parser import parse_module
from sparsec.ir.verify import verify_module
from tests.frontend.helpers import outputs, relative_error

T, H, WIDTH, E, K = 7, 16, 12, 4, 2


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


ACTIVATION = region.record(swiglu, WIDTH, True, torch.float32)[1]


def operands(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    return {
        "x": normal(T, H),
        "ids": torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)]),
        "weights": normal(T, K).abs(),
        "up": normal(E, 2 * WIDTH, H),
        "down": normal(E, H, WIDTH),
        "up_bias": normal(E, 2 * WIDTH),
        "down_bias": normal(E, H),
    }


def expected(
    x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor, up_bias: Tensor, down_bias: Tensor
) -> Tensor:
    """Token by token, slot by slot."""
    out = torch.zeros(x.shape[0], down.shape[1])
    for t in range(x.shape[0]):
        for slot in range(ids.shape[1]):
            e = int(ids[t, slot])
            if 0 <= e < up.shape[0]:
                h = swiglu(F.linear(x[t], up[e], up_bias[e]))
                out[t] += weights[t, slot] * F.linear(h, down[e], down_bias[e])
    return out


def test_it_computes_the_weighted_sum_of_the_experts() -> None:
    given = operands()
    assert relative_error(torch.ops.sparsec.experts(**given, activation=ACTIVATION), expected(**given)) < 1e-6


@pytest.mark.parametrize("sentinel", [E, E + 5, -1])
def test_ids_out_of_range_are_skipped(sentinel: int) -> None:
    given = operands()
    given["ids"][2] = sentinel
    given["weights"][2] = torch.nan
    got = torch.ops.sparsec.experts(**given, activation=ACTIVATION)
    given["weights"][2] = 0
    assert torch.equal(got[2], torch.zeros(H))
    assert relative_error(got, expected(**given)) < 1e-6


def test_transposed_banks() -> None:
    given = operands()
    right = expected(**given)
    given["up"], given["down"] = given["up"].mT.contiguous(), given["down"].mT.contiguous()
    got = torch.ops.sparsec.experts(**given, activation=ACTIVATION, up_transposed=True, down_transposed=True)
    assert relative_error(got, right) < 1e-6


TAIL = f"""
func @main(%x: tensor<s0x{H}xf32>, %ids: tensor<s0x2xi64>, %w: tensor<s0x2xf32>, %up: tensor<4x12x{H}xf32>,
    %down: tensor<4x{H}x12xf32>, %g: tensor<{H}xf32>) -> (tensor<s0x{H}xf32>) {{
  %y = moe.experts(%x, %ids, %w, %up, %down, none, none, none, none, %g) {{layout = "single"}} : tensor<s0x{H}xf32> {{
    activation(%a: tensor<rx12xf32>):
      yield %a
    tail(%z: tensor<rx{H}xf32>, %g_1: tensor<{H}xf32>):
      %s = aten.mul.Tensor(%z, %z) : tensor<rx{H}xf32>
      %m = aten.mean.dim(%s) {{dim = [-1], keepdim = true}} : tensor<rx1xf32>
      %e = aten.add.Scalar(%m) {{other = 1.0e-6}} : tensor<rx1xf32>
      %i = aten.rsqrt(%e) : tensor<rx1xf32>
      %n = aten.mul.Tensor(%z, %i) : tensor<rx{H}xf32>
      %o = aten.mul.Tensor(%n, %g_1) : tensor<rx{H}xf32>
      yield %o
  }}
  return %y
}}"""
"""A bank whose experts' results are normalised."""
NORM = region.encode(parse_module(TAIL).main.body.ops[0].regions[1])


def finished(given: dict[str, Tensor], scale: Tensor) -> Tensor:
    """Every expert's result normalised before it is weighed, x weighed in front of the experts."""
    out = torch.zeros(T, H)
    for t, slot in itertools.product(range(T), range(K)):
        e = int(given["ids"][t, slot])
        x = given["x"][t] * given["weights"][t, slot]
        y = F.linear(swiglu(F.linear(x, given["up"][e], given["up_bias"][e])), given["down"][e], given["down_bias"][e])
        out[t] += F.rms_norm(y, (H,), scale, 1e-6)
    return out


@pytest.mark.parametrize("by", ["reference", "runtime"])
def test_weights_on_the_input_and_a_tail(by: str) -> None:
    given, scale = operands(), torch.rand(H)
    kernel: Any = experts_op.reference if by == "reference" else sparsec.hf.run
    got = kernel(**given, tail_params=[scale], activation=ACTIVATION, weight_on="input", tail=NORM)
    assert relative_error(got, finished(given, scale)) < 1e-5


def test_a_bound_kernel_runs_instead() -> None:
    seen = list[str]()

    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs["activation"])
        return experts_op.reference(*args, **kwargs)

    experts_op.set_experts_kernel(kernel)
    try:
        torch.ops.sparsec.experts(**operands(), activation=ACTIVATION)
    finally:
        experts_op.set_experts_kernel(None)
    torch.ops.sparsec.experts(**operands(), activation=ACTIVATION)
    assert seen == [ACTIVATION]


def test_torch_finds_the_operator_sound() -> None:
    given = operands()
    operator = torch.ops.sparsec.experts.default
    torch.library.opcheck(operator, tuple(given.values()), {"activation": ACTIVATION})
    more = {"activation": ACTIVATION, "tail": NORM, "weight_on": "input"}
    torch.library.opcheck(operator, (*given.values(), [torch.rand(H)]), more)


class Layer(nn.Module):
    """A hand-written layer over the operator."""

    def __init__(self) -> None:
        super().__init__()
        given = operands()
        self.gate = nn.Linear(H, E, bias=False)
        self.up, self.down = nn.Parameter(given["up"]), nn.Parameter(given["down"])

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = torch.topk(torch.softmax(self.gate(x), dim=-1), K)
        return torch.ops.sparsec.experts(x, ids, weights, self.up, self.down, activation=ACTIVATION)


def test_a_hand_written_layer_is_captured_with_its_region(tmp_path: Path) -> None:
    layer = Layer().eval()
    captured = capture(layer, (torch.randn(T, H),))
    verify_module(captured.module)
    (bank,) = [op for op in captured.module.walk() if op.name == "moe.experts"]
    assert [op.name for op in bank.regions[0].ops] == ["aten.silu", "aten.mul.Tensor", "moe.yield"]
    assert bank.loc.file.endswith("test_experts_op.py")
    for tokens in (T, 1, 20):
        x = torch.randn(tokens, H)
        assert torch.equal(outputs(captured, x)[0], layer(x))


class Bank(nn.Module):
    """A layer without its router."""

    def __init__(self) -> None:
        super().__init__()
        weights = operands()
        self.up, self.down = nn.Parameter(weights["up"]), nn.Parameter(weights["down"])

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.ops.sparsec.experts(x, ids, weights, self.up, self.down, activation=ACTIVATION)


def test_weights_fix_the_columns_of_a_bank_alone() -> None:
    given = operands()
    captured = capture(Bank().eval(), (given["x"], given["ids"], given["weights"]), dynamic=True)
    verify_module(captured.module)
    shapes = [arg.tensor.shape for arg in captured.module.main.body.args[:3]]
    assert shapes == [("s0", H), ("s0", K), ("s0", K)]
    for tokens in (T, 1):
        x, ids, weights = (given[name][:tokens] for name in ("x", "ids", "weights"))
        torch.testing.assert_close(outputs(captured, x, ids, weights)[0], Bank()(x, ids, weights))


def test_a_trace_refuses_operands_that_do_not_fit() -> None:
    x, ids, weights = (operands()[name] for name in ("x", "ids", "weights"))
    with torch.no_grad():
        for wrong, said in (
            ((x[:, 1:], ids, weights), f"x has {H - 1} columns, the experts take {H}"),
            ((x[1:], ids, weights), r"x has shape \[6, 16\], ids \[7, 2\]"),
            ((x, ids, weights[:, :1]), r"weights has shape \[7, 1\], ids \[7, 2\]"),
        ):
            with pytest.raises(CompileError, match=said):
                capture(Bank().eval(), wrong, dynamic=False)


class Finished(Layer):
    """Weighs x, and normalises what each expert yields."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = torch.topk(torch.softmax(self.gate(x), dim=-1), K)
        return torch.ops.sparsec.experts(
            x, ids, weights, self.up, self.down, None, None, [self.gate.weight[0]],
            activation=ACTIVATION, weight_on="input", tail=NORM,
        )  # fmt: skip


def test_a_tail_is_captured_with_its_parameters() -> None:
    layer = Finished().eval()
    captured = capture(layer, (torch.randn(T, H),))
    verify_module(captured.module)
    (bank,) = [op for op in captured.module.walk() if isinstance(op, Experts)]
    assert bank.weight_on == "input"
    assert bank.tail is not None
    assert [op.name for op in bank.tail.ops][1] == "aten.mean.dim"
    for tokens in (T, 1, 20):
        x = torch.randn(tokens, H)
        assert torch.equal(outputs(captured, x)[0], layer(x))


def test_it_survives_a_pt2_file(tmp_path: Path) -> None:
    layer = Layer().eval()
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(layer, (torch.randn(T, H),), dynamic_shapes=dynamic, strict=False)
    torch.export.save(program, tmp_path / "layer.pt2")
    captured = capture(tmp_path / "layer.pt2")
    x = torch.randn(3, H)
    assert torch.equal(outputs(captured, x)[0], layer(x))


def test_a_backward_says_that_there_is_none() -> None:
    given = operands()
    out = torch.ops.sparsec.experts(**{**given, "up": given["up"].requires_grad_()}, activation=ACTIVATION)
    with pytest.raises(NotImplementedError, match=r"no backward.*torch\.no_grad"):
        out.sum().backward()
