"""Expert layers whose experts are modules of their own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsec.frontend import region


def _gated(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, -1)
    return F.silu(gate) * up


class Expert(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, width, bias=False)
        self.up = nn.Linear(hidden, width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)


class Layer(nn.Module):
    """A router and E experts, whose weights are stacked where they are used."""

    def __init__(self, hidden: int = 16, width: int = 24, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, experts, bias=False)
        self.experts: Any = nn.ModuleList(Expert(hidden, width) for _ in range(experts))
        _, self.activation = region.record(_gated, width, True, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2)
        gate = torch.stack([expert.gate.weight for expert in self.experts])
        up = torch.stack([expert.up.weight for expert in self.experts])
        down = torch.stack([expert.down.weight for expert in self.experts])
        bank = torch.cat([gate, up], 1)
        return torch.ops.sparsec.experts(x, ids, weights, bank, down, activation=self.activation)


class Stack(nn.Module):
    """Layers one after another."""

    def __init__(self, layers: int = 2, hidden: int = 16, width: int = 24, experts: int = 4) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(Layer(hidden, width, experts) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def stack(layers: int = 2, hidden: int = 16, width: int = 24, experts: int = 4) -> Stack:
    """A random one, in f32."""
    torch.manual_seed(0)
    return Stack(layers, hidden, width, experts).eval()
