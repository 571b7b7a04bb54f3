"""Activations recorded as regions, and regions as strings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsec.frontend import region

WIDTH = 6
SCALE = torch.ones(WIDTH, device="meta")


def halves(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def sliced_halves(x: Tensor) -> Tensor:
    return F.gelu(x[..., :WIDTH], approximate="tanh") * x[..., WIDTH:]


def interleaved(x: Tensor) -> Tensor:
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(min=-7.0, max=7.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


def in_place(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    gate.clamp_(max=1.0)
    return F.silu(gate, inplace=True).mul_(up.add_(1))


def seen_twice(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    part = gate[:, :3]
    part.mul_(2)
    return gate * up


def in_f32(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return (F.silu(gate.float()) * up.float()).to(x.dtype)


GATED = [
    (halves, "concat"),
    (sliced_halves, "concat"),
    (interleaved, "interleaved"),
    (in_f32, "concat"),
    (in_place, "concat"),
]


def run(text: str, *args: Tensor) -> Tensor:
    """A decoded region on tensors, op by op."""
    from sparsec.frontend.experts_op import Rows

    return Rows(args[0].shape[0]).run(region.decode(text), args)[0]


@pytest.mark.parametrize(("fn", "layout"), GATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_region_computes_what_its_code_does(fn: Callable[[Tensor], Tensor], layout: str, dtype: torch.dtype) -> None:
    found, text = region.record(fn, WIDTH, True, dtype)
    x = torch.randn(5, 2 * WIDTH, dtype=dtype)
    parts = x.chunk(2, dim=-1) if layout == "concat" else (x[..., ::2], x[..., 1::2])
    assert found == layout
    assert torch.equal(run(text, *parts), fn(x.clone()))


def test_an_ungated_activation_has_one_part() -> None:
    layout, text = region.record(lambda x: F.relu(x).square(), WIDTH, False, torch.float32)
    x = torch.randn(3, WIDTH)
    assert layout == "single"
    assert torch.equal(run(text, x), F.relu(x).square())


def test_equal_activations_are_equal_strings_and_round_trip() -> None:
    first, second = (region.record(halves, WIDTH, True, torch.float32)[1] for _ in range(2))
    assert first == second == region.encode(region.decode(first))


def test_recording_works_while_something_else_is_traced() -> None:
    seen = list[str]()

    class Traced(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(region.record(interleaved, WIDTH, True, torch.float32)[1])
            return x + 1

    torch.export.export(Traced(), (torch.randn(2, 2),), strict=False)
    assert seen[0] == region.record(interleaved, WIDTH, True, torch.float32)[1]


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        (lambda x: F.silu(x)[..., :WIDTH], "whole of the up-projection"),
        (lambda x: x[..., :WIDTH] * x[..., WIDTH:] * SCALE, "that it is not given"),
        (lambda x: x[..., :WIDTH] + x[..., :WIDTH], "two halves"),
        (lambda x: x[..., :WIDTH].sum(-1, keepdim=True) * x[..., WIDTH:] * x.shape[0], "number of rows"),
        (lambda x: x[..., :WIDTH].unsqueeze(0).relu_().squeeze(0) * x[..., WIDTH:], "in place"),
        (seen_twice, "in place"),
    ],
)
def test_what_is_no_activation_is_said(fn: Callable[[Tensor], Tensor], said: str) -> None:
    with pytest.raises(region.UnsupportedActivation, match=said):
        region.record(fn, WIDTH, True, torch.float32)


@pytest.mark.parametrize(
    "text",
    [
        '{"args":[],"ops":[["aten.normal_",[],{},[]]],"yield":[]}',
        '{"args":[[["r",4],"f32"]],"ops":[["aten.add_.Tensor",[0,0],{},[[["r",4],"f32"]]]],"yield":[1]}',
        '{"args":[[["r",4],"f32"]],"ops":[["func.return",[0],{},[]]],"yield":[0]}',
        '{"args":[[["r",4],"f32"]],"ops":[],"yield":[7]}',
        "not json",
    ],
)
def test_a_string_that_is_no_pure_region_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        region.decode(text)


@pytest.mark.parametrize("text", ["relu", "", "[]", '{"args": []}'])
def test_an_activation_that_is_no_region_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="not an activation region"):
        region.decode(text)
