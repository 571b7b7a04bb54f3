"""Compile experts whose code cannot be traced, without touching it.

    python examples/register_experts.py

`Experts` below stands for a class of somebody else's package. It asks which experts were hit, lets each take no more
than so many tokens, and runs them one by one: Python that needs the values of tensors, which torch.export has not got.
The adapter beneath says the same in three lines with the operators of `sparsec.ops`. It is used while the model is
captured; the model itself stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

import sparsec

EXPERTS, TOP_K, HIDDEN, WIDTH, CAPACITY = 8, 2, 64, 96, 24


class Expert(nn.Module):
    """A gated network of two layers, and a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(HIDDEN, WIDTH, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """Runs the experts that were hit."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))
        self.norm = nn.RMSNorm(HIDDEN)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            slot, token = torch.where(expert == ids.T)  # first choices first
            slot, token = slot[:CAPACITY], token[:CAPACITY]
            y = self.norm(self.experts[expert](x[token]))
            out.index_add_(0, token, y * weights[token, slot, None])
        return out


@sparsec.register_experts(Experts)  # or by name, "their_package.modeling:Experts"
def adapter(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """What `Experts.forward` computes."""
    ids = sparsec.ops.capacity(ids, EXPERTS, CAPACITY)
    gates, ups, downs = ([getattr(e, name).weight for e in module.experts] for name in ("gate", "up", "down"))
    activation = sparsec.ops.glu(silu)  # silu(gate) * up
    return sparsec.ops.experts(x, ids, weights, ups, downs, gate=gates, activation=activation, tail=module.norm)


class Layer(nn.Module):
    """Router and experts: [T, H] -> [T, H]."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(EXPERTS, HIDDEN) / HIDDEN**0.5)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = linear(x, self.router).softmax(-1).topk(TOP_K)
        return x + self.experts(x, ids, weights)


def main() -> None:
    """Compile the layer, show what it has become, and compare with eager, some of whose tokens are dropped."""
    torch.manual_seed(0)
    layer = Layer().eval()
    compiled = sparsec.compile(layer, (torch.randn(16, HIDDEN),))
    print(compiled.ir("raise"))
    for tokens in (2, 16, 200):
        x = torch.randn(tokens, HIDDEN)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
        print(f"{tokens:3} tokens: equal to eager")

    with sparsec.use_experts(layer), torch.no_grad():  # the same in eager mode, and under torch.compile
        by_torch = torch.compile(layer, backend="sparsec", fullgraph=True)
        torch.testing.assert_close(by_torch(x), compiled(x), rtol=1e-5, atol=1e-5)
    print("torch.compile: equal too")


if __name__ == "__main__":
    main()
