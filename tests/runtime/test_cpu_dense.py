"""Dense operators on a CPU: the same numbers, whatever is left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsec.ir.parser import parse_module
from sparsec.runtime import cpu_dense
from sparsec.runtime.cpu_dense import Visible
from tests.runtime.test_executor import program

SLOTS, DIM = 12, 8


def rows(first: int, count: int, window: int = SLOTS) -> Tensor:
    """The mask of queries at positions from `first` on: [1, 1, count, SLOTS]."""
    at, slots = torch.arange(first, first + count)[:, None], torch.arange(SLOTS)
    return ((slots <= at) & (slots > at - window))[None, None]


MASKS = {
    "a prompt": (rows(0, 5), (0, 5, "past")),
    "a prompt behind others": (rows(3, 4), (0, 7, "some")),
    "a token": (rows(6, 1), (0, 7, "all")),
    "a token with a window": (rows(9, 1, 4), (6, 10, "all")),
    "a prompt with a window": (rows(2, 6, 3), (0, 8, "some")),
    "all slots": (rows(SLOTS - 1, 1), (0, SLOTS, "all")),
    "sequences of different lengths": (torch.cat([rows(2, 1), rows(7, 1)]), (0, 8, "some")),
    "nothing": (torch.zeros(1, 1, 3, SLOTS, dtype=torch.bool), (0, 0, "some")),
    "no queries": (rows(4, 0), (0, 0, "some")),
    "numbers": (rows(4, 2).float(), (0, 0, "some")),
}


@pytest.mark.parametrize("name", MASKS)
def test_attention_on_what_a_mask_shows(name: str) -> None:
    mask, (start, end, rest) = MASKS[name]
    shown = Visible.of(mask)
    assert (shown.start, shown.end, shown.rest) == (start, end, rest)
    attention = torch.ops.aten.scaled_dot_product_attention.default
    query = torch.randn(2, 3, mask.shape[-2], DIM)
    key, value = torch.randn(2, 2, 3, SLOTS, DIM)
    seen = list[int]()

    def run(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(args[1].shape[-2])
        return attention(*args, **kwargs)

    torch.testing.assert_close(shown.attend(run, query, key, value), attention(query, key, value, mask), equal_nan=True)
    assert seen == [end - start if end else SLOTS]


CACHE = """
module {phase = "lower", version = 1, target = "cpu"}

func @main(
  %q: tensor<1x2xs0x8xf32> {kind = "input"},
  %start: tensor<1xi64> {kind = "input"},
  %keys: tensor<1x2x12x8xf32> {kind = "buffer", source = "keys"},
  %hidden: tensor<1x1x1x12xi1> {kind = "buffer", source = "hidden"}
) -> (tensor<1x2xs0x8xf32> {kind = "output"}, tensor<1x2xs0x8xf32> {kind = "output"}) {
  %slots = aten.arange() {end = 12} : tensor<12xi64>
  %first = aten.arange() {end = s0} : tensor<s0xi64>
  %at = aten.add.Tensor(%first, %start) : tensor<s0xi64>
  %column = aten.unsqueeze(%at) {dim = 1} : tensor<s0x1xi64>
  %mask = aten.le.Tensor(%slots, %column) : tensor<s0x12xi1>
  %a = aten.scaled_dot_product_attention(%q, %keys, %keys, %mask) {scale = 0.5} : tensor<1x2xs0x8xf32>
  %b = aten.scaled_dot_product_attention(%a, %keys, %keys, %mask) : tensor<1x2xs0x8xf32>
  %c = aten.scaled_dot_product_attention(%a, %keys, %keys, %hidden) : tensor<1x2xs0x8xf32>
  return %b, %c
}
"""


def test_layers_share_what_a_mask_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list[Visible]()
    original = Visible.of

    def kept(mask: Tensor) -> Visible:
        found.append(original(mask))
        return found[-1]

    monkeypatch.setattr(Visible, "of", kept)
    keys, hidden = torch.randn(1, 2, SLOTS, DIM), torch.rand(1, 1, 1, SLOTS) < 0.5
    hidden[..., 0] = True
    run = program(parse_module(CACHE), {"keys": keys, "hidden": hidden})
    attention = torch.nn.functional.scaled_dot_product_attention
    for first, count in ((0, 5), (5, 1), (6, 3)):
        query = torch.randn(1, 2, count, DIM)
        b, c = run(query, torch.tensor([first]))
        mask = rows(first, count)
        a = attention(query, keys, keys, mask, scale=0.5)
        torch.testing.assert_close(b, attention(a, keys, keys, mask))
        torch.testing.assert_close(c, attention(a, keys, keys, hidden))
    assert [(shown.end, shown.rest) for shown in found] == [(5, "past"), (6, "all"), (9, "some")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 64), (64,), (2, 64), (1, 3, 64), (0, 64)])
def test_linear_of_any_rows(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(48, 64).to(dtype)
    result = cpu_dense.linear(x, weight)
    assert result.shape == (*shape[:-1], 48)
    tolerance = 1e-2 if dtype is torch.bfloat16 else 1e-5
    exact = torch.nn.functional.linear(x.double(), weight.double()).to(dtype)
    torch.testing.assert_close(result, exact, rtol=tolerance, atol=tolerance * 8)
    one = torch.randn(1, 5, 64).to(dtype)[:, -1:]  # a row with gaps around it
    torch.testing.assert_close(
        cpu_dense.linear(one, weight), torch.nn.functional.linear(one, weight), rtol=tolerance, atol=tolerance * 8
    )
