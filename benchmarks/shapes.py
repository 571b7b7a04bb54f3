"""Expert layers to be measured: sizes, random weights, routing, and what comes out in higher precision."""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Routing = Literal["uniform", "zipf"]


@dataclass(frozen=True)
class Shape:
    """A gated expert layer: each of `tokens` rows of `hidden` goes to `k` of `experts`, whose width is `width`."""

    name: str
    experts: int
    hidden: int
    width: int
    k: int

    @property
    def parameters(self) -> int:
        """Of one expert."""
        return 3 * self.hidden * self.width

    def flops(self, tokens: int) -> float:
        return 2.0 * tokens * self.k * self.parameters

    def __str__(self) -> str:
        return f"{self.name} (E {self.experts}, H {self.hidden}, I {self.width}, k {self.k})"

    @staticmethod
    def parse(text: str) -> Shape:
        """A name in `SHAPES`, or ExHxIxk as `8x256x128x2`. Raises: ValueError."""
        if text in SHAPES:
            return SHAPES[text]
        sizes = text.split("x")
        if len(sizes) != 4 or not all(size.isdigit() and int(size) for size in sizes):
            raise ValueError(f"there is no shape '{text}': {', '.join(SHAPES)}, or sizes ExHxIxk such as 8x256x128x2")
        experts, hidden, width, k = map(int, sizes)
        if k > experts:
            raise ValueError(f"shape '{text}' sends a token to {k} of {experts} experts")
        return Shape(text, experts, hidden, width, k)

    @staticmethod
    def argument(parser: ArgumentParser, text: str) -> Shape:
        """The same for a command line, which ends with what is wrong."""
        try:
            return Shape.parse(text)
        except ValueError as error:
            parser.error(str(error))


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("olmoe", 64, 2048, 1024, 8),
        Shape("qwen3", 128, 2048, 768, 8),
        Shape("mixtral", 8, 4096, 14336, 2),
        Shape("e256", 256, 2048, 512, 8),
        Shape("gpt-oss-20b", 32, 2880, 2880, 4),
        Shape("gpt-oss-120b", 128, 2880, 2880, 4),
        Shape("deepseek-v3", 256, 7168, 2048, 8),
    )
}
CPU_SHAPES = ("olmoe", "qwen3", "mixtral", "e256")
GPU_SHAPES = ("qwen3", "mixtral", "olmoe", "gpt-oss-20b", "gpt-oss-120b", "deepseek-v3")
"""What is measured where, by default; the most important first. Sizes are all that a shape takes of its model: every
layer here has the same gated SiLU and no biases, so that every engine can run it."""


@dataclass(frozen=True)
class Case:
    """One input of an expert layer: x [T, H] bf16, ids [T, k] i64, weights [T, k] bf16."""

    x: Tensor
    ids: Tensor
    weights: Tensor

    @property
    def hit(self) -> int:
        """How many different experts it needs."""
        return int(self.ids.unique().numel())


def bank(shape: Shape, device: str | torch.device = "cpu") -> Any:
    """transformers' module of OLMoE's experts at this shape: random weights, bf16, loop over experts.

    On the meta device it has no numbers.
    """
    from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    config = OlmoeConfig(num_experts=shape.experts, hidden_size=shape.hidden, intermediate_size=shape.width)
    config._experts_implementation = "eager"
    with torch.device("meta"):
        module: Any = OlmoeExperts(config)
    module = module.to(torch.bfloat16).requires_grad_(False)
    device = torch.device(device)
    if device.type == "meta":
        return module
    module = module.to_empty(device=device)
    for weight in (module.gate_up_proj, module.down_proj):
        for expert in weight:  # one at a time: random numbers are made in f32
            expert.copy_(torch.randn(expert.shape, device=device) * expert.shape[1] ** -0.5)
    return module


def cases(
    shape: Shape, tokens: int, routing: Routing, count: int, seed: int = 0, device: str | torch.device = "cpu"
) -> list[Case]:
    """Inputs of `tokens` rows. A single token takes the experts in turn, so that their weights come from memory.

    With `zipf`, expert number r of a fixed random order is asked for 1/r as often as the first.
    """
    made = torch.Generator(device).manual_seed(seed)
    popular = torch.zeros(shape.experts, device=device)
    if routing == "zipf":
        ranks = torch.arange(1, shape.experts + 1, device=device)
        popular[torch.randperm(shape.experts, generator=made, device=device)] = -ranks.float().log()
    drawn = list[Case]()
    for turn in range(count):
        if tokens == 1 and routing == "uniform":
            ids = (torch.arange(shape.k, device=device) + turn * shape.k).remainder(shape.experts).view(1, -1)
        else:  # the k largest of log p + Gumbel noise: k draws without putting back
            noise = -torch.empty(tokens, shape.experts, device=device).exponential_(generator=made).log()
            ids = (popular + noise).topk(shape.k, 1).indices
        x = torch.randn(tokens, shape.hidden, generator=made, device=device).bfloat16()
        weights = torch.rand(tokens, shape.k, generator=made, device=device).softmax(-1).bfloat16()
        drawn.append(Case(x, ids, weights))
    return drawn


def reference(module: Any, case: Case, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What some rows of the output are in a higher precision: [len(rows), H]."""
    x, ids, weights = case.x[rows].to(dtype), case.ids[rows], case.weights[rows].to(dtype)
    out = torch.zeros_like(x)

    def expert_of(rows: Tensor, expert: int) -> Tensor:
        gate, up = F.linear(rows, module.gate_up_proj[expert].to(dtype)).chunk(2, -1)
        return F.linear(F.silu(gate) * up, module.down_proj[expert].to(dtype))

    for expert in ids.unique().tolist():
        tokens, slots = (ids == expert).nonzero(as_tuple=True)
        # Weights in f64 take four times the layer's memory: none are kept for the backward pass.
        part = checkpoint(expert_of, x[tokens], expert, use_reentrant=False, preserve_rng_state=False)
        out = out.index_add(0, tokens, part * weights[tokens, slots, None])
    return out
