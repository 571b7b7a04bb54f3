"""Gradients of an expert layer by PyTorch operators, expert by expert; on any device, made for CPUs.

Words as of `moe.experts`; rows are in the order of the pairs by expert (`order`, `offsets`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Gradient = Callable[[list[Tensor]], Sequence[Tensor]]
"""From the gradient of an activation's value and its arguments, in f32: the value and their gradients."""


def hidden_grad(
    operands: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gradient: Gradient,
    layout: str = "concat",
    up_transposed: bool = False,
    down_transposed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `moe.hidden_grad` computes.

    Args:
        operands: y_grad [T, H], x [T, H], order [T * k], offsets [E + 1], weights [T, k]; up and down as of
            `moe.experts`.
        biases: those of up and down, or None.

    Returns: the gradient of the up-projection [T * k, P * I] and the weighed activated rows [T * k, I], both zeros from
        offsets[E] on, and the gradient of `weights`.
    """
    y_grad, x, order, offsets, weights, up, down = operands
    up_bias, down_bias = biases
    k, width = weights.shape[1], down.shape[1 if down_transposed else 2]
    columns = up.shape[2 if up_transposed else 1]
    h_grad, h = x.new_zeros(order.shape[0], columns), x.new_zeros(order.shape[0], width)
    weights_grad, flat = torch.zeros_like(weights).view(-1), weights.reshape(-1)
    for e, rows in _experts(offsets):
        pairs = order[rows].long()
        tokens, weight = pairs // k, flat[pairs].float()[:, None]
        dy = y_grad[tokens]
        projected = x[tokens] @ (up[e] if up_transposed else up[e].t())
        projected = projected.float() if up_bias is None else projected.float() + up_bias[e].float()
        value_grad = (dy @ (down[e].t() if down_transposed else down[e])).float()
        value, *grads = gradient([value_grad * weight, *_parts(projected, layout)])
        dot = (value * value_grad).sum(1)
        if down_bias is not None:
            dot += dy.float() @ down_bias[e].float()
        weights_grad[pairs] = dot.to(weights.dtype)
        h_grad[rows], h[rows] = _joined(list(grads), layout).to(x.dtype), (value * weight).to(x.dtype)
    return h_grad, h, weights_grad.view_as(weights)


def bank_grad(rows: Tensor, tokens: Tensor, order: Tensor, offsets: Tensor, k: int, transposed: bool = False) -> Tensor:
    """What `moe.bank_grad` computes: [E, N, K] ([E, K, N] if `transposed`) of rows [T * k, N] and tokens [T, K]."""
    sizes = (rows.shape[1], tokens.shape[1])
    grad = rows.new_zeros(offsets.shape[0] - 1, *(sizes[::-1] if transposed else sizes))
    for e, mine in _experts(offsets):
        left, right = rows[mine], tokens[order[mine].long() // k]
        torch.mm(*((right.t(), left) if transposed else (left.t(), right)), out=grad[e])
    return grad


def bias_grad(rows: Tensor, order: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
    """What `moe.bias_grad` computes: [E, N] of rows [T * k, N], or [T, N] with `weights` [T, k]."""
    grad = rows.new_zeros(offsets.shape[0] - 1, rows.shape[1])
    for e, mine in _experts(offsets):
        if weights is None:
            grad[e] = rows[mine].float().sum(0).to(rows.dtype)
        else:
            pairs = order[mine].long()
            grad[e] = (weights.reshape(-1)[pairs].float() @ rows[pairs // weights.shape[1]].float()).to(rows.dtype)
    return grad


def _experts(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and where they are."""
    for e, (start, stop) in enumerate(pairwise(offsets.tolist())):
        if stop > start:
            yield e, slice(start, stop)


def _parts(projected: Tensor, layout: str) -> list[Tensor]:
    if layout == "single":
        return [projected]
    return [projected[:, ::2], projected[:, 1::2]] if layout == "interleaved" else list(projected.chunk(2, 1))


def _joined(parts: list[Tensor], layout: str) -> Tensor:
    return torch.stack(parts, -1).flatten(1) if layout == "interleaved" else torch.cat(parts, 1)
