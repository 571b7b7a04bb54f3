"""From exported programs to modules."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.utils._sympy.functions import CeilDiv, FloorDiv, Max, Min, Mod

from sparsec.diagnostics import CompileError
from sparsec.frontend.capture import capture
from sparsec.frontend.symbols import Symbols
from sparsec.ir.core import Op
from sparsec.ir.types import Sym, SymType, TensorType, evaluate
from sparsec.ir.verify import verify_module
from tests.frontend.helpers import outputs

S: Any = sympy.Symbol("s7", positive=True, integer=True)
N: Any = sympy.Symbol("s3", positive=True, integer=True)
FLOOR: Any = FloorDiv
MOD: Any = Mod


@pytest.mark.parametrize(
    "expr",
    [S + 1, S * N, 2 * S - N + 3, S**2 * N, FLOOR(S + 7, 8), MOD(S, 4) + 1, Max(S, N), Min(S, 3) * N, CeilDiv(S, 4),
     S - N, -S + 20, 3 * (S + N), FLOOR(S * N, 4) * 4],
)  # fmt: skip
def test_size_expressions_keep_their_value(expr: sympy.Expr) -> None:
    renamed = Symbols()
    dim = Sym(renamed._text(expr, 1))
    assert sorted(renamed.names.values()) == [f"s{i}" for i in range(len(expr.free_symbols))]
    for s, n in ((5, 3), (12, 7), (1, 1)):
        values = {renamed.names[symbol]: s if symbol == S else n for symbol in renamed.names}
        assert evaluate(dim, values) == int(expr.subs({S: s, N: n}))


def ops(model: nn.Module, *args: Tensor) -> list[Op]:
    captured = capture(model.eval(), args)
    verify_module(captured.module)
    return captured.module.main.body.ops


class Counter(nn.Module):
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x.sum(0))
        return self.total * 2


def test_a_changed_buffer_is_a_result_of_its_own() -> None:
    captured = capture(Counter(), (torch.ones(3, 4),))
    main = captured.module.main
    assert list(main.result_attrs.values()) == [{"kind": "output"}, {"kind": "mutation", "source": "total"}]
    twice, total = outputs(captured, torch.ones(5, 4))
    assert torch.equal(total, torch.full((4,), 5.0))
    assert torch.equal(twice, total * 2)
    assert torch.equal(captured.weights["total"], torch.zeros(4))


class Several(nn.Module):
    def forward(self, x: Tensor, pair: dict[str, Tensor]) -> tuple[Tensor, dict[str, list[Tensor | None]]]:
        a, b = x.split([1, 3], dim=1)
        return a, {"rest": [b + pair["y"], None]}


def test_arguments_and_results_keep_their_structure() -> None:
    captured = capture(Several(), (torch.ones(3, 4),), {"pair": {"y": torch.ones(3, 3)}})
    assert captured.inputs_json["kwargs"]["items"][0] == {
        "kind": "dict",
        "keys": ["y"],
        "items": [{"kind": "leaf", "index": 1}],
    }
    rest = {"kind": "list", "items": [{"kind": "leaf", "index": 1}, {"kind": "const", "value": None}]}
    assert captured.structure_json == {
        "kind": "tuple",
        "items": [{"kind": "leaf", "index": 0}, {"kind": "dict", "keys": ["rest"], "items": [rest]}],
    }
    a, b = outputs(captured, torch.ones(2, 4), torch.ones(2, 3))
    assert a.shape == (2, 1)
    assert torch.equal(b, torch.full((2, 3), 2.0))


class Chosen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        rows = torch.nonzero(x[:, 0] > 0).flatten()
        return x[rows] * 2


def test_a_size_known_at_run_time_has_a_symbol_of_its_own() -> None:
    captured = capture(Chosen(), (torch.randn(6, 4),))
    (result,) = captured.module.main.result_types
    assert isinstance(result, TensorType)
    assert result.shape == (Sym("u0"), Sym("s1"))
    x = torch.randn(9, 4)
    assert torch.equal(outputs(captured, x)[0], Chosen()(x))


class Item(nn.Module):
    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        count: Any = n.item()
        torch._check(count >= 2)
        torch._check(count < x.shape[0])
        return x.narrow(0, 0, count)


def test_an_item_is_a_symbol() -> None:
    captured = capture(Item(), (torch.randn(6, 4), torch.tensor([3])), dynamic=False)
    assert SymType(Sym("u0")) in [result.type for op in captured.module.main.body.ops for result in op.results]
    x = torch.randn(6, 4)
    assert torch.equal(outputs(captured, x, torch.tensor([5]))[0], x[:5])


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.linear(x).transpose(0, 1).contiguous().view(-1)
        return (y + 1).to(torch.bfloat16) * torch.tensor([2.0], device=x.device)


def test_ops_are_functional_and_say_nothing_of_devices_or_layouts() -> None:
    made = ops(Plain(), torch.randn(3, 4))
    assert "aten.add.Scalar" in [op.name for op in made]
    assert not {"device", "pin_memory", "memory_format"} & {key for op in made for key in op.attrs}
    assert not any("view" in op.name for op in made)


def test_only_weights_that_are_read_are_kept() -> None:
    captured = capture(Plain(), (torch.randn(3, 4),))
    named = {name for name in captured.weights if name.startswith(("linear", "unused"))}
    assert named == {"linear.weight", "linear.bias"}
    x = torch.randn(7, 4)
    assert torch.equal(outputs(captured, x)[0], Plain.forward(_with(captured.weights), x))


def _with(weights: dict[str, Tensor]) -> Plain:
    model = Plain()
    model.load_state_dict({k: v for k, v in weights.items() if k.startswith("linear")}, strict=False)
    return model


def test_every_op_knows_the_users_line_and_module() -> None:
    (linear,) = [op for op in ops(Plain(), torch.randn(3, 4)) if op.name == "aten.linear"]
    assert linear.loc.file.endswith("test_importer.py")
    assert linear.loc.source == "y = self.linear(x).transpose(0, 1).contiguous().view(-1)"
    assert linear.loc.scope == "linear"


class Complex(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x.double()).real


def test_what_the_ir_cannot_hold_is_named_with_its_line() -> None:
    with pytest.raises(CompileError, match=r"test_importer\.py:\d+: error: 'aten\.fft_fft\.default' .*complex128"):
        capture(Complex(), (torch.randn(3, 4),))


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.add_(1)
        return x * 2


def test_an_argument_changed_in_place_is_refused() -> None:
    with pytest.raises(CompileError, match="user input mutation of 'x'"):
        capture(InPlace(), (torch.randn(3, 4),))
