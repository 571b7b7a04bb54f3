"""`sparsec.register_experts` and `sparsec.ops`, with experts that no library knows."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsec
from sparsec.diagnostics import CompileError, SparsecError
from sparsec.frontend.adapters import registry
from sparsec.frontend.capture import capture
from tests.frontend.helpers import outputs, relative_error

H, WIDTH, E, K = 16, 12, 4, 2


class Bank(nn.Module):
    """Runs the experts that were hit, one by one, which torch.export cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.gates, self.ups, self.downs = (
            nn.ParameterList(torch.randn(shape, generator=rng) * 0.3 for _ in range(E))
            for shape in ((WIDTH, H), (WIDTH, H), (H, WIDTH))
        )

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            token, slot = torch.where(ids == e)
            h = F.silu(F.linear(x[token], self.gates[e])) * F.linear(x[token], self.ups[e])
            out.index_add_(0, token, F.linear(h, self.downs[e]) * weights[token, slot, None])
        return out


class Layer(nn.Module):
    def __init__(self, bank: type[nn.Module] = Bank) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(H, E)
        self.bank: Any = bank()

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        return self.bank(x, ids, weights)


def adapter(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return sparsec.ops.experts(
        x, ids, weights, module.ups, module.downs, gate=module.gates, activation=lambda g, u: F.silu(g) * u
    )


@contextmanager
def registered(target: Any, run: Any = adapter, **method: str) -> Generator[None, None, None]:
    sparsec.register_experts(target, run, **method)
    try:
        yield
    finally:
        sparsec.unregister_experts(target, **method)


def banks(module: Any) -> int:
    return sum(op.name == "moe.experts" for op in module.walk())


@pytest.mark.parametrize("target", [Bank, f"{__name__}:Bank", "test_adapters:Bank"])
def test_a_registered_class_is_captured_whole(target: Any) -> None:
    layer = Layer()
    with registered(target):
        captured = capture(layer, (torch.randn(5, H),))
    assert banks(captured.module) == 1
    for tokens in (1, 37, 300):
        x = torch.randn(tokens, H)
        with torch.no_grad():
            assert relative_error(outputs(captured, x)[0], layer(x)) < 1e-5


def test_the_model_is_as_before_after_a_capture_that_fails() -> None:
    def fails(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        raise ValueError("no such weight")

    layer = Layer()
    with registered(Bank, fails), pytest.raises(CompileError, match="no such weight"):
        capture(layer, (torch.randn(5, H),))
    assert "forward" not in vars(layer.bank)
    assert layer.bank.forward.__func__ is Bank.forward


def test_subclasses_are_meant_unless_they_override_the_method() -> None:
    class Same(Bank):
        pass

    class Other(Bank):
        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return x

    with registered(Bank):
        same, other = Layer(Same), Layer(Other)
        with registry.adapted(same), registry.adapted(other):
            assert same.bank.forward.__func__ is adapter
            assert "forward" not in vars(other.bank)


def test_another_method_can_be_replaced() -> None:
    class Two(nn.Module):
        def halved(self, x: Tensor) -> Tensor:
            return x / 2 if x.sum() > 0 else x

        def forward(self, x: Tensor) -> Tensor:
            return self.halved(x)

    with registered(Two, lambda module, x: x / 2, method="halved"):
        captured = capture(Two(), (torch.ones(3, 2),))
    assert torch.equal(outputs(captured, torch.full((5, 2), -1.0))[0], torch.full((5, 2), -0.5))


def test_a_method_replaced_on_the_module_itself_is_left_alone() -> None:
    layer = Layer()
    layer.bank.forward = own = lambda x, ids, weights: x
    with registered(Bank):
        with registry.adapted(layer):
            assert layer.bank.forward is own
        assert layer.bank.forward is own


def test_a_decorator() -> None:
    @sparsec.register_experts(Bank)
    def mine(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return adapter(module, x, ids, weights)

    layer = Layer()
    with registry.adapted(layer):
        assert layer.bank.forward.__func__ is mine
    sparsec.unregister_experts(Bank)
    with registry.adapted(layer):
        assert "forward" not in vars(layer.bank)


@pytest.mark.parametrize(
    ("target", "method", "message"),
    [
        ("Bank", "forward", "'Bank' names no class: write it as 'package.module:Class'"),
        (Bank(), "forward", "is no class of modules"),
        (int, "forward", "is no class of modules"),
        (Bank, "backwards", "Bank has no method 'backwards'"),
    ],
)
def test_a_target_that_cannot_be_meant(target: Any, method: str, message: str) -> None:
    with pytest.raises(SparsecError, match=message):
        sparsec.register_experts(target, adapter, method=method)


def test_an_adapter_that_is_no_function() -> None:
    with pytest.raises(SparsecError, match="is a str, not a function"):
        sparsec.register_experts(Bank, "adapter")  # type: ignore[call-overload]


def test_a_class_without_the_method_is_named_with_its_line() -> None:
    with (
        registered("test_adapters:Bank", method="run"),
        pytest.raises(CompileError, match=r"test_adapters\.py:\d+: error: .*'run' of test_adapters:Bank, which has no"),
        registry.adapted(Layer()),
    ):
        pass


def test_there_is_no_adapter_to_forget() -> None:
    with pytest.raises(SparsecError, match="no adapter is registered for 'forward'"):
        sparsec.unregister_experts(Bank)
