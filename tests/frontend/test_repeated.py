"""Blocks that a model repeats are captured once, and the whole is what it would be without that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsec import pipeline
from sparsec.frontend import repeated
from sparsec.frontend.capture import capture
from sparsec.ir.core import Module
from sparsec.ir.interp import evaluate_module
from sparsec.ir.parser import parse_module
from sparsec.ir.printer import print_module

H, WIDTH, E, K = 16, 8, 4, 2


class Block(nn.Module):
    """A router and a loop over stacked experts; `scale` is read, `index` is not."""

    def __init__(self, index: int, scale: float = 1.0) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.up = nn.Parameter(torch.randn(E, WIDTH, H))
        self.down = nn.Parameter(torch.randn(E, H, WIDTH))
        self.register_buffer("bias", torch.randn(E))
        self.index, self.scale = index, scale

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = torch.topk(F.softmax(self.gate(x) + self.bias, -1), K)
        return weights * self.scale, ids

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, H)
        weights, ids = self.route(rows)
        out = torch.zeros_like(rows)
        for expert in range(E):
            token, slot = torch.where(ids == expert)
            y = F.linear(F.silu(F.linear(rows[token], self.up[expert])), self.down[expert])
            out.index_add_(0, token, y * weights[token, slot, None])
        return out.view_as(x)


class Tuple(Block):
    """Takes a keyword and returns a tuple with a constant in it."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Any:
        assert mask is not None
        return super().forward(x * mask.unsqueeze(-1)), (self.gate(x), None)


class Listed(Block):
    """Experts as a list of modules; makes a constant."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        del self.up, self.down
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(H, WIDTH), nn.ReLU(), nn.Linear(WIDTH, H)) for _ in range(E)
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, H)
        weights, ids = self.route(rows * torch.tensor(0.5))
        out = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            out = out + expert(rows) * (weights * (ids == i)).sum(-1, keepdim=True)
        return out.view_as(x)


class Model(nn.Module):
    def __init__(self, make: Callable[[int], nn.Module], layers: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, H)
        self.layers = nn.ModuleList(make(i) for i in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            if isinstance(layer, Tuple):
                y, (logits, _) = layer(x, mask=(ids > 3).to(x.dtype))
                x = x + y * logits.sum()
            else:
                x = x + layer(x)
        return x


def check(model: Any, functions: int) -> Any:
    """The capture has so many functions besides `main`, and computes what the model computes, inlined too."""
    captured = capture(model.eval(), (torch.randint(0, 32, (2, 5)),))
    assert len(captured.module.funcs) == 1 + functions
    assert not captured.warnings
    text = print_module(captured.module)
    assert print_module(parse_module(text)) == text
    for module in (captured.module, pipeline.run_passes(parse_module(text), "inline").module):
        for shape in ((2, 7), (3, 12)):
            ids = torch.randint(0, 32, shape)
            weights = captured.weights
            torch.testing.assert_close(evaluate_module(module, [ids], weights)[0], model(ids), rtol=1e-5, atol=1e-5)
    return captured


def without(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(repeated, "candidates", lambda model: {})
        return capture(model, (torch.randint(0, 32, (2, 5)),))


@pytest.mark.parametrize("make", [Block, Tuple, Listed], ids=lambda cls: cls.__name__)
def test_same_program_as_without_blocks(make: Callable[[int], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(make).eval()
    captured = check(model, 1)
    plain = without(model, monkeypatch)
    assert set(plain.weights) >= {name for name in captured.weights if "block_" not in name}
    inlined = pipeline.run_passes(captured.module, "inline").module
    ids = torch.randint(0, 32, (3, 9))
    (a,), (b,) = evaluate_module(inlined, [ids], captured.weights), evaluate_module(plain.module, [ids], plain.weights)
    assert torch.equal(a, b)
    assert places(inlined) >= {place for place in places(plain.module) if "layers.1" in place[1]}


def places(module: Module) -> set[tuple[str, str]]:
    return {(str(op.loc), op.loc.scope) for op in module.walk() if op.loc}


def test_an_attribute_that_code_reads_makes_another_block() -> None:
    check(Model(lambda i: Block(i, scale=1.0 + i % 2), layers=4), 2)


def test_a_list_of_layers_is_no_block() -> None:
    model = Model(Block, layers=6)
    assert set(repeated.candidates(model)) == {f"layers.{i}" for i in range(6)}


def test_a_lone_block_is_traced_in_its_place() -> None:
    check(Model(Block, layers=1), 0)


def test_shared_weights_are_one_argument() -> None:
    model = Model(Block)
    shared: Any = model.layers[0].up
    for layer in model.layers:
        layer.up = shared
    captured = check(model, 1)
    sources = [str(attrs.get("source")) for attrs in captured.module.main.arg_attrs.values()]
    assert sum(source.endswith(".up") for source in sources) == 1


class Counting(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.bias += 1  # type: ignore[operator, assignment]
        return super().forward(x)


class Fixing(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.ones(x.shape[0], int(x.shape[1]), 1) * (0 if x.shape[1] % 5 else 1)


class Keeping(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.index
        return super().forward(x)


@pytest.mark.parametrize("make", [Counting, Fixing, Keeping], ids=lambda cls: cls.__name__)
def test_what_cannot_be_kept_apart_is_traced_in_its_place(make: Callable[[int], nn.Module]) -> None:
    captured = capture(Model(make).eval(), (torch.randint(0, 32, (2, 5)),))
    assert list(captured.module.funcs) == ["main"]


def test_code_outside_that_reads_a_blocks_weights() -> None:
    class Reading(Model):
        def forward(self, ids: Tensor) -> Tensor:
            layer: Any = self.layers[0]
            return super().forward(ids) + layer.up.sum()

    check(Reading(Block), 0)


def test_the_model_is_as_before() -> None:
    model = Model(Block)
    before = [(vars(part).keys(), type(part)) for part in model.modules()]
    capture(model.eval(), (torch.randint(0, 32, (2, 5)),))
    assert before == [(vars(part).keys(), type(part)) for part in model.modules()]
