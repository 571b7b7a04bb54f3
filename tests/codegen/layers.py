"""Layers of every kind that banks come in, as text, for tests of code generators."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsec.ir.core import Module
from sparsec.ir.parser import parse_module
from sparsec.ir.types import DType, TensorType
from sparsec.ir.verify import verify_module

ROUTER = """
  %ids, %w = moe.route(%l) : tensor<s0x{k}xi64>, tensor<s0x{k}xf32> {{
    body(%z: tensor<s0x5xf32>):
      %p = aten.softmax.int(%z) {{dim = -1}} : tensor<s0x5xf32>
      %v, %e = aten.topk(%p) {{k = {k}}} : tensor<s0x{k}xf32>, tensor<s0x{k}xi64>
      yield %e, %v
  }}"""
ACTIVATION = """
    activation(%a: tensor<rx24xf32>, %b: tensor<rx24xf32>):
      %g = aten.silu(%a) : tensor<rx24xf32>
      %m = aten.mul.Tensor(%g, %b) : tensor<rx24xf32>
      yield %m"""
NORM = """
    tail(%y: tensor<rx40xf32>, %n: tensor<40xf32>, %o: tensor<f32>):
      %s = aten.mul.Tensor(%y, %y) : tensor<rx40xf32>
      %m = aten.mean.dim(%s) {dim = [-1], keepdim = true} : tensor<rx1xf32>
      %e = aten.add.Tensor(%m, %o) : tensor<rx1xf32>
      %i = aten.rsqrt(%e) : tensor<rx1xf32>
      %h = aten.mul.Tensor(%y, %i) : tensor<rx40xf32>
      %q = aten.mul.Tensor(%h, %n) : tensor<rx40xf32>
      yield %q"""
TYPES = {
    "x": "tensor<s0x40xf32>",
    "l": "tensor<s0x5xf32>",
    "up": "tensor<5x48x40xf32>",
    "ub": "tensor<5x48xf32>",
    "down": "tensor<5x40x24xf32>",
    "db": "tensor<5x40xf32>",
    "n": "tensor<40xf32>",
    "o": "tensor<f32>",
    "heads": "tensor<5x24x40xf32>",
    "back": "tensor<5x24x40xf32>",
}


@dataclass(frozen=True)
class Case:
    """One layer: what it reads besides x and the logits, its k, and its body from the router's results on."""

    reads: str
    body: str
    k: int = 2

    def module(self) -> Module:
        """The module as it comes out of `raise`."""
        names = ["x", "l", *self.reads.split()]
        results = self.body.rstrip().rpartition("return ")[2].split(", ")
        head = ", ".join(f"%{name}: {TYPES[name]}" for name in names)
        shapes = {"%y": "tensor<s0x40xf32>", "%h": f"tensor<s0x{self.k}x24xf32>", "%ids": f"tensor<s0x{self.k}xi64>"}
        types = ", ".join(shapes.get(result, f"tensor<s0x{self.k}xf32>") for result in results)
        route = ROUTER.format(k=self.k)
        module = parse_module(f'module {{phase = "raise"}}\nfunc @main({head}) -> ({types}) {{{route}{self.body}\n}}')
        verify_module(module)
        return module


LAYERS = {
    "plain": Case("up down", "\n %y = moe.experts(%x, %ids, %w, %up, %down) : tensor<s0x40xf32> {"
                  + ACTIVATION + "\n  }\n  return %y"),
    "input": Case("up down ub", "\n %y = moe.experts(%x, %ids, %w, %up, %down, %ub) {weight_on = \"input\"}"
                  " : tensor<s0x40xf32> {" + ACTIVATION + "\n  }\n  return %y"),
    "tail": Case("up down db n o", "\n %y = moe.experts(%x, %ids, %w, %up, %down, none, %db, none, none, %n, %o)"
                 " : tensor<s0x40xf32> {" + ACTIVATION + NORM + "\n  }\n  return %y, %w"),
    "input_and_tail": Case(
        "up down ub n o",
        "\n %y = moe.experts(%x, %ids, %w, %up, %down, %ub, none, none, none, %n, %o) {weight_on = \"input\"}"
        " : tensor<s0x40xf32> {" + ACTIVATION + NORM + "\n  }\n  return %y", 1),
    "capacity": Case(
        "up down", "\n %few = moe.capacity(%ids) {num_experts = 5, capacity = (s0//3+1)} : tensor<s0x2xi64>"
        "\n %y = moe.experts(%x, %few, %w, %up, %down) : tensor<s0x40xf32> {" + ACTIVATION + "\n  }\n  return %y"),
    "tail_and_capacity": Case(
        "up down db n o", "\n %few = moe.capacity(%ids) {num_experts = 5, capacity = 1, order = \"token\"}"
        " : tensor<s0x2xi64>\n %y = moe.experts(%x, %few, %w, %up, %down, none, %db, none, none, %n, %o)"
        " : tensor<s0x40xf32> {"
        + ACTIVATION + NORM + "\n  }\n  return %y"),
    "linears": Case(
        "heads back db", "\n %h = moe.grouped_linear(%x, %ids, %heads) : tensor<s0x2x24xf32>"
        "\n %t = aten.tanh(%h) : tensor<s0x2x24xf32>"
        "\n %y = moe.grouped_linear(%t, %ids, %back, %db, %w) {transposed = true} : tensor<s0x40xf32>"
        "\n  return %h, %y"),
    "linears_of_one": Case(
        "heads back", "\n %h = moe.grouped_linear(%x, %ids, %heads) : tensor<s0x1x24xf32>"
        "\n %y = moe.grouped_linear(%h, %ids, %back, none, %w) {transposed = true} : tensor<s0x40xf32>"
        "\n  return %h, %y", 1),
    "top_1": Case(
        "up down db", "\n %few = moe.capacity(%ids) {num_experts = 5, capacity = 2} : tensor<s0x1xi64>"
        "\n %y = moe.experts(%x, %few, %w, %up, %down, none, %db) : tensor<s0x40xf32> {"
        + ACTIVATION + "\n  }\n  return %y", 1),
    "lone_route": Case("", "\n return %ids, %w", 3),
}  # fmt: skip


def inputs(module: Module, tokens: int, seed: int = 0) -> list[Tensor]:
    """Random values of the arguments of `main`."""
    generator = torch.Generator().manual_seed(seed)
    made = list[Tensor]()
    for arg in module.main.body.args:
        type = arg.type
        assert isinstance(type, TensorType) and type.dtype is DType.f32
        shape = [dim if isinstance(dim, int) else tokens for dim in type.shape]
        drawn = torch.randn(shape, generator=generator)
        made.append(drawn.abs() if not shape else drawn * 0.2 if len(shape) == 3 else drawn)
    return made
