"""Expert layers as people write them by hand: x [T, H] or [B, S, H] -> the same.

Each says in `expect` what sparsec makes of it: "fused" (one `moe.route`, one `moe.experts`), "left" (it runs as it is
written, for it is no sum over chosen experts of two linear layers), "right" (its experts are not alike: whatever is
raised of it, the results are equal) or "refused" (torch.export cannot trace it; `hint` is part of what sparsec says).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FORMS: dict[str, type[Layer]] = {}


class Layer(nn.Module):
    """What all have: sizes, a router of E logits, and a place in `FORMS`."""

    expect: ClassVar[str] = "fused"
    hint: ClassVar[str] = ""
    rank: ClassVar[int] = 2  # of the input
    dtype: ClassVar[torch.dtype] = torch.float32
    k: ClassVar[int] = 2

    def __init_subclass__(cls) -> None:
        if not cls.__name__.startswith("_"):
            FORMS[cls.__name__] = cls

    def __init__(self, width: int = 32, inner: int = 24, experts: int = 6) -> None:
        super().__init__()
        self.width, self.inner, self.count = width, inner, experts
        self.router = nn.Linear(width, experts, bias=False)
        self.make_experts()

    def make_experts(self) -> None:
        raise NotImplementedError

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights that sum to one, and ids, [T, k] each."""
        weights, ids = self.router(x).softmax(dim=-1).topk(self.k, dim=-1)
        return weights / weights.sum(dim=-1, keepdim=True), ids


class _Modules(Layer):
    """Experts in a ModuleList."""

    def make_experts(self) -> None:
        self.experts = nn.ModuleList(self.expert() for _ in range(self.count))

    def expert(self) -> nn.Module:
        return nn.Sequential(nn.Linear(self.width, self.inner), nn.GELU(), nn.Linear(self.inner, self.width))


class SwiGLU(nn.Module):
    """An expert of three matrices."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class _Gated(_Modules):
    def expert(self) -> nn.Module:
        return SwiGLU(self.width, self.inner)


class _Stacked(Layer):
    """Experts in three parameters, transposed: [E, H, I] and [E, I, H]."""

    def make_experts(self) -> None:
        self.gate = nn.Parameter(torch.empty(self.count, self.width, self.inner))
        self.up = nn.Parameter(torch.empty(self.count, self.width, self.inner))
        self.down = nn.Parameter(torch.empty(self.count, self.inner, self.width))


class OldMixtral(_Gated):
    """A loop over experts with torch.where on a one-hot mask, batch and sequence kept."""

    rank = 3

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        flat = x.view(-1, width)
        probabilities = F.softmax(self.router(flat), dim=1, dtype=torch.float)
        weights, chosen = torch.topk(probabilities, self.k, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        weights = weights.to(x.dtype)
        result = torch.zeros((batch * length, width), dtype=x.dtype, device=x.device)
        mask = F.one_hot(chosen, num_classes=self.count).permute(2, 1, 0)
        for index in range(self.count):
            slot, row = torch.where(mask[index])
            current = flat[None, row].reshape(-1, width)
            result.index_add_(0, row, self.experts[index](current) * weights[row, slot, None])
        return result.reshape(batch, length, width)


class NonzeroRows(_Modules):
    """Sequential experts with biases; rows found by nonzero, results added in place."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, slot = (ids == number).nonzero(as_tuple=True)
            out[row] += weights[row, slot].unsqueeze(1) * expert(x[row])
        return out


class SwitchArgmax(_Modules):
    """One expert for each token, whose result is multiplied by its probability."""

    k = 1
    rank = 3

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        probability, chosen = self.router(flat).softmax(-1).max(dim=-1)
        out = torch.empty_like(flat)
        for number, expert in enumerate(self.experts):
            mine = chosen == number
            out[mine] = expert(flat[mine])
        return (out * probability.unsqueeze(-1)).view_as(x)


class BooleanMasks(_Gated):
    """The weight of an expert for all tokens, tokens picked by a mask."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            hit = ids.eq(number)
            mine = hit.any(dim=1)
            share = torch.where(hit, weights, 0.0).sum(dim=1)
            out[mine] = out[mine] + share[mine, None] * expert(x[mine])
        return out


class MaskedSum(_Modules):
    """Every expert runs on every token, and masks keep what was chosen."""

    rank = 3

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.sigmoid(self.router(x))
        weights, ids = scores.topk(self.k, dim=-1)
        weights = 1.5 * weights / (weights.sum(-1, keepdim=True) + 1e-9)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            out = out + expert(x) * (weights * (ids == number)).sum(-1, keepdim=True)
        return out


class StackThenGather(_Modules):
    """All outputs side by side, the chosen ones gathered."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        every = torch.stack([expert(x) for expert in self.experts], dim=1)
        picked = every.gather(1, ids.unsqueeze(-1).expand(-1, -1, self.width))
        return (picked * weights.unsqueeze(-1)).sum(dim=1)


class StackThenWeigh(_Gated):
    """All outputs side by side, weighed by a row that is zero where nothing was chosen."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        full = torch.zeros(x.shape[0], self.count, dtype=x.dtype, device=x.device).scatter_(1, ids, weights)
        every = torch.stack([expert(x) for expert in self.experts])
        return torch.sum(every * full.T.unsqueeze(-1), dim=0)


class SoftmaxOfMasked(_Gated):
    """Logits that were not chosen become minus infinity before the softmax; an einsum adds up."""

    rank = 3

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        top, ids = logits.topk(self.k, dim=-1)
        masked = torch.full_like(logits, float("-inf")).scatter(-1, ids, top)
        share = masked.softmax(dim=-1)
        every = torch.stack([expert(x) for expert in self.experts], dim=2)
        return torch.einsum("bte,bteh->bth", share, every)


class DispatchCombine(_Stacked):
    """GShard: dispatch and combine tensors; what exceeds an expert's capacity is dropped, first choices first."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[0]
        capacity = (tokens * self.k + self.count - 1) // self.count
        weights, ids = self.choose(x)
        onehot = F.one_hot(ids.t(), self.count)
        order = onehot.reshape(-1, self.count).cumsum(0).reshape(self.k, tokens, self.count) - 1
        place = (order * onehot).sum(-1)
        kept = (place < capacity).to(x.dtype)
        seat = (place[..., None] == torch.arange(capacity, device=x.device)).to(x.dtype)
        combine = torch.einsum("kt,kte,ktc->tec", weights.t() * kept, onehot.to(x.dtype), seat)
        dispatch = combine.gt(0).to(x.dtype)
        inside = torch.einsum("tec,th->ech", dispatch, x)
        hidden = F.silu(torch.bmm(inside, self.gate)) * torch.bmm(inside, self.up)
        return torch.einsum("tec,ech->th", combine, torch.bmm(hidden, self.down))


class SwitchCapacity(_Stacked):
    """Switch: one expert for each token, in the order of the tokens, and a fixed capacity."""

    k = 1

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x).softmax(-1)
        best, ids = share.max(-1)
        chosen = F.one_hot(ids, self.count)
        kept = chosen * (chosen.cumsum(0) <= 20)
        combine = kept * best[:, None]
        hidden = torch.relu(torch.einsum("th,ehi->eti", x, self.up))
        return torch.einsum("te,eth->th", combine, torch.einsum("eti,eih->eth", hidden, self.down))


class WeightsOfEachToken(_Stacked):
    """The matrices of the experts chosen, gathered for each token, and einsum."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        gate = F.silu(torch.einsum("th,tkhi->tki", x, self.gate[ids]))
        up = torch.einsum("th,tkhi->tki", x, self.up[ids])
        out = torch.einsum("tki,tkih->tkh", gate * up, self.down[ids])
        return torch.einsum("tkh,tk->th", out, weights)


class MatmulOfEachToken(_Stacked):
    """The same for one expert, by matmul."""

    k = 1

    def forward(self, x: Tensor) -> Tensor:
        weight, number = self.router(x).sigmoid().max(dim=-1)
        row = x.unsqueeze(1)
        hidden = F.gelu(torch.matmul(row, self.gate[number]), approximate="tanh") * (row @ self.up[number])
        return (hidden @ self.down[number]).squeeze(1) * weight[:, None]


class BmmOfEachPair(_Stacked):
    """Tokens repeated for each choice, one bmm over the pairs."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        pairs = x.repeat_interleave(self.k, dim=0).unsqueeze(1)
        number = ids.reshape(-1)
        hidden = torch.bmm(pairs, self.gate[number]).relu().square()
        out = torch.bmm(hidden, self.down[number]).view(-1, self.k, self.width)
        return (out * weights.unsqueeze(-1)).sum(1)


class SortAndSplit(_Gated):
    """Pairs sorted by expert and split by counts of fixed length."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        number, order = ids.view(-1).sort(stable=True)
        counts = F.one_hot(number, self.count).sum(0)
        row = order // self.k
        parts = torch.split(x[row], counts.tolist())
        done = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        out = torch.zeros_like(x)
        return out.index_add_(0, row, done * weights.view(-1)[order].unsqueeze(-1))


class SortAndGroupedMM(_Stacked):
    """Pairs sorted by expert and multiplied in groups; put back into the order of the pairs before they are added."""

    dtype = torch.bfloat16

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        flat = ids.flatten()
        order = torch.argsort(flat)
        ends = (flat[None, :] == torch.arange(self.count, device=x.device)[:, None]).sum(1).cumsum(0).to(torch.int32)
        rows = x[order // self.k]
        hidden = F.silu(F.grouped_mm(rows, self.gate, offs=ends)) * F.grouped_mm(rows, self.up, offs=ends)
        done = F.grouped_mm(hidden, self.down, offs=ends)
        back = torch.empty_like(done)
        back[order] = done
        return (back.view(-1, self.k, self.width) * weights.unsqueeze(-1)).sum(1)


class SharedBeside(_Gated):
    """A shared expert for every token, a bias that counts in the selection only."""

    rank = 3

    def make_experts(self) -> None:
        super().make_experts()
        self.shared = SwiGLU(self.width, 2 * self.inner)
        self.selection_bias = nn.Parameter(torch.zeros(self.count))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        score = self.router(flat).float().sigmoid()
        ids = torch.topk(score + self.selection_bias, self.k, dim=-1, sorted=False).indices
        weights = score.gather(1, ids)
        weights = (weights / weights.sum(1, keepdim=True)).type_as(x) * 2.5
        out = torch.zeros_like(flat)
        for number in range(self.count):
            row, slot = torch.where(ids == number)
            out = out.index_add(0, row, self.experts[number](flat[row]) * weights[row, slot, None])
        return out.view(x.shape) + self.shared(x)


class SquaredReLU(_Stacked):
    """No gate, relu squared, all experts by einsum and a scattered gate."""

    rank = 3

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        share = torch.zeros_like(self.router(x)).scatter(-1, ids, weights)
        hidden = torch.einsum("bsh,ehi->bsei", x, self.up).relu().pow(2)
        return torch.einsum("bse,bseh->bsh", share, torch.einsum("bsei,eih->bseh", hidden, self.down))


class ClampedInterleaved(Layer):
    """Gate and up in turns in one matrix, with biases, clamped."""

    def make_experts(self) -> None:
        self.w_in = nn.Parameter(torch.empty(self.count, 2 * self.inner, self.width))
        self.b_in = nn.Parameter(torch.empty(self.count, 2 * self.inner))
        self.w_out = nn.Parameter(torch.empty(self.count, self.width, self.inner))
        self.b_out = nn.Parameter(torch.empty(self.count, self.width))

    def forward(self, x: Tensor) -> Tensor:
        top, ids = self.router(x).topk(self.k, dim=-1)
        weights = top.softmax(dim=-1)
        out = torch.zeros_like(x)
        for number in range(self.count):
            row, slot = torch.where(ids == number)
            both = F.linear(x[row], self.w_in[number], self.b_in[number])
            gate, up = both[:, ::2].clamp(max=0.8), both[:, 1::2].clamp(-0.8, 0.8)
            done = F.linear((up + 1) * gate * torch.sigmoid(1.7 * gate), self.w_out[number], self.b_out[number])
            out.index_add_(0, row, done * weights[row, slot].unsqueeze(-1))
        return out


class GeGLUOfAll(_Stacked):
    """Every token to every expert by bmm, weighed by a dense gate."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        every = x.repeat(self.count, 1).view(self.count, -1, self.width)
        out = torch.bmm(F.gelu(torch.bmm(every, self.gate)) * torch.bmm(every, self.up), self.down)
        share = (F.one_hot(ids, self.count) * weights.unsqueeze(-1)).sum(1)
        return (out * share.transpose(0, 1)[..., None]).sum(0)


class TransposedLoop(_Stacked):
    """`x @ w[e]` in a loop, results put with accumulation."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        out = x.new_zeros(x.shape)
        for number in range(self.count):
            row, slot = torch.where(ids == number)
            mine = x[row]
            done = (F.silu(mine @ self.gate[number]) * (mine @ self.up[number])) @ self.down[number]
            out.index_put_((row,), done * weights[row, slot].unsqueeze(1), accumulate=True)
        return out


class ScatteredBack(_Modules):
    """Results added with scatter_add."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(ids == number)
            done = weights[row, slot, None] * expert(x.index_select(0, row))
            out.scatter_add_(0, row.unsqueeze(1).expand(-1, self.width), done)
        return out


class NoisyTopK(_Modules):
    """Shazeer's gate: noise in training only."""

    def make_experts(self) -> None:
        super().make_experts()
        self.noise = nn.Linear(self.width, self.count, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        if self.training:
            logits = logits + torch.randn_like(logits) * F.softplus(self.noise(x))
        top, ids = logits.topk(self.k, dim=-1)
        share = torch.zeros_like(logits).scatter(1, ids, F.softmax(top, dim=1))
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mine = share[:, number] > 0
            out[mine] += expert(x[mine]) * share[mine, number].unsqueeze(1)
        return out


class SlotBySlot(_Modules):
    """One choice after the other, and for each of them every expert."""

    rank = 3

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, self.width)
        weights, ids = self.choose(flat)
        out = torch.zeros_like(flat)
        for slot in range(self.k):
            for number, expert in enumerate(self.experts):
                mine = ids[:, slot] == number
                out[mine] += weights[:, slot][mine].unsqueeze(-1) * expert(flat[mine])
        return out.view_as(x)


class SlotWeights(_Stacked):
    """One choice after the other with the matrices of each token."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        out = torch.zeros_like(x)
        for slot in range(self.k):
            number = ids[:, slot]
            hidden = torch.tanh(torch.einsum("th,thi->ti", x, self.up[number]))
            out = out + weights[:, slot, None] * torch.einsum("ti,tih->th", hidden, self.down[number])
        return out


class WeightsOnInput(_Gated):
    """A token is multiplied by its probability before the expert sees it."""

    k = 1

    def forward(self, x: Tensor) -> Tensor:
        score, ids = self.router(x).sigmoid().topk(1, dim=-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(ids == number)
            out.index_add_(0, row, expert(x[row] * score[row, slot, None]))
        return out


class ScaledInputsOfAll(_Stacked):
    """Llama 4: every expert sees every token multiplied by its score, which is zero for most."""

    k = 1

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        top, ids = torch.topk(logits, self.k, dim=1)
        score = torch.sigmoid(torch.full_like(logits, float("-inf")).scatter_(1, ids, top)).t()
        every = x.expand(self.count, -1, -1) * score.unsqueeze(-1)
        hidden = F.silu(every @ self.gate) * (every @ self.up)
        return (hidden @ self.down).sum(0)


class CosineRouter(_Gated):
    """Logits are cosines to an embedding of each expert, with a temperature."""

    def forward(self, x: Tensor) -> Tensor:
        logits = F.normalize(x, dim=-1) @ F.normalize(self.router.weight, dim=-1).T / 0.07
        weights, ids = torch.softmax(logits, -1).topk(self.k, -1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(ids == number)
            out.index_add_(0, row, expert(x[row]) * weights[row, slot].unsqueeze(-1))
        return out


class DropoutInside(_Modules):
    """An expert with dropout, which does nothing in eval mode."""

    def expert(self) -> nn.Module:
        first, last = nn.Linear(self.width, self.inner), nn.Linear(self.inner, self.width)
        return nn.Sequential(first, nn.ReLU(), nn.Dropout(0.1), last, nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(ids == number)
            out.index_add_(0, row, expert(x[row]) * weights[row, slot, None])
        return out
