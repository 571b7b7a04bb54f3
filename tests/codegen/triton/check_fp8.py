"""Rows that are rounded to fp8, in Triton's interpreter: each rounding against PyTorch's, and GEMMs on them."""
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.codegen.triton.formats import to_fp8
from sparsec.codegen.triton.rounding import BEYOND
from sparsec.dialects.moe import gather_gemm_reference, gemm_combine_reference, group_reference
from sparsec.dialects.moe.references import rounded_to_fp8
from sparsec.ir.types import DType
from tests.codegen.triton import build
from tests.codegen.triton.check_experts import TorchEnv, clamped, close, loads, silu, squared
from tests.codegen.triton.interpret import kernel
from tests.codegen.triton.packed import packed, quantised

TILE = {"block_m": 16, "block_n": 32, "block_k": 64}
ROWS = {"kernel": "rows", "up_to": 40, "block_m": 2, "block_n": 8, "block_k": 64, "num_stages": 2}
FAMILIES: dict[str, Any] = {
    "fp8": ({**TILE, "kernel": "fp8"},),
    "tiles": (TILE,),
    "rows": (ROWS, {**TILE, "kernel": "fp8"}),
    "swap": ({**TILE, "kernel": "swap", "block_n": 64},),
}


def drawn(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows whose groups are of very different sizes, one of zeros."""
    sizes = torch.randint(-9, 2, (rows, -(-columns // 128))).repeat_interleave(128, 1)[:, :columns]
    x = torch.ldexp(torch.randn(rows, columns), sizes)
    x[: rows // 2, :128] = 0
    return x.to(dtype)


@triton.jit
def to_bytes(x: Any, q: Any, scale: Any, BEYOND: tl.constexpr) -> None:
    """One group in a row of its own."""
    row, column = tl.program_id(0) * 64 + tl.arange(0, 64), tl.arange(0, 128)
    made, by = to_fp8(tl.load(x + row[:, None, None] * 128 + column[None, None, :]), BEYOND)
    tl.store(q + row[:, None, None] * 128 + column[None, None, :], made)
    tl.store(scale + row[:, None], by)


def test_bytes_are_those_of_pytorch() -> None:
    """Every bf16 in a group with every sixteenth, finite or not."""
    every = torch.arange(1 << 16).to(torch.uint16).view(torch.bfloat16).float()
    x = torch.cat([every.reshape(512, 128), every.reshape(128, 512).T, torch.randn(512, 128)]).contiguous()
    x = torch.cat([x, x[torch.randperm(1536, generator=torch.Generator().manual_seed(0))] * x])
    where = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    q, scale = (torch.empty(len(x), n, dtype=t, device=where) for n, t in ((128, torch.uint8), (1, torch.float32)))
    to_bytes[(len(x) // 64,)](x.to(where), q, scale, struct.unpack("<i", struct.pack("<f", BEYOND[DType.f32]))[0])
    q, scale, wanted = q.cpu(), scale.cpu(), rounded_to_fp8(x)
    finite = wanted.isfinite().all(1)
    assert torch.equal(finite, scale[:, 0].isfinite()) and 1000 < finite.sum() < len(x)
    assert torch.equal(q.view(torch.float8_e4m3fn).float()[finite] * scale[finite], wanted[finite])
    exact = x[finite] / scale[finite]
    assert torch.equal(q[finite], exact.to(torch.float8_e4m3fn).view(torch.uint8))


def check_up(
    family: str, tokens: int, k: int, experts: int, layout: str = "concat", dtype: torch.dtype = torch.float32,
    kind: str = "skip", hidden: int = 160, width: int = 64, bias: bool = False, x: torch.Tensor | None = None,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    activations: dict[str, Callable[..., torch.Tensor]] = {"single": squared, "interleaved": clamped}
    activation = activations.get(layout, silu)
    func = build.gather_gemm(activation, hidden, width, experts, k, dtype, layout, bias, False, FAMILIES[family])
    columns = width if layout == "single" else 2 * width
    x = drawn(tokens, hidden, dtype) if x is None else x
    made, scales, up = quantised(torch.randn(experts, columns, hidden) * torch.rand(experts, columns, 1) * 0.02, "fp8")
    up_bias = torch.randn(experts, columns, dtype=dtype) if bias else None
    order, offsets = group_reference(loads(tokens, k, experts, kind), experts)
    (h,) = kernel(packed(func, "fp8", "fp8"))([x, order, offsets, made, up_bias, None, scales])
    env: Any = TorchEnv(activation)
    body: Any = func.body.ops[0].regions[0]
    wide = None if up_bias is None else up_bias.float()
    wanted = gather_gemm_reference(env, body, layout, rounded_to_fp8(x), order, offsets, up, wide, False, k)
    used = int(offsets[-1])
    same(h[:used], wanted[:used].to(dtype))


def check_down(
    family: str, tokens: int, k: int, experts: int, dtype: torch.dtype = torch.float32, kind: str = "skip",
    hidden: int = 136, width: int = 200, bias: bool = False,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    func = build.gemm_combine(hidden, width, experts, k, dtype, bias, False, FAMILIES[family])
    ids = loads(tokens, k, experts, kind)
    order, offsets = group_reference(ids, experts)
    h, weights = drawn(tokens * k, width, dtype), torch.rand(tokens, k)
    made, scales, down = quantised(torch.randn(experts, hidden, width) * 0.02, "fp8")
    down_bias = torch.randn(experts, hidden, dtype=dtype) if bias else None
    (y,) = kernel(packed(func, "fp8", "fp8"))([h, order, offsets, weights, made, down_bias, scales])
    wanted = gemm_combine_reference(rounded_to_fp8(h), order, offsets, weights, down, down_bias, False, dtype)
    same(y, wanted)


def same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Close, and NaN in the same places."""
    assert torch.equal(got.isnan(), wanted.isnan())
    close(got.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("layout", ["concat", "interleaved", "single"])
@pytest.mark.parametrize("family", ["fp8", "tiles", "rows"])
def test_layouts(family: str, layout: str) -> None:
    check_up(family, 6, 2, 3, layout, bias=True, width=88)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("fp8", torch.float16), ("tiles", torch.float32), ("tiles", torch.float16)],
)
def test_dtypes(family: str, dtype: torch.dtype) -> None:
    check_up(family, 6, 2, 3, dtype=dtype)
    check_down(family, 6, 2, 3, dtype, bias=True)


@pytest.mark.parametrize("family", ["fp8", "tiles", pytest.param("rows", marks=pytest.mark.slow)])
def test_token_counts_and_whole_blocks(family: str) -> None:
    for tokens in (0, 9):
        check_up(family, tokens, 2, 4, kind="even", hidden=256, width=128)
        check_down(family, tokens, 2, 4, kind="hot", hidden=128, width=256)


@pytest.mark.parametrize("family", ["fp8", "tiles", pytest.param("rows", marks=pytest.mark.slow)])
def test_rows_that_are_not_finite_make_their_results_nan(family: str) -> None:
    """And no others; so do those that would not be finite once they are rounded."""
    torch.manual_seed(1)
    x = torch.randn(9, 300)
    x[1, 5], x[2, 299], x[3, 130], x[4, 0], x[5] = torch.inf, torch.nan, -3.39e38, 1e-44, 0.0
    check_up(family, 9, 2, 3, kind="even", hidden=300, x=x)
    half = torch.randn(9, 300).half()
    half[1, 5], half[2, 7] = 63488, 63456
    check_up(family, 9, 2, 3, "single", torch.float16, kind="even", hidden=300, x=half)


def test_weights_as_the_first_operand_meet_rounded_rows_too() -> None:
    check_up("swap", 5, 2, 4, dtype=torch.float16, kind="hot", hidden=128, width=64)
    check_down("swap", 5, 2, 4, torch.float16, kind="even", hidden=64, width=128)


@pytest.mark.slow
@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    st.sampled_from(["fp8", "tiles", "rows"]), st.integers(1, 9), st.integers(1, 3),
    st.sampled_from(["even", "hot", "skip"]), st.integers(3, 300), st.integers(3, 150),
)  # fmt: skip
def test_any_size(family: str, tokens: int, k: int, kind: str, hidden: int, width: int) -> None:
    check_up(family, tokens, k, 3, kind=kind, hidden=hidden, width=width)
    check_down(family, tokens, k, 3, kind=kind, hidden=hidden, width=width)
