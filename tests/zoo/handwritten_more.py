"""More expert layers as people write them: one big linear, inverse permutations, gathered tokens, biases everywhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.handwritten import Layer, SwiGLU, _Gated, _Modules, _Stacked


class OneBigLinear(Layer):
    """The up projections of all experts in one linear layer, the results viewed as experts."""

    def make_experts(self) -> None:
        self.up = nn.Linear(self.width, self.count * self.inner)
        self.down = nn.Parameter(torch.empty(self.count, self.inner, self.width))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        hidden = F.gelu(self.up(x)).view(-1, self.count, self.inner)
        every = torch.einsum("tei,eih->teh", hidden, self.down)
        share = torch.zeros(x.shape[0], self.count, dtype=x.dtype, device=x.device).scatter_(1, ids, weights)
        return torch.einsum("te,teh->th", share, every)


class WeightOnHidden(_Stacked):
    """The weight is multiplied to the hidden row, before the last matrix."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        out = torch.zeros_like(x)
        for number in range(self.count):
            row, slot = torch.where(ids == number)
            mine = x[row]
            hidden = F.silu(mine @ self.gate[number]) * (mine @ self.up[number])
            out = out.index_add(0, row, (hidden * weights[row, slot, None]) @ self.down[number])
        return out


class InversePermutation(_Gated):
    """Sorted pairs, put back with the argsort of the order."""

    rank = 3

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.width)
        weights, ids = self.choose(flat)
        order = ids.flatten().argsort(stable=True)
        sizes = (ids.flatten().unsqueeze(1) == torch.arange(self.count, device=x.device)).sum(0).tolist()
        parts = flat.repeat_interleave(self.k, dim=0)[order].split(sizes)
        done = torch.cat([self.experts[number](part) for number, part in enumerate(parts)])
        back = done[order.argsort()].view(-1, self.k, self.width)
        return torch.einsum("tkh,tk->th", back, weights).view_as(x)


class GatheredTokens(_Modules):
    """Rows of an expert by index_select of a squeezed nonzero, results by index_add."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        share = torch.zeros_like(self.router(x)).scatter(1, ids, weights)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = torch.nonzero((ids == number).any(dim=1)).squeeze(1)
            done = expert(torch.index_select(x, 0, rows))
            out.index_add_(0, rows, done * share[rows, number].unsqueeze(1))
        return out


class BiasesOfAll(Layer):
    """All experts with biases by matmul, the chosen ones gathered."""

    def make_experts(self) -> None:
        self.w1 = nn.Parameter(torch.empty(self.count, self.width, self.inner))
        self.b1 = nn.Parameter(torch.empty(self.count, 1, self.inner))
        self.w2 = nn.Parameter(torch.empty(self.count, self.inner, self.width))
        self.b2 = nn.Parameter(torch.empty(self.count, 1, self.width))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        hidden = F.relu(torch.matmul(x.unsqueeze(0), self.w1) + self.b1)
        every = (torch.matmul(hidden, self.w2) + self.b2).transpose(0, 1)
        chosen = torch.gather(every, 1, ids.unsqueeze(-1).expand(-1, -1, self.width))
        return (chosen * weights[..., None]).sum(1)


class BiasesOfEachToken(Layer):
    """Matrices and biases gathered for each pair, gate and up in one matrix."""

    rank = 3

    def make_experts(self) -> None:
        self.w_in = nn.Parameter(torch.empty(self.count, 2 * self.inner, self.width))
        self.b_in = nn.Parameter(torch.empty(self.count, 2 * self.inner))
        self.w_out = nn.Parameter(torch.empty(self.count, self.width, self.inner))
        self.b_out = nn.Parameter(torch.empty(self.count, self.width))

    def forward(self, x: Tensor) -> Tensor:
        top, ids = torch.topk(self.router(x), self.k, dim=-1)
        weights = top.softmax(-1)
        both = torch.einsum("beck,bk->bec", self.w_in[ids].flatten(0, 1), x.flatten(0, 1))
        both = both.view(*ids.shape, -1) + self.b_in[ids]
        gate, up = both.chunk(2, dim=-1)
        out = torch.einsum("bsehi,bsei->bseh", self.w_out[ids], F.gelu(gate) * up) + self.b_out[ids]
        return torch.einsum("bseh,bse->bsh", out, weights)


class SharedGated(_Gated):
    """Qwen 2: a shared expert with a sigmoid gate of its own beside the experts."""

    def make_experts(self) -> None:
        super().make_experts()
        self.shared, self.shared_gate = SwiGLU(self.width, self.inner), nn.Linear(self.width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        out = torch.zeros_like(x)
        for number in range(self.count):
            row, slot = torch.where(ids == number)
            out.index_add_(0, row, self.experts[number](x[row]) * weights[row, slot, None])
        return out + torch.sigmoid(self.shared_gate(x)) * self.shared(x)


class GroupLimited(_Gated):
    """DeepSeek's groups: the two best groups of three, the rest masked, then the experts."""

    def forward(self, x: Tensor) -> Tensor:
        score = self.router(x).float().sigmoid()
        groups = score.view(-1, 3, self.count // 3)
        best = groups.topk(2, dim=-1).values.sum(-1).topk(2, dim=-1).indices
        keep = torch.zeros_like(groups[..., 0]).scatter(1, best, 1.0).bool()
        masked = groups.masked_fill(~keep.unsqueeze(-1), 0.0).flatten(1)
        weights, ids = masked.topk(self.k, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(ids == number)
            out.index_add_(0, row, expert(x[row]) * weights[row, slot, None])
        return out


class ThreeOfMany(_Gated):
    """Three experts for a token, slots summed by matmul."""

    k = 3

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        every = torch.stack([expert(x) for expert in self.experts], dim=1)
        picked = every[torch.arange(x.shape[0], device=x.device)[:, None], ids]
        return torch.matmul(weights.unsqueeze(1), picked).squeeze(1)


class ConcatLinear(Layer):
    """Gate and up of an expert in one nn.Linear, chunked; a mask multiplied instead of rows picked."""

    rank = 3

    def make_experts(self) -> None:
        self.fc1 = nn.ModuleList(nn.Linear(self.width, 2 * self.inner) for _ in range(self.count))
        self.fc2 = nn.ModuleList(nn.Linear(self.inner, self.width) for _ in range(self.count))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        out = torch.zeros_like(x)
        for number in range(self.count):
            up, gate = self.fc1[number](x).chunk(2, dim=-1)
            share = torch.where(ids == number, weights, torch.zeros_like(weights)).sum(dim=-1, keepdim=True)
            out += share * self.fc2[number](F.silu(gate) * up)
        return out


class HalfPrecision(_Gated):
    """bf16 experts, the router in f32, results added up in f32."""

    dtype = torch.bfloat16

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(x.float(), self.router.weight.float())
        weights, ids = logits.softmax(-1).topk(self.k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(ids == number)
            out.index_add_(0, row, expert(x[row]).float() * weights[row, slot, None])
        return out.to(x.dtype)


class TokenCapacity(_Stacked):
    """Capacity in the order of tokens over all choices; pairs beyond it count nothing."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        onehot = F.one_hot(ids.flatten(), self.count)
        place = (onehot.cumsum(0) * onehot).sum(-1).view_as(ids) - 1
        weights = torch.where(place < 24, weights, 0.0)
        hidden = torch.einsum("th,tkhi->tki", x, self.up[ids]).relu()
        return (torch.einsum("tki,tkih->tkh", hidden, self.down[ids]) * weights[..., None]).sum(1)
