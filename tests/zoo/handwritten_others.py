"""Hand-written layers that are not fused: other maths than chosen experts of two linear layers, or no way to trace."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.handwritten import _Gated, _Modules, _Stacked


class ExpertsChoose(_Stacked):
    """Expert choice: each expert takes the tokens that it likes best, so a token's experts depend on other tokens."""

    expect = "left"

    def forward(self, x: Tensor) -> Tensor:
        affinity = self.router(x).softmax(-1)
        share, row = affinity.t().topk(min(4, x.shape[0]), dim=-1)
        taken = x[row]
        done = torch.bmm(F.silu(torch.bmm(taken, self.gate)) * torch.bmm(taken, self.up), self.down)
        return torch.zeros_like(x).index_add(0, row.flatten(), (done * share.unsqueeze(-1)).flatten(0, 1))


class SoftSlots(_Stacked):
    """Soft MoE: each slot is a mean over all tokens. Nothing is chosen."""

    expect = "left"

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        slots = logits.softmax(dim=0).t() @ x
        hidden = F.silu(torch.einsum("eh,ehi->ei", slots, self.gate)) * torch.einsum("eh,ehi->ei", slots, self.up)
        return logits.softmax(dim=1) @ torch.einsum("ei,eih->eh", hidden, self.down)


class BelowThreshold(_Stacked):
    """Whatever is smaller than the k-th greatest logit is masked: with ties more than k experts count."""

    expect = "left"

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        least = logits.topk(self.k, dim=-1).values[:, -1:]
        share = F.softmax(logits.masked_fill(logits < least, float("-inf")), dim=-1)
        inner = F.silu(torch.einsum("th,ehi->tei", x, self.gate)) * torch.einsum("th,ehi->tei", x, self.up)
        return torch.einsum("te,tei,eih->th", share, inner, self.down)


class AllExperts(_Gated):
    """A dense mixture: every expert counts for every token."""

    expect = "left"

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x).softmax(-1)
        return sum(expert(x) * share[:, i : i + 1] for i, expert in enumerate(self.experts))  # type: ignore[return-value]


class _Residual(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class _Normed(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))


class _WhereLoop(_Modules):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(ids == number)
            out.index_add_(0, row, expert(x[row]) * weights[row, slot, None])
        return out


class ResidualInside(_WhereLoop):
    """The expert adds its input to its output."""

    expect = "left"

    def expert(self) -> nn.Module:
        return _Residual(self.width, self.inner)


class NormBeforeGemm(_WhereLoop):
    """The expert normalises its rows with a norm of its own before the first matrix."""

    expect = "left"

    def expert(self) -> nn.Module:
        return _Normed(self.width, self.inner)


class ThreeLayers(_WhereLoop):
    """The expert has three linear layers."""

    expect = "left"

    def expert(self) -> nn.Module:
        inner = [nn.Linear(self.width, self.inner), nn.ReLU(), nn.Linear(self.inner, self.inner), nn.ReLU()]
        return nn.Sequential(*inner, nn.Linear(self.inner, self.width))


class UnequalExperts(_WhereLoop):
    """Every expert has a width of its own, so there is no bank."""

    expect = "left"

    def make_experts(self) -> None:
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(self.width, 8 * i + 8), nn.ReLU(), nn.Linear(8 * i + 8, self.width))
            for i in range(self.count)
        )


class OneExpertScaled(_Gated):
    """One expert is multiplied by two: the bodies are not alike."""

    expect = "right"

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(ids == number)
            out.index_add_(0, row, expert(x[row]) * weights[row, slot, None] * (2 if number == 3 else 1))
        return out


class OneExpertTwice(_Gated):
    """The loop forgets expert 5 and takes expert 4 twice."""

    expect = "right"

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        out = torch.zeros_like(x)
        for number in (0, 1, 2, 3, 4, 4):
            row, slot = torch.where(ids == number)
            out.index_add_(0, row, self.experts[number](x[row]) * weights[row, slot, None])
        return out


class DeepSeekInfer(_Gated):
    """Counts as numbers of Python, experts without tokens skipped."""

    expect = "refused"
    hint = "one_hot"

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        counts = torch.bincount(ids.flatten(), minlength=self.count).tolist()
        out = torch.zeros_like(x)
        for number in range(self.count):
            if counts[number] == 0:
                continue
            row, slot = torch.where(ids == number)
            out[row] += self.experts[number](x[row]) * weights[row, slot, None]
        return out


class OnlyTheHit(_Gated):
    """A loop over the experts that some token chose."""

    expect = "refused"
    hint = "a loop over all experts"

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        out = torch.zeros_like(x)
        for number in ids.unique().tolist():
            row, slot = torch.where(ids == number)
            out.index_add_(0, row, self.experts[number](x[row]) * weights[row, slot, None])
        return out


class SkipEmpty(_Modules):
    """`continue` where no token chose the expert."""

    expect = "refused"
    hint = "empt"

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, slot = (ids == number).nonzero(as_tuple=True)
            if len(row) == 0:
                continue
            out[row] += expert(x[row]) * weights[row, slot, None]
        return out


class IfAny(_Modules):
    """`if mask.any()` before the expert."""

    expect = "refused"
    hint = "empt"

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mine = (ids == number).any(-1)
            if mine.any():
                share = (weights * (ids == number)).sum(-1)
                out[mine] += expert(x[mine]) * share[mine, None]
        return out


class TokenByToken(_Gated):
    """A loop over the tokens, one row at a time."""

    expect = "refused"
    hint = "tensors"

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        rows = []
        for token in range(x.shape[0]):
            parts = [self.experts[int(ids[token, j])](x[token]) * weights[token, j] for j in range(self.k)]
            rows.append(torch.stack(parts).sum(0))
        return torch.stack(rows)
