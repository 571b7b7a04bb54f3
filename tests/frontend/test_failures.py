"""Forms that torch.export cannot trace end in an error with the user's line and the change that fixes it."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsec.diagnostics import CompileError
from sparsec.frontend import rewrites
from sparsec.frontend.capture import capture
from sparsec.ir.interp import evaluate_module

E = 4


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, E, bias=False)
        self.w = nn.Parameter(torch.randn(E, 8, 8))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = torch.topk(F.softmax(self.gate(x), -1), 2)
        return weights, ids


class SkipEmpty(Base):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            if token.numel() == 0:
                continue
            out.index_add_(0, token, x[token] @ self.w[e] * weights[token, slot, None])
        return out


class LoopOverHits(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(self.route(x)[1], E).permute(2, 1, 0)
        hit = (mask.sum((-1, -2)) > 0).nonzero()
        for e in hit:
            token = torch.where(mask[e[0]])[1]
            out.index_add_(0, token, x[token] @ self.w[e[0]])
        return out


class LoopOverUnique(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in self.route(x)[1].unique().tolist():
            out = out + x @ self.w[e]
        return out


class EnumerateUnique(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, e in enumerate(torch.unique(self.route(x)[1])):
            out = out + i * (x @ self.w[e])
        return out


class RangeOfTensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = x
        for e in list(range(self.route(x)[1].max())):  # type: ignore[call-overload]
            out = out + x @ self.w[e]
        return out


class IfAny(Base):
    def forward(self, x: Tensor) -> Tensor:
        ids = self.route(x)[1]
        out = torch.zeros_like(x)
        for e in range(E):
            mask = (ids == e).any(-1)
            if mask.any():
                out[mask] += x[mask] @ self.w[e]
        return out


class IfCount(Base):
    def forward(self, x: Tensor) -> Tensor:
        ids = self.route(x)[1]
        counts = F.one_hot(ids.flatten(), E).sum(0)
        out = torch.zeros_like(x)
        for e in range(E):
            if counts[e] > 0:
                rows = (ids == e).nonzero()[:, 0]
                out[rows] += x[rows] @ self.w[e]
        return out


class IfElse(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.route(x)[0].sum() > 0:
            return x
        else:
            return -x


class Bincount(Base):
    def forward(self, x: Tensor) -> Tensor:
        ids = self.route(x)[1].flatten()
        sizes = torch.bincount(ids, minlength=E).tolist()
        return torch.cat([rows @ self.w[e] for e, rows in enumerate(x[ids.argsort() // 2].split(sizes))])


class Item(Base):
    def forward(self, x: Tensor) -> Tensor:
        last = int(self.route(x)[1].max().item())
        return x[:last] if last > 2 else x


class Numpy(Base):
    def forward(self, x: Tensor) -> Tensor:
        ids = self.route(x)[1].flatten()
        counts = torch.from_numpy(np.bincount(ids.cpu().numpy(), minlength=E))
        return x * counts.sum()


class While(Base):
    def forward(self, x: Tensor) -> Tensor:
        while x.abs().max() > 1:
            x = x / 2
        return x


class NoClasses(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x * F.one_hot(self.route(x)[1]).sum()


@pytest.mark.parametrize(
    ("form", "message", "change"),
    [
        (SkipEmpty, "this branch depends", "- if token.numel() == 0:\n-     continue"),
        (LoopOverHits, "this loop runs over", "- for e in hit:\n+ for e in range(num_experts):"),
        (LoopOverUnique, "this loop runs over", "+ for e in range(num_experts):"),
        (EnumerateUnique, "this loop runs over", "+ for e in range(num_experts):"),
        (RangeOfTensor, "this loop runs over", "+ for e in range(num_experts):"),
        (IfAny, "this branch depends", "+ out[mask] += x[mask] @ self.w[e]"),
        (IfCount, "this branch depends", "+ rows = (ids == e).nonzero()[:, 0]\n+ out[rows] += x[rows] @ self.w[e]"),
        (Bincount, "the sizes here depend", "+ sizes = F.one_hot(ids, E).sum(0).tolist()"),
        (Item, "needs a value", "+ last = num_experts"),
        (Numpy, "numpy computes outside", "+ counts = F.one_hot(ids, E).sum(0)"),
        (While, "how often this loop runs", "+ for _ in range(max_steps):"),
        (NoClasses, "the width of this result", "+ return x * F.one_hot(self.route(x)[1], num_experts).sum()"),
    ],
)
def test_the_line_and_its_change(form: Any, message: str, change: str) -> None:
    with pytest.raises(CompileError, match=message) as caught:
        capture(form().eval(), (torch.randn(6, 8),))
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.loc.file.endswith("test_failures.py")
    assert change in diagnostic.excerpt
    assert diagnostic.excerpt.splitlines()[0] == f"- {diagnostic.loc.source}"


def test_a_branch_with_two_sides_is_not_left_out() -> None:
    with pytest.raises(CompileError, match="this branch depends") as caught:
        capture(IfElse().eval(), (torch.randn(6, 8),))
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.excerpt == "" and "torch.where" in diagnostic.hint


@pytest.mark.parametrize("form", [LoopOverHits, SkipEmpty, IfAny, IfCount])
def test_the_changed_code_is_captured(form: Any) -> None:
    """What the change says is done to this file's own source, and the result is captured."""
    source = inspect.getsource(form)
    with pytest.raises(CompileError) as caught:
        capture(form().eval(), (torch.randn(6, 8),))
    (diagnostic,) = caught.value.diagnostics
    lines = diagnostic.excerpt.splitlines()
    before, after = ([line[2:] for line in lines if line[0] == sign] for sign in "-+")
    code = source.splitlines()
    at = next(i for i, line in enumerate(code) if line.strip() == before[0])
    indent = " " * (len(code[at]) - len(code[at].lstrip()))
    code[at : at + len(before)] = [indent + line for line in after]
    space: dict[str, Any] = dict(globals())
    exec("\n".join(code).replace("num_experts", "E").replace("e[0]", "e"), space)  # noqa: S102
    model = form().eval()
    changed = space[form.__name__]().eval()
    changed.load_state_dict(model.state_dict())
    captured = capture(changed, (torch.randn(6, 8),))
    x = torch.randn(9, 8)
    torch.testing.assert_close(evaluate_module(captured.module, [x], captured.weights)[0], model(x))


def test_a_comparison_in_the_place_of_one_hot() -> None:
    change = rewrites.exact_classes(["    seats = F.one_hot(place, num_classes=c).to(x.dtype)\n"])
    assert change is not None
    assert change.after == ("seats = (place.unsqueeze(-1) == torch.arange(c, device=place.device)).long().to(x.dtype)",)
