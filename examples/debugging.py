"""Three layers with something wrong, for the stories of docs/debugging.md: each function gives a model and inputs.

    sparsec explain examples/debugging.py:centred_router
    sparsec bisect  examples/debugging.py:wrong_pass
    sparsec explain examples/debugging.py:normed_experts --missed

The page says what each command finds, and what to do about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from sparsec import pipeline
from sparsec.ir.core import Module, Op
from sparsec.ir.rewrite import Rewriter, rule
from sparsec.passes.base import Pass, PassContext, register

EXPERTS, HIDDEN, WIDTH = 8, 64, 96


class Layer(nn.Module):
    """Two of eight experts for each token."""

    def __init__(self, centred: bool = False, normed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.centred, self.normed = centred, normed
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) / HIDDEN**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        if self.centred:
            logits = logits - logits.mean(0)  # of all tokens
        weights, ids = logits.softmax(-1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for expert in range(EXPERTS):
            gate, up = linear(x, self.up[expert]).chunk(2, -1)
            inner = silu(gate) * up
            if self.normed:
                inner = self.norm(inner)
            share = (weights * (ids == expert)).sum(-1, keepdim=True)
            y = y + linear(inner, self.down[expert]) * share
        return x + y


def centred_router() -> tuple[nn.Module, tuple[Tensor]]:
    """A router whose choice for one token depends on all the others."""
    return Layer(centred=True), (torch.randn(16, HIDDEN),)


def normed_experts() -> tuple[nn.Module, tuple[Tensor]]:
    """Experts with a norm between their matrices."""
    return Layer(normed=True), (torch.randn(16, HIDDEN),)


def wrong_pass() -> tuple[nn.Module, tuple[Tensor]]:
    """A right layer, and a wrong pass of one's own behind those of phase `fuse`."""
    if "fold-residual" not in pipeline.PIPELINES["fuse"]:
        register(FoldResidual)
        pipeline.PIPELINES["fuse"] += ",fold-residual"
    return Layer(), (torch.randn(16, HIDDEN),)


@dataclass(frozen=True)
class FoldResidual(Pass):
    """Meant to drop a zero that is added, drops whatever is added last."""

    name: ClassVar[str] = "fold-residual"

    def run(self, module: Module, ctx: PassContext) -> None:
        @rule("aten.add.Tensor")
        def drop_zero(op: Op, rw: Rewriter) -> bool:
            x, y = op.operands
            if y.op is None or not y.op.name.startswith("moe."):
                return False
            rw.replace(op, [x])  # y is not looked at
            return True

        ctx.rewrite(module, [drop_zero])
