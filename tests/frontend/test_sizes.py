"""Sizes that tracing takes for granted are said, with the user's line."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from sparsec.diagnostics import CompileError
from sparsec.frontend.capture import capture


class Rows(nn.Module):
    """Unrolls over the rows."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for row, number in enumerate(x.argmax(-1).tolist()):
            out[row] = x[row] * number
        return out


class Seats(nn.Module):
    """A capacity that one_hot takes for a number."""

    def forward(self, x: Tensor) -> Tensor:
        seats = x.shape[0] // 2
        return x * F.one_hot(x.argmax(-1).clamp(max=seats - 1), num_classes=seats).sum()


class Open(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.reshape(-1) * 2).view(x.shape)


def test_a_fixed_dimension_and_its_line() -> None:
    (warning,) = capture(Rows().eval(), (torch.randn(6, 8),)).warnings
    assert warning.message.startswith("dimension 0 of 'x' is fixed to 6")
    assert "tolist()" in warning.loc.source


def test_an_equation_and_its_line() -> None:
    (warning,) = capture(Seats().eval(), (torch.randn(6, 8),)).warnings
    assert "(x.shape[0] // 2) == 3" in warning.message
    assert warning.loc.source.startswith("return x * F.one_hot(")
    assert "torch.arange(seats, device=x.argmax(-1).clamp(max=seats - 1).device)" in warning.excerpt


def test_an_equation_is_an_error_where_open_sizes_are_asked_for() -> None:
    with pytest.raises(CompileError, match=r"should stay open are tied .* \(x\.shape\[0\] // 2\) == 3"):
        capture(Seats().eval(), (torch.randn(6, 8),), dynamic={"x": {0: Dim.DYNAMIC}})


def test_an_equation_is_a_warning_where_auto_is_asked_for() -> None:
    assert capture(Seats().eval(), (torch.randn(6, 8),), dynamic={"x": {0: Dim.AUTO}}).warnings


def test_open_and_fixed_sizes_say_nothing() -> None:
    assert not capture(Open().eval(), (torch.randn(6, 8),)).warnings
    assert not capture(Seats().eval(), (torch.randn(6, 8),), dynamic=False).warnings


def test_equal_sizes_of_tensors_within_an_argument_are_asked_for() -> None:
    class Pair(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            return pair[0] + pair[1]

    shapes = {"pair": ({0: Dim("rows")}, {0: Dim("rows")})}
    captured = capture(Pair().eval(), ((torch.randn(6, 8), torch.randn(6, 8)),), dynamic=shapes)
    assert all("pair[" in warning.message for warning in captured.warnings)
