"""A small layer with its router, lowered and compiled for a GPU: what tests of artifacts share."""

from __future__ import annotations

from functools import cache

import torch

from sparsec import pipeline
from sparsec.codegen.emit import Emitted, emit
from sparsec.ir.core import Module
from sparsec.ir.parser import parse_module

TEXT = """
module {phase = "raise"}

func @main(%x: tensor<s0x128xbf16> {kind = "input"}, %l: tensor<s0x8xbf16> {kind = "input"}, %up: tensor<8x128x128xbf16> {kind = "param", source = "up"}, %down: tensor<8x128x64xbf16> {kind = "param", source = "down"}) -> (tensor<s0x128xbf16> {kind = "output"}) {
  %ids, %w = moe.route(%l) : tensor<s0x2xi64>, tensor<s0x2xbf16> {
    body(%z: tensor<s0x8xbf16>):
      %p = aten.softmax.int(%z) {dim = -1} : tensor<s0x8xbf16>
      %v, %e = aten.topk(%p) {k = 2} : tensor<s0x2xbf16>, tensor<s0x2xi64>
      yield %e, %v
  }
  %y = moe.experts(%x, %ids, %w, %up, %down) : tensor<s0x128xbf16> {
    activation(%a: tensor<rx64xbf16>, %b: tensor<rx64xbf16>):
      %g = aten.silu(%a) : tensor<rx64xbf16>
      %m = aten.mul.Tensor(%g, %b) : tensor<rx64xbf16>
      yield %m
  }
  return %y
}
"""  # noqa: E501

WEIGHTS = {"up": (8, 128, 128), "down": (8, 128, 64)}


@cache
def lowered(target: str) -> Module:
    return pipeline.run(parse_module(TEXT), target=target).module


@cache
def emitted(target: str) -> Emitted:
    """Plan and files, every variant that the schedule chose compiled."""
    return emit(lowered(target), target)


def weights() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape).bfloat16() for name, shape in WEIGHTS.items()}
