"""Banks of experts found by what they compute: any number of experts, and nothing that is not one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsec import pipeline
from sparsec.diagnostics import Remark
from sparsec.frontend.capture import capture
from sparsec.ir.interp import evaluate_module

WIDTH, INNER = 16, 12


class Bank(nn.Module):
    """A router and the matrices of experts; subclasses spell the layer."""

    def __init__(self, experts: int = 6, k: int = 2) -> None:
        super().__init__()
        self.count, self.k = experts, k
        self.gate = nn.Linear(WIDTH, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, INNER, WIDTH) * 0.3)
        self.down = nn.Parameter(torch.randn(experts, WIDTH, INNER) * 0.3)

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = F.softmax(self.gate(x), dim=-1).topk(self.k, dim=-1)
        return weights, ids

    def expert(self, x: Tensor, number: int) -> Tensor:
        return F.linear(F.relu(F.linear(x, self.up[number])), self.down[number])


class Loop(Bank):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        out = torch.zeros_like(x)
        for number in range(self.count):
            row, slot = torch.where(ids == number)
            out = out.index_add(0, row, self.expert(x[row], number) * weights[row, slot, None])
        return out


class SlicedGate(Bank):
    """A Python sum over experts, each weighed by a column of a sparse gate."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        share = torch.zeros(x.shape[0], self.count).scatter(1, ids, weights)
        return sum((share[:, i : i + 1] * self.expert(x, i) for i in range(self.count)), torch.zeros_like(x))


class FlattenedMask(Bank):
    """A mask of the batch, flattened where it takes rows and whole where it puts them."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        share = torch.zeros(*x.shape[:-1], self.count).scatter(-1, ids, weights)
        out, flat, gate = torch.zeros_like(x), x.reshape(-1, WIDTH), share.reshape(-1, self.count)
        for number in range(self.count):
            mine = (ids == number).any(-1)
            rows = mine.reshape(-1)
            out[mine] += self.expert(flat[rows], number) * gate[rows, number].unsqueeze(1)
        return out


class ThreeFactors(Bank):
    """Activation, second matrix and gate in one einsum."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        share = (F.one_hot(ids, self.count) * weights[..., None]).sum(1)
        hidden = F.relu(torch.einsum("th,eih->eti", x, self.up))
        return torch.einsum("eti,ehi,te->th", hidden, self.down, share)


class SlicedRows(Bank):
    """Sorted rows cut by running sums of counts."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        flat = ids.view(-1)
        order = flat.argsort()
        rows, done, first = x[order // self.k], list[Tensor](), 0
        for number, count in enumerate(F.one_hot(flat, self.count).sum(0).tolist()):
            done.append(self.expert(rows[first : first + count], number))
            first = first + count
        y = torch.cat(done) * weights.view(-1)[order].unsqueeze(-1)
        return torch.zeros_like(x).scatter_add(0, (order // self.k).unsqueeze(-1).expand_as(y), y)


class SeatsOfEachSequence(Bank):
    """One expert for each token, eight seats of each expert for each sequence, an exclusive running count."""

    def forward(self, x: Tensor) -> Tensor:
        best, ids = self.gate(x).softmax(-1).max(-1)
        chosen = F.one_hot(ids, self.count).float()
        place = (chosen.cumsum(1) - chosen) * chosen
        kept = (chosen * (place < 8)).sum(-1)
        seat = (place.sum(-1)[..., None].long() == torch.arange(8)).float()
        combine = (best * kept)[..., None, None] * chosen[..., None] * seat[..., None, :]
        inside = torch.einsum("bnd,bnec->ebcd", x, combine.bool().to(x))
        hidden = F.relu(torch.einsum("ebcd,eid->ebci", inside, self.up))
        return torch.einsum("ebcd,bnec->bnd", torch.einsum("ebci,edi->ebcd", hidden, self.down), combine)


class Linears(Bank):
    """Experts of one linear layer each."""

    def __init__(self, experts: int = 6, k: int = 2) -> None:
        super().__init__(experts, k)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, INNER) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        out = torch.zeros(x.shape[0], INNER)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(ids == number)
            out.index_add_(0, row, expert(x[row]) * weights[row, slot, None])
        return out


class FirstHalf(Bank):
    """Only half of the experts that there are matrices for are ever used."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        out = torch.zeros_like(x)
        for number in range(self.count // 2):
            row, slot = torch.where(ids == number)
            out = out.index_add(0, row, self.expert(x[row], number) * weights[row, slot, None])
        return out


class FewerClasses(Bank):
    """A gate over half of the experts, by a one-hot of half of the classes."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        half = self.count // 2
        share = (F.one_hot(ids % half, half) * weights[..., None]).sum(1)
        hidden = F.relu(torch.einsum("th,eih->tei", x, self.up[:half]))
        return torch.einsum("te,tei,ehi->th", share, hidden, self.down[:half])


class Clamped(Bank):
    """Every expert from 2 on computes with the matrices of expert 2."""

    highest = 2

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        weights = weights.masked_fill(ids >= self.count, 0.0)
        kept = ids.clamp(0, self.highest)
        hidden = F.relu(torch.einsum("th,tkih->tki", x, self.up[kept]))
        return (torch.einsum("tki,tkhi->tkh", hidden, self.down[kept]) * weights[..., None]).sum(1)


class ClampedInRange(Clamped):
    """The clamp keeps every id that counts."""

    highest = 5


class Swapped(Bank):
    """Expert i has the second matrix of its neighbour."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        up, down = self.up[ids], self.down[(ids + 1) % self.count]
        hidden = F.relu(torch.einsum("th,tkih->tki", x, up))
        return (torch.einsum("tki,tkhi->tkh", hidden, down) * weights[..., None]).sum(1)


class NegativeWeights(Bank):
    """`share > 0` drops the experts of negative weight, which multiplying by the share would not."""

    def forward(self, x: Tensor) -> Tensor:
        top, ids = self.gate(x).topk(self.k, dim=-1)
        share = torch.zeros(x.shape[0], self.count, device=x.device).scatter(1, ids, top)
        out = torch.zeros_like(x)
        for number in range(self.count):
            mine = share[:, number] > 0
            out[mine] += self.expert(x[mine], number) * share[mine, number].unsqueeze(1)
        return out


class BiasOfUnchosen(Bank):
    """Every expert runs on rows of zeros too, and its bias makes something of them."""

    def forward(self, x: Tensor) -> Tensor:
        top, ids = self.gate(x).topk(1, dim=-1)
        score = torch.full((x.shape[0], self.count), float("-inf")).scatter(1, ids, top).sigmoid().t()
        every = x.expand(self.count, -1, -1) * score.unsqueeze(-1)
        hidden = F.relu(every @ self.up.transpose(1, 2) + 1.0)
        return (hidden @ self.down.transpose(1, 2)).sum(0)


BATCHED = (FlattenedMask, SeatsOfEachSequence)


def raised(layer: nn.Module) -> tuple[int, list[Remark], Callable[[Tensor], Tensor]]:
    """How many banks a layer has after `raise`, what was missed, and how it computes."""
    rows = torch.randn(2, 5, WIDTH) if isinstance(layer, BATCHED) else torch.randn(5, WIDTH)
    captured = capture(layer.eval(), (rows,))
    result = pipeline.run(captured.module, to="raise")
    banks = sum(op.name == "moe.experts" for op in result.module.main.body.ops)
    missed = [remark for remark in result.remarks if remark.kind == "missed"]

    def run(x: Tensor) -> Tensor:
        out: Tensor = evaluate_module(result.module, [x], captured.weights)[0]
        return out

    return banks, missed, run


def check(layer: nn.Module, run: Callable[[Tensor], Tensor]) -> None:
    for tokens in (1, 7, 40):
        x = torch.randn(2, tokens, WIDTH) if isinstance(layer, BATCHED) else torch.randn(tokens, WIDTH)
        with torch.no_grad():
            torch.testing.assert_close(run(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("experts", [2, 16, 48])
def test_a_loop_over_any_number_of_experts_is_one_bank(experts: int) -> None:
    torch.manual_seed(0)
    layer = Loop(experts)
    banks, missed, run = raised(layer)
    assert (banks, missed) == (1, [])
    check(layer, run)


@pytest.mark.parametrize(
    "kind", [ClampedInRange, SlicedGate, FlattenedMask, ThreeFactors, SlicedRows, SeatsOfEachSequence]
)
def test_a_spelling_of_a_bank_is_one(kind: type[Bank]) -> None:
    torch.manual_seed(2)
    layer = kind()
    banks, missed, run = raised(layer)
    assert (banks, missed) == (1, [])
    check(layer, run)


def test_linear_experts_are_a_grouped_linear() -> None:
    layer = Linears()
    captured = capture(layer.eval(), (torch.randn(5, WIDTH),))
    result = pipeline.run(captured.module, to="raise")
    assert [op.name for op in result.module.main.body.ops if op.dialect == "moe"] == ["moe.route", "moe.grouped_linear"]
    check(layer, lambda x: evaluate_module(result.module, [x], captured.weights)[0])


@pytest.mark.parametrize("kind", [FirstHalf, FewerClasses, Clamped, Swapped, NegativeWeights, BiasOfUnchosen])
def test_what_only_looks_like_a_bank_stays_right(kind: type[Bank]) -> None:
    torch.manual_seed(1)
    layer = kind()
    _, _, run = raised(layer)
    check(layer, run)


def test_a_bank_that_is_not_found_is_said_with_the_line() -> None:
    banks, missed, _ = raised(FirstHalf())
    assert banks == 0
    (remark,) = [remark for remark in missed if remark.pass_name == "raise-experts"]
    assert "3 of 6 experts" in remark.message and remark.loc.file.endswith("test_raise_experts.py")
    assert remark.suggestion


def test_a_raised_bank_names_the_lines_that_it_stands_for() -> None:
    captured = capture(Loop().eval(), (torch.randn(5, WIDTH),))
    result = pipeline.run(captured.module, to="raise")
    (bank,) = (op for op in result.module.main.body.ops if op.name == "moe.experts")
    lines = {origin.source for origin in (bank.loc, *bank.loc.origins)}
    assert any("torch.where(ids == number)" in line for line in lines)
