"""Routers as model families write them, over logits [tokens, experts]: each gives ids and weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot, sigmoid, softmax, softplus


def softmax_topk(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """mixtral, qwen3_moe with normalisation: softmax over all, then the best."""
    weights, ids = torch.topk(softmax(z, dim=-1, dtype=torch.float32), k, dim=-1)
    return ids, (weights / weights.sum(dim=-1, keepdim=True)).to(z.dtype)


def softmax_topk_plain(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """olmoe, qwen2_moe: not normalised."""
    weights, ids = torch.topk(softmax(z, dim=-1, dtype=torch.float32), k, dim=-1)
    return ids, weights.to(z.dtype)


def topk_softmax(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """gpt_oss: softmax over the chosen."""
    values, ids = torch.topk(z, k, dim=-1)
    return ids, softmax(values, dim=1, dtype=values.dtype)


def granite(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, ids = z.float().topk(k, dim=1)
    return ids, torch.softmax(values, dim=1).type_as(z)


def group_limited(z: Tensor, k: int, groups: int, kept: int) -> tuple[Tensor, Tensor]:
    """deepseek_v2: only experts of the groups with the greatest scores."""
    tokens, experts = z.shape
    scores = softmax(z, dim=-1, dtype=torch.float32)
    best = scores.view(tokens, groups, -1).max(dim=-1).values
    chosen = torch.topk(best, k=kept, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(best).scatter_(1, chosen, 1)
    wide = mask.unsqueeze(-1).expand(tokens, groups, experts // groups).reshape(tokens, -1)
    weights, ids = torch.topk(scores.masked_fill(~wide.bool(), 0.0), k=k, dim=-1, sorted=False)
    return ids, weights * 16.0


def biased_groups(z: Tensor, bias: Tensor, k: int, groups: int, kept: int) -> tuple[Tensor, Tensor]:
    """deepseek_v3, glm4_moe: biased sigmoid scores choose, plain ones weigh; groups by the sum of their best two."""
    experts = z.shape[1]
    scores = z.sigmoid()
    biased = scores + bias
    best = biased.view(-1, groups, experts // groups).topk(2, dim=-1)[0].sum(dim=-1)
    chosen = torch.topk(best, k=kept, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(best).scatter_(1, chosen, 1)
    wide = mask.unsqueeze(-1).expand(-1, groups, experts // groups).reshape(-1, experts)
    ids = torch.topk(biased.masked_fill(~wide.bool(), float("-inf")), k=k, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    return ids, weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * 2.5


def llama4(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, ids = torch.topk(z, k, dim=1)
    scores = torch.full_like(z, float("-inf")).scatter_(1, ids, values)
    return ids, torch.sigmoid(scores.float()).to(z.dtype).gather(1, ids)


def sparse_mixer(z: Tensor, jitter: float = 0.01) -> tuple[Tensor, Tensor]:
    """phimoe: two rounds, the second without the first one's choice, each against its own threshold."""

    def once(scores: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        top, at = masked.max(dim=-1, keepdim=True)
        far = (top - z) / z.abs().clamp(min=top) > 2 * jitter
        return at, softmax(masked.masked_fill(far, float("-inf")), dim=-1).gather(-1, at)

    first, weight = once(z, z)
    second, other = once(z, torch.scatter(z, -1, first, float("-inf")))
    return torch.cat((first, second), dim=-1), torch.cat((weight, other), dim=-1)


def scaled(z: Tensor, scale: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """gemma4: a learned scale per expert."""
    weights, ids = torch.topk(softmax(z, dim=-1), k, dim=-1)
    return ids, weights / weights.sum(dim=-1, keepdim=True) * scale[ids]


def floored(z: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """ernie4_5: normalised by no less than a floor."""
    scores = softmax(z, dim=-1)
    ids = torch.topk(scores + bias.squeeze(), k, dim=-1)[1]
    weights = torch.gather(scores, dim=-1, index=ids)
    return ids, weights / torch.clamp(weights.sum(dim=-1, keepdim=True), min=1e-12)


def switch(z: Tensor) -> tuple[Tensor, Tensor]:
    scores = softmax(z, dim=-1)
    chosen = one_hot(scores.argmax(dim=-1), num_classes=z.shape[-1])
    return chosen.max(dim=-1, keepdim=True)[1], (scores * chosen).sum(dim=-1, keepdim=True)


def square_root(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """deepseek_v4: the square root of softplus."""
    scores = torch.sqrt(softplus(z))
    weights, ids = scores.topk(k, dim=-1)
    return ids, weights / weights.sum(-1, keepdim=True)


def normed(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Normalised and squashed in every way that appears in some family."""
    z = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6)
    z = torch.tanh(z) - torch.logsumexp(z, dim=-1, keepdim=True)
    z = torch.where(z > -1, z, torch.exp(z)) + logsigmoid(z) / torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    weights, ids = sigmoid(z)[:, :-1].topk(k, dim=-1)
    return ids, weights * torch.ones_like(weights) - z[:, 0].unsqueeze(-1)


@dataclass(frozen=True)
class Router:
    """A router with the sizes it is tried at. `params` are made by the shapes given."""

    fn: Callable[..., tuple[Tensor, Tensor]]
    experts: int
    params: tuple[tuple[int, ...], ...] = ()
    options: Mapping[str, Any] | None = None
    dtype: torch.dtype = torch.float32

    def __call__(self, *args: Tensor) -> tuple[Tensor, Tensor]:
        return self.fn(*args, **(self.options or {}))


ROUTERS: dict[str, Router] = {
    "mixtral": Router(softmax_topk, 8, options={"k": 2}),
    "qwen3_moe": Router(softmax_topk, 128, options={"k": 8}, dtype=torch.float16),
    "qwen3_5_moe": Router(softmax_topk, 60, options={"k": 4}),
    "olmoe": Router(softmax_topk_plain, 64, options={"k": 8}),
    "qwen2_moe": Router(softmax_topk_plain, 60, options={"k": 4}),
    "gpt_oss": Router(topk_softmax, 32, options={"k": 4}),
    "gpt_oss_half": Router(topk_softmax, 32, options={"k": 4}, dtype=torch.float16),
    "granitemoe": Router(granite, 40, options={"k": 8}, dtype=torch.float16),
    "deepseek_v2": Router(group_limited, 160, options={"k": 6, "groups": 8, "kept": 3}),
    "deepseek_v3": Router(biased_groups, 256, ((256,),), {"k": 8, "groups": 8, "kept": 4}),
    "glm4_moe": Router(biased_groups, 24, ((24,),), {"k": 2, "groups": 1, "kept": 1}),
    "uneven_groups": Router(biased_groups, 60, ((60,),), {"k": 3, "groups": 5, "kept": 3}),
    "llama4": Router(llama4, 16, options={"k": 1}),
    "phimoe": Router(sparse_mixer, 16),
    "gemma4": Router(scaled, 12, ((12,),), {"k": 3}),
    "ernie4_5_moe": Router(floored, 8, ((1, 8),), {"k": 2}),
    "switch": Router(switch, 8),
    "deepseek_v4": Router(square_root, 10, options={"k": 3}),
    "normed": Router(normed, 9, options={"k": 3}),
}
"""By the family that does so."""
