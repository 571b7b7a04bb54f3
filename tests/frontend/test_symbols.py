"""Sizes computed through floats, as capacities are."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsec.frontend.symbols import Symbols
from sparsec.ir.types import Dim, evaluate


def rows_of(size: Callable[[int], int]) -> Dim:
    """How many rows a module makes of x [T], as a dimension."""

    class Made(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.new_zeros(size(x.shape[0]) + 1)

    dims = ((torch.export.Dim.DYNAMIC,),)
    graph = torch.export.export(Made(), (torch.zeros(24),), dynamic_shapes=dims, strict=False).graph
    return Symbols().dim(graph.output_node().args[0][0].meta["val"].shape[0])  # type: ignore[index, union-attr]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (lambda tokens: math.ceil(tokens / 6), "(s0+5)//6+1"),
        (lambda tokens: math.floor(tokens / 6), "s0//6+1"),
        (lambda tokens: math.ceil(1.25 * tokens / 8), "(5*s0+31)//32+1"),
        (lambda tokens: math.ceil(1.0 * tokens), "s0+1"),
    ],
)
def test_a_rounded_ratio_is_exact(size: Callable[[int], int], text: str) -> None:
    dim = rows_of(size)
    assert dim == text
    assert all(evaluate(dim, {"s0": tokens}) == size(tokens) + 1 for tokens in range(1, 3000))


def test_a_factor_that_floats_round_is_refused() -> None:
    with pytest.raises(ValueError, match="is no expression of"):
        rows_of(lambda tokens: math.ceil(1.1 * tokens))
