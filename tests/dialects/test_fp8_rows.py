"""Rows that are rounded to e4m3: the reference against a search through all its values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.diagnostics import CompileError
from sparsec.dialects.moe.references import rounded_to_fp8
from sparsec.ir.parser import parse_module
from sparsec.ir.verify import verify_module

VALUES = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
"""Every e4m3 from 0 on, by its bits."""

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def nearest(value: float) -> float:
    """The e4m3 that is nearest to a value, of two the one with even bits."""
    away = (VALUES - abs(value)).abs()
    best = [i for i in range(127) if away[i] == away.min()]
    return math.copysign(float(VALUES[next((i for i in best if i % 2 == 0), best[0])]), value)


@settings(max_examples=60, deadline=None)
@given(st.lists(FLOATS | st.floats(-500, 500, width=32), min_size=1, max_size=5))
def test_groups_are_rounded_to_the_nearest_over_a_power_of_two(values: list[float]) -> None:
    row = torch.tensor([values])
    found, largest = rounded_to_fp8(row)[0].tolist(), max(map(abs, values))
    if largest >= 31 / 32 * 2.0**128:
        assert all(map(math.isnan, found))
        return
    scale = 2.0 ** max(-126, math.ceil(math.log2(largest / 448)) if largest else -126)
    assert largest <= 448 * scale and (largest > 224 * scale or scale == 2.0**-126)
    assert found == [nearest(value / scale) * scale for value in row[0].double().tolist()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_rows_become_their_dtype_holds(dtype: torch.dtype) -> None:
    """Of groups of every size."""
    every = torch.arange(1 << 16).to(torch.uint16).view(dtype)
    every = every[every.isfinite()]
    largest = every[every > 0][::64, None]
    rows = torch.cat([every[::513][:127].clamp(-largest, largest), largest], 1)
    found = rounded_to_fp8(rows)
    assert torch.equal(found.nan_to_num(), found.to(dtype).float().nan_to_num())
    assert torch.equal(found.isfinite().all(1), (largest < 31 / 32 * 2 ** math.frexp(torch.finfo(dtype).max)[1])[:, 0])


def test_groups_that_are_left_alone_and_those_that_break() -> None:
    rows = torch.zeros(4, 300)
    rows[0, 0], rows[1, 130], rows[2, 299], rows[3, :] = 449.0, math.inf, math.nan, -3.39e38
    found = rounded_to_fp8(rows)
    assert found[0, 0] == 448 and not found[0, 1:].any()
    assert found[1, 128:256].isnan().all() and not found[1, :128].any() and not found[1, 256:].any()
    assert found[2, 256:].isnan().all() and not found[2, :256].any() and found[3].isnan().all()


TEXT = """
module {phase = "fuse"}

func @main(%h: tensor<(2*s0)x64xbf16> {kind = "input"}, %order: tensor<(2*s0)xi32> {kind = "input"},
  %offsets: tensor<9xi32> {kind = "input"}, %w: tensor<s0x2xbf16> {kind = "input"},
  %down: tensor<8x64x64xbf16> {kind = "param", source = "down"}) -> (tensor<s0x64xbf16> {kind = "output"}) {
  %y = moe.gemm_combine(%h, %order, %offsets, %w, %down) {activations = "fp8"} : tensor<s0x64xbf16>
  return %y
}
"""


def test_plain_banks_are_not_multiplied_by_them() -> None:
    with pytest.raises(CompileError, match="activations are fp8, but packing is 'plain': fp8 is multiplied by fp8"):
        verify_module(parse_module(TEXT))
