"""Routers as people write them by hand, over logits [tokens, experts]: each gives ids and weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.codegen.triton.routers import Router

Chosen = tuple[Tensor, Tensor]


def argsort_slice(z: Tensor, k: int) -> Chosen:
    p = z.softmax(-1)
    ids = torch.argsort(p, dim=-1, descending=True)[:, :k]
    return ids, p.gather(-1, ids)


def sort_slice(z: Tensor, k: int) -> Chosen:
    values, ids = torch.sort(torch.sigmoid(z), dim=-1, descending=True)
    weights = values[:, :k]
    return ids[:, :k], weights / (weights.sum(-1, keepdim=True) + 1e-9)


def kth_value(z: Tensor, k: int) -> Chosen:
    p = z.softmax(-1)
    least = p.kthvalue(z.shape[-1] - k + 1, dim=-1, keepdim=True).values
    weights, ids = torch.where(p >= least, p, torch.zeros_like(p)).topk(k, dim=-1)
    return ids, weights


def two_argmaxes(z: Tensor) -> Chosen:
    """GShard: the second is the greatest of the rest."""
    experts = z.shape[-1]
    p = F.softmax(z, dim=-1, dtype=torch.float32)
    first = torch.argmax(p, dim=-1)
    mask1 = F.one_hot(first, num_classes=experts)
    second = torch.argmax(z.masked_fill(mask1.bool(), float("-inf")), dim=-1)
    mask2 = F.one_hot(second, num_classes=experts)
    gate1, gate2 = (p * mask1).sum(dim=1), (p * mask2).sum(dim=1)
    total = torch.clamp(gate1 + gate2, min=torch.finfo(p.dtype).eps)
    return torch.stack([first, second], dim=-1), torch.stack([gate1 / total, gate2 / total], dim=-1)


def two_maxes_by_product(z: Tensor) -> Chosen:
    p = z.softmax(-1)
    g1, i1 = torch.max(p, dim=1)
    rest = p * (1 - F.one_hot(i1, z.shape[1]).type_as(p))
    g2, i2 = torch.max(rest, dim=1)
    weights = torch.stack((g1, g2), dim=1)
    return torch.stack((i1, i2), dim=1), weights / weights.sum(dim=1)[:, None]


def masked_softmax(z: Tensor, k: int) -> Chosen:
    values, ids = z.topk(k, dim=-1)
    masked = torch.full_like(z, float("-inf")).scatter(-1, ids, values)
    return ids, masked.softmax(-1).gather(-1, ids)


def threshold_softmax(z: Tensor, k: int) -> Chosen:
    least = torch.topk(z, k)[0][..., -1, None]
    p = z.masked_fill(z < least, float("-inf")).softmax(dim=-1)
    weights, ids = p.topk(k, dim=-1)
    return ids, weights


def advanced_index(z: Tensor, k: int) -> Chosen:
    p = z.softmax(-1)
    ids = p.topk(k, dim=-1).indices
    return ids, p[torch.arange(z.shape[0])[:, None], ids]


def advanced_index_one(z: Tensor) -> Chosen:
    best = z.argmax(-1)
    return best[:, None], torch.sigmoid(z)[torch.arange(z.shape[0]), best][:, None]


def index_put_mask(z: Tensor, k: int) -> Chosen:
    ids = z.topk(k, dim=-1).indices
    keep = torch.zeros_like(z)
    keep[torch.arange(z.shape[0])[:, None], ids] = 1.0
    p = torch.where(keep > 0, z, torch.tensor(-1e9, dtype=z.dtype)).softmax(-1)
    return ids, p.gather(-1, ids)


def einsum_of_one_hot(z: Tensor, k: int) -> Chosen:
    p = z.softmax(-1)
    ids = p.topk(k, dim=-1).indices
    return ids, torch.einsum("te,tke->tk", p, F.one_hot(ids, z.shape[-1]).to(p.dtype))


def dense_gates(z: Tensor, k: int) -> Chosen:
    """Shazeer's: gates scattered into zeros, and read back."""
    values, ids = z.topk(min(k + 1, z.shape[1]), dim=1)
    gates = torch.zeros_like(z).scatter(1, ids[:, :k], values[:, :k].softmax(1))
    weights, ids = gates.topk(k, dim=1)
    return ids, weights


def soft_cap(z: Tensor, k: int) -> Chosen:
    weights, ids = (30.0 * torch.tanh(z / 30.0)).softmax(-1).topk(k)
    return ids.int(), weights


def temperature(z: Tensor, scale: Tensor, k: int) -> Chosen:
    weights, ids = (z * torch.clamp(scale, max=4.6).exp()).softmax(-1).topk(k)
    return ids, weights / weights.sum(-1, keepdim=True).clamp_min(1e-6)


def logit_bias(z: Tensor, bias: Tensor, k: int) -> Chosen:
    ids = (z + bias).topk(k, dim=-1)[1]
    return ids, torch.sigmoid(z.gather(-1, ids)).to(torch.float32)


def norm_one(z: Tensor, k: int) -> Chosen:
    weights, ids = z.softmax(-1).topk(k)
    return ids, weights / torch.norm(weights, p=1, dim=-1, keepdim=True)


def norm_two(z: Tensor, k: int) -> Chosen:
    weights, ids = z.sigmoid().topk(k)
    return ids, F.normalize(weights, p=2.0, dim=-1)


def layer_normed(z: Tensor, k: int) -> Chosen:
    weights, ids = F.layer_norm(z, (z.shape[-1],)).softmax(-1).topk(k)
    return ids, weights


def standardised(z: Tensor, k: int) -> Chosen:
    z = (z - z.mean(-1, keepdim=True)) / (z.std(-1, keepdim=True) + 1e-5)
    weights, ids = z.softmax(-1).topk(k)
    return ids, weights


def groups_by_one_hot(z: Tensor, k: int, groups: int, kept: int) -> Chosen:
    """The group mask from a sum of one-hots, repeated over the experts of a group."""
    p = z.sigmoid()
    best = p.unflatten(-1, (groups, -1)).amax(-1)
    mask = F.one_hot(best.topk(kept, dim=-1).indices, groups).sum(-2).bool()
    p = p * mask.repeat_interleave(z.shape[1] // groups, dim=-1)
    weights, ids = p.topk(k)
    return ids, weights


def group_winners(z: Tensor, groups: int) -> Chosen:
    """The best of each group, and the number that it has among all."""
    each = z.shape[1] // groups
    best, at = z.view(-1, groups, each).max(dim=-1)
    return at + torch.arange(groups) * each, best.softmax(-1)


def two_halves(z: Tensor) -> Chosen:
    a, b = z.chunk(2, dim=-1)
    (va, ia), (vb, ib) = a.topk(1), b.topk(1)
    return torch.cat([ia, ib + a.shape[-1]], dim=-1), torch.cat([va, vb], dim=-1).softmax(-1)


def least(z: Tensor, k: int) -> Chosen:
    """Distances rather than scores."""
    distance, ids = torch.topk(z.abs(), k, dim=-1, largest=False)
    return ids, torch.exp(-distance)


def nucleus(z: Tensor, k: int, share: float) -> Chosen:
    """As many as make up a share of the probability; the others count nothing."""
    weights, ids = z.softmax(-1).topk(k)
    before = weights.cumsum(-1) - weights
    weights = weights.masked_fill(before > share, 0.0)
    return ids, weights / weights.sum(-1, keepdim=True)


def skips_the_weak(z: Tensor, k: int) -> Chosen:
    weights, ids = z.softmax(-1).topk(k)
    weak = weights < 0.15
    return torch.where(weak, z.shape[-1], ids), torch.where(weak, 0.0, weights)


def null_expert(z: Tensor, k: int) -> Chosen:
    """zaya: the last class stands for no expert."""
    p = z.softmax(-1)
    weights, ids = p.topk(k)
    skip = ids == z.shape[-1] - 1
    return ids.masked_fill(skip, 0), weights * (~skip).to(weights.dtype)


def scale_gathered(z: Tensor, scale: Tensor, k: int) -> Chosen:
    weights, ids = z.softmax(-1).topk(k)
    return ids, weights * scale.gather(0, ids.reshape(-1)).view_as(weights)


def scale_selected(z: Tensor, scale: Tensor, k: int) -> Chosen:
    weights, ids = z.softmax(-1).topk(k)
    return ids, weights * torch.index_select(scale, 0, ids.flatten()).reshape(ids.shape)


def scale_embedded(z: Tensor, scale: Tensor, k: int) -> Chosen:
    weights, ids = z.softmax(-1).topk(k)
    return ids, weights * F.embedding(ids, scale[:, None]).squeeze(-1)


def scale_by_eye(z: Tensor, scale: Tensor, k: int) -> Chosen:
    weights, ids = z.softmax(-1).topk(k)
    return ids, weights * (torch.eye(z.shape[-1])[ids] * scale).sum(-1)


def product_keys(z: Tensor, k: int) -> Chosen:
    """PEER: the best pairs of two small choices."""
    n = z.shape[1] // 2
    (va, ia), (vb, ib) = z[:, :n].topk(k), z[:, n:].topk(k)
    scores = (va[:, :, None] + vb[:, None, :]).flatten(1)
    ids = (ia[:, :, None] * n + ib[:, None, :]).reshape(-1, k * k)
    best, at = scores.topk(k, dim=-1)
    return ids.gather(-1, at) % (2 * n), best.softmax(-1)


def group_of_ids(z: Tensor, scale: Tensor, k: int) -> Chosen:
    """A scale per group of four experts."""
    weights, ids = z.sigmoid().topk(k)
    return ids, weights * scale[ids // 4]


def sparsemax(z: Tensor, k: int) -> Chosen:
    ordered = torch.sort(z, dim=-1, descending=True).values
    total = ordered.cumsum(-1) - 1
    count = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    size = (ordered * count > total).sum(-1, keepdim=True)
    limit = total.gather(-1, size - 1) / size.to(z.dtype)
    weights, ids = torch.clamp(z - limit, min=0).topk(k)
    return ids, weights


def relu_router(z: Tensor, k: int) -> Chosen:
    weights, ids = F.relu(z + 4).topk(k)
    return ids, torch.nan_to_num(weights / weights.sum(-1, keepdim=True))


def scatter_added(z: Tensor, k: int) -> Chosen:
    weights, ids = z.softmax(-1).topk(k)
    dense = torch.zeros(z.shape, dtype=z.dtype).scatter_add(-1, ids, weights)
    return ids, (dense / dense.sum(-1, keepdim=True)).gather(1, ids)


def one_of_all(z: Tensor) -> Chosen:
    """Switch: k = 1 without an axis until the end."""
    p = z.softmax(-1)
    weight, best = p.max(dim=-1)
    return best.unsqueeze(-1), weight.unsqueeze(-1)


def exponentials(z: Tensor, k: int) -> Chosen:
    """A softmax by hand."""
    e = torch.exp(z - z.max(dim=-1, keepdim=True)[0])
    weights, ids = torch.topk(e / e.sum(dim=-1, keepdim=True), k)
    return ids, torch.div(weights, torch.sum(weights, dim=-1).unsqueeze(-1))


def logs(z: Tensor, k: int) -> Chosen:
    weights, ids = torch.log_softmax(z, dim=-1).topk(k)
    return ids, torch.exp(weights - torch.logsumexp(weights, -1, keepdim=True))


def mean_centred(z: Tensor, k: int) -> Chosen:
    weights, ids = torch.topk(F.softmax(z - torch.mean(z, 1, True), 1), k, 1)
    return ids, (weights / weights.sum(1).view(-1, 1)).half().float()


def argmax_rounds(z: Tensor, k: int) -> Chosen:
    """One expert after the other, each taken out for the next round."""
    p = z.softmax(-1)
    left, ids, weights = p.clone(), list[Tensor](), list[Tensor]()
    for _ in range(k):
        best = left.argmax(dim=-1, keepdim=True)
        ids.append(best)
        weights.append(p.gather(-1, best))
        left.scatter_(-1, best, 0.0)
    return torch.cat(ids, dim=-1), torch.cat(weights, dim=-1)


def stacked_first(z: Tensor) -> Chosen:
    """The choices on the first axis, then turned around."""
    first = z.argmax(-1)
    second = (z - 1e9 * F.one_hot(first, z.shape[1])).argmax(-1)
    ids = torch.stack([first, second]).t()
    return ids, z.gather(1, ids).softmax(-1)


def always_one_more(z: Tensor, k: int) -> Chosen:
    """The last expert takes part for every token."""
    weights, ids = z[:, :-1].softmax(-1).topk(k)
    last = torch.full((z.shape[0], 1), z.shape[1] - 1, dtype=ids.dtype)
    return torch.cat([ids, last], 1), torch.cat([weights, torch.ones(z.shape[0], 1)], 1)


def all_of_them(z: Tensor) -> Chosen:
    ids = torch.arange(z.shape[1]).expand(z.shape[0], -1)
    return ids, z.softmax(-1)


def equal_weights(z: Tensor, k: int) -> Chosen:
    ids = z.topk(k, dim=-1).indices
    return ids, torch.ones_like(ids, dtype=z.dtype) / k


def by_rank(z: Tensor, k: int) -> Chosen:
    rank = torch.argsort(torch.argsort(z, dim=-1, descending=True), dim=-1)
    weights, ids = (z.softmax(-1) * (rank < k)).topk(k)
    return ids, weights


def one_closed(z: Tensor, k: int) -> Chosen:
    """An expert that is switched off by assignment."""
    z = z.clone()
    z[:, 3] = float("-inf")
    z[:, 5:] -= 0.5
    weights, ids = z.softmax(-1).topk(k)
    return ids, weights


def unbound(z: Tensor) -> Chosen:
    weights, ids = z.sigmoid().topk(2)
    (a, b), (i, j) = weights.unbind(-1), ids.unbind(-1)
    total = torch.maximum(a + b, torch.tensor(1e-3))
    return torch.stack([i, j], -1), torch.stack([a / total, b / total], -1)


def affine_norm(z: Tensor, weight: Tensor, bias: Tensor, k: int) -> Chosen:
    weights, ids = F.layer_norm(z, (z.shape[1],), weight, bias).softmax(-1).topk(k)
    return ids, weights


def root_mean_square(z: Tensor, weight: Tensor, k: int) -> Chosen:
    weights, ids = F.rms_norm(z, (z.shape[1],), weight, 1e-6).sigmoid().topk(k)
    return ids, weights


def masked_renormalised(z: Tensor, k: int) -> Chosen:
    p = z.softmax(-1)
    ids = p.topk(k, dim=-1)[1]
    mask = torch.zeros_like(p).scatter_(1, ids, 1.0)
    kept = p * mask
    return ids, (kept / (kept.sum(-1, keepdim=True) + 1e-6)).gather(1, ids)


def two_levels(z: Tensor) -> Chosen:
    """A group first, then an expert of it."""
    groups = z.view(-1, 4, 3)
    group = groups.logsumexp(-1).softmax(-1)
    share, at = group.max(-1, keepdim=True)
    inside = groups.gather(1, at[:, :, None].expand(-1, -1, 3)).squeeze(1).softmax(-1)
    weight, expert = inside.topk(2)
    return at * 3 + expert, weight * share


def cubed(z: Tensor, k: int) -> Chosen:
    weights, ids = (z.sigmoid() ** 1.5).topk(k)
    return ids, weights / weights.pow(3).sum(-1, keepdim=True).pow(1 / 3)


HANDWRITTEN: dict[str, Router] = {
    "argsort_slice": Router(argsort_slice, 8, options={"k": 2}),
    "sort_slice": Router(sort_slice, 12, options={"k": 3}),
    "kth_value": Router(kth_value, 8, options={"k": 2}),
    "two_argmaxes": Router(two_argmaxes, 8),
    "two_maxes_by_product": Router(two_maxes_by_product, 10),
    "masked_softmax": Router(masked_softmax, 8, options={"k": 2}),
    "threshold_softmax": Router(threshold_softmax, 8, options={"k": 2}),
    "advanced_index": Router(advanced_index, 8, options={"k": 2}),
    "advanced_index_one": Router(advanced_index_one, 8),
    "index_put_mask": Router(index_put_mask, 8, options={"k": 2}),
    "einsum_of_one_hot": Router(einsum_of_one_hot, 8, options={"k": 2}),
    "dense_gates": Router(dense_gates, 8, options={"k": 2}),
    "soft_cap": Router(soft_cap, 8, options={"k": 2}),
    "temperature": Router(temperature, 8, ((1,),), {"k": 2}),
    "logit_bias": Router(logit_bias, 8, ((8,),), {"k": 2}),
    "norm_one": Router(norm_one, 8, options={"k": 2}),
    "norm_two": Router(norm_two, 8, options={"k": 3}),
    "layer_normed": Router(layer_normed, 12, options={"k": 2}),
    "standardised": Router(standardised, 12, options={"k": 2}),
    "groups_by_one_hot": Router(groups_by_one_hot, 12, options={"k": 2, "groups": 4, "kept": 2}),
    "group_winners": Router(group_winners, 12, options={"groups": 3}),
    "two_halves": Router(two_halves, 8),
    "least": Router(least, 8, options={"k": 2}),
    "nucleus": Router(nucleus, 8, options={"k": 4, "share": 0.6}),
    "skips_the_weak": Router(skips_the_weak, 8, options={"k": 3}),
    "null_expert": Router(null_expert, 9, options={"k": 2}),
    "scale_gathered": Router(scale_gathered, 8, ((8,),), {"k": 2}),
    "scale_selected": Router(scale_selected, 8, ((8,),), {"k": 2}),
    "scale_embedded": Router(scale_embedded, 8, ((8,),), {"k": 2}),
    "scale_by_eye": Router(scale_by_eye, 8, ((8,),), {"k": 2}),
    "product_keys": Router(product_keys, 16, options={"k": 2}),
    "group_of_ids": Router(group_of_ids, 12, ((3,),), {"k": 2}),
    "sparsemax": Router(sparsemax, 8, options={"k": 1}),
    "relu_router": Router(relu_router, 8, options={"k": 2}),
    "scatter_added": Router(scatter_added, 8, options={"k": 2}),
    "one_of_all": Router(one_of_all, 8),
    "exponentials": Router(exponentials, 8, options={"k": 2}),
    "logs": Router(logs, 8, options={"k": 2}),
    "mean_centred": Router(mean_centred, 8, options={"k": 2}),
    "argmax_rounds": Router(argmax_rounds, 8, options={"k": 3}),
    "stacked_first": Router(stacked_first, 8),
    "always_one_more": Router(always_one_more, 9, options={"k": 2}),
    "all_of_them": Router(all_of_them, 6),
    "equal_weights": Router(equal_weights, 8, options={"k": 2}),
    "by_rank": Router(by_rank, 8, options={"k": 2}),
    "one_closed": Router(one_closed, 8, options={"k": 2}),
    "unbound": Router(unbound, 8),
    "affine_norm": Router(affine_norm, 12, ((12,), (12,)), {"k": 2}),
    "root_mean_square": Router(root_mean_square, 12, ((12,),), {"k": 2}),
    "masked_renormalised": Router(masked_renormalised, 8, options={"k": 2}),
    "two_levels": Router(two_levels, 12),
    "cubed": Router(cubed, 8, options={"k": 2}),
}
