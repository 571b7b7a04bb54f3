"""Compile a mixture of experts that no library knows.

    python examples/custom_moe.py

The router below exists nowhere else: it scores experts by the root of a softplus, picks three of twelve by score plus
a bias, and weighs them by their scores alone. sparsec is told none of this. It captures the module, cuts the router
out of the graph as the region of one `moe.route`, and makes a kernel of whatever is in it.

The bank of experts is marked with transformers' `use_experts_implementation`, the interface by which its own models
let a library run their experts. The loop in `forward` is what runs without sparsec.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu, softplus
from transformers import PreTrainedConfig
from transformers.integrations.moe import use_experts_implementation

import sparsec

EXPERTS, TOP_K, HIDDEN, WIDTH = 12, 3, 64, 96


@use_experts_implementation
class Experts(nn.Module):
    """Twelve gated two-layer networks, as two stacked weights."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) / HIDDEN**0.5)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5)
        self.act_fn = silu

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """x [T, H], ids [T, k], weights [T, k] -> [T, H], expert by expert."""
        out = torch.zeros_like(hidden_states)
        for expert in range(EXPERTS):
            token, slot = torch.where(top_k_index == expert)
            gate, up = linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            y = linear(silu(gate) * up, self.down_proj[expert]) * top_k_weights[token, slot, None]
            out.index_add_(0, token, y)
        return out


class Router(nn.Module):
    """Ids and weights [T, k] for x [T, H]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN) / HIDDEN**0.5)
        self.bias = nn.Parameter(torch.randn(EXPERTS) / 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = softplus(linear(x, self.weight)).sqrt()
        ids = (scores + self.bias).topk(TOP_K, dim=-1).indices
        weights = scores.gather(-1, ids)
        return ids, 1.5 * weights / weights.sum(dim=-1, keepdim=True)


class Layer(nn.Module):
    """Norm, router, experts, and the residual around them: [T, H] -> [T, H]."""

    def __init__(self) -> None:
        super().__init__()
        config = PreTrainedConfig()
        config._experts_implementation = "eager"
        self.norm = nn.RMSNorm(HIDDEN)
        self.router = Router()
        self.experts: Any = Experts(config)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return x + self.experts(normed, *self.router(normed))


def main() -> None:
    """Compile the layer, show what was found in it, and compare with eager at numbers of tokens not compiled for."""
    torch.manual_seed(0)
    layer = Layer().eval()
    compiled = sparsec.compile(layer, (torch.randn(16, HIDDEN),))
    print(compiled.ir("raise"))
    for tokens in (2, 16, 100):
        x = torch.randn(tokens, HIDDEN)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
        print(f"{tokens:3} tokens: equal to eager")


if __name__ == "__main__":
    main()
