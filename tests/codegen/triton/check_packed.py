"""GEMMs on packed banks in Triton's interpreter, against the references on what the packed values stand for."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.dialects.moe import gather_gemm_reference, gemm_combine_reference, group_reference
from tests.codegen.triton import build
from tests.codegen.triton.check_experts import TorchEnv, clamped, close, loads, silu, squared
from tests.codegen.triton.interpret import kernel
from tests.codegen.triton.packed import packed, quantised

SMALL = ({"up_to": None, "block_m": 16, "block_n": 32, "block_k": 64},)
COMPILED = [] if os.environ.get("TRITON_INTERPRET") == "1" else [torch.bfloat16]  # which the interpreter does not do
ROWS = {"kernel": "rows", "block_m": 2, "block_n": 8, "block_k": 64, "num_stages": 2, "up_to": 40}
DEEP = ({"up_to": 4, "block_m": 16, "block_n": 64, "block_k": 256}, {"block_m": 32, "block_n": 32, "block_k": 64})


def near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    if wanted.dtype is torch.bfloat16:
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
    else:
        close(got, wanted)


def check_up(
    packing: str, tokens: int, k: int, experts: int, layout: str, bias: bool, dtype: torch.dtype, kind: str,
    hidden: int, width: int, variants: Any = SMALL,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    activations: dict[str, Callable[..., torch.Tensor]] = {"single": squared, "interleaved": clamped}
    activation = activations.get(layout, silu)
    func = build.gather_gemm(activation, hidden, width, experts, k, dtype, layout, bias, False, variants)
    columns = width if layout == "single" else 2 * width
    x = torch.randn(tokens, hidden, dtype=dtype)
    made, scales, up = quantised(torch.randn(experts, columns, hidden) * torch.rand(experts, columns, 1) * 0.2, packing)
    up_bias = torch.randn(experts, columns, dtype=dtype) if bias else None
    order, offsets = group_reference(loads(tokens, k, experts, kind), experts)
    operands = [x, order, offsets, made, up_bias, None, scales]
    (h,) = kernel(packed(func, packing))(operands)
    env: Any = TorchEnv(activation)
    body: Any = func.body.ops[0].regions[0]
    wide_bias = None if up_bias is None else up_bias.float()
    wanted = gather_gemm_reference(env, body, layout, x.float(), order, offsets, up, wide_bias, False, k)
    used = int(offsets[-1])
    near(h[:used], wanted[:used].to(dtype))


def check_down(
    packing: str, tokens: int, k: int, experts: int, bias: bool, dtype: torch.dtype, kind: str, hidden: int,
    width: int, variants: Any = SMALL,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    func = build.gemm_combine(hidden, width, experts, k, dtype, bias, False, variants)
    ids = loads(tokens, k, experts, kind)
    order, offsets = group_reference(ids, experts)
    h, weights = torch.randn(tokens * k, width, dtype=dtype), torch.rand(tokens, k)
    made, scales, down = quantised(torch.randn(experts, hidden, width) * 0.2, packing)
    down_bias = torch.randn(experts, hidden, dtype=dtype) if bias else None
    (y,) = kernel(packed(func, packing))([h, order, offsets, weights, made, down_bias, scales])
    near(y, gemm_combine_reference(h, order, offsets, weights, down, down_bias, False, dtype))


@pytest.mark.parametrize("packing", ["fp8", "mxfp4"])
@pytest.mark.parametrize("layout", ["concat", "interleaved", "single"])
def test_layouts(packing: str, layout: str) -> None:
    """Sizes beyond a block of 128 both ways, tails both ways."""
    check_up(packing, 6, 2, 3, layout, True, torch.float32, "skip", 160, 88)


@pytest.mark.parametrize("packing", ["fp8", "mxfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *COMPILED])
def test_dtypes(packing: str, dtype: torch.dtype) -> None:
    check_up(packing, 6, 2, 3, "concat", False, dtype, "skip", 160, 64)
    check_down(packing, 6, 2, 3, True, dtype, "skip", 136, 200)


@pytest.mark.parametrize("packing", ["fp8", "mxfp4"])
@pytest.mark.parametrize("tokens", [0, 33])
def test_whole_blocks_and_token_counts(packing: str, tokens: int) -> None:
    check_up(packing, tokens, 2, 4, "concat", False, torch.float32, "even", 256, 128, DEEP)
    check_down(packing, tokens, 2, 4, False, torch.float32, "hot", 128, 256, DEEP)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    st.sampled_from(["fp8", "mxfp4"]), st.integers(1, 9), st.integers(1, 3), st.sampled_from(["even", "hot", "skip"]),
    st.integers(3, 300), st.integers(3, 150),
)  # fmt: skip
def test_any_size(packing: str, tokens: int, k: int, kind: str, hidden: int, width: int) -> None:
    check_up(packing, tokens, k, 3, "concat", False, torch.float32, kind, hidden, width)
    check_down(packing, tokens, k, 3, False, torch.float32, kind, hidden, width)


def rows(**kwargs: Any) -> tuple[dict[str, Any], ...]:
    """Up to 40 tokens by `rows`, more by tiles."""
    return ({**ROWS, **kwargs}, *SMALL)


@pytest.mark.parametrize(("packing", "layout"), [("fp8", "concat"), ("mxfp4", "interleaved"), ("fp8", "single")])
def test_rows_of_every_layout(packing: str, layout: str) -> None:
    """Sizes that no block divides: of concat, a tile of the second part lies in two blocks of scales."""
    check_up(packing, 3, 2, 3, layout, True, torch.float32, "skip", 150, 132, rows(block_n=32))


@pytest.mark.parametrize(("packing", "split"), [("fp8", 1), ("fp8", 3), ("mxfp4", 2)])
def test_rows_added_for_each_token(packing: str, split: int) -> None:
    check_down(packing, 3, 3, 5, True, torch.float32, "skip", 20, 300, rows(split=split, block_n=16))


@pytest.mark.parametrize("packing", ["fp8", "mxfp4"])
def test_rows_of_whole_blocks(packing: str) -> None:
    for tokens in (0, 2):
        check_up(packing, tokens, 2, 4, "concat", False, torch.float16, "hot", 128, 64, rows(block_n=64, block_k=128))
        check_down(packing, tokens, 2, 4, False, torch.float16, "even", 32, 256, rows(block_k=128, split=2, block_n=32))


def swap(**sizes: int) -> tuple[dict[str, Any], ...]:
    return ({"kernel": "swap", "up_to": None, "block_m": 16, "block_n": 32, "block_k": 128, **sizes},)


@pytest.mark.parametrize("packing", ["fp8", "mxfp4"])
@pytest.mark.parametrize("layout", ["concat", "interleaved", "single"])
def test_swap_of_every_layout(packing: str, layout: str) -> None:
    """A last block that is not whole, both ways; of concat, tiles of the second part lie in two blocks of scales."""
    check_up(packing, 6, 2, 3, layout, True, torch.float32, "skip", 160, 136, swap(block_n=64))
    if layout == "single":
        check_down(packing, 6, 2, 3, True, torch.float32, "skip", 136, 208, swap())


@pytest.mark.parametrize("packing", ["fp8", "mxfp4"])
@pytest.mark.parametrize("dtype", [torch.float16, *COMPILED])
def test_swap_of_whole_blocks(packing: str, dtype: torch.dtype) -> None:
    """Columns of a tile that share their scales, and a single block of K."""
    for tokens, kind in ((0, "even"), (33, "hot")):
        check_up(packing, tokens, 2, 4, "concat", False, dtype, kind, 128, 128, swap(block_m=32, block_n=128))
        check_down(packing, tokens, 2, 4, False, dtype, kind, 128, 256, swap(block_n=128))


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    st.sampled_from(["fp8", "mxfp4"]), st.integers(1, 40), st.integers(1, 4), st.integers(0, 3),
    st.sampled_from(["even", "hot", "skip"]), st.integers(1, 18), st.integers(1, 9), st.sampled_from([16, 32]),
)  # fmt: skip
def test_swap_of_any_size(
    packing: str, tokens: int, k: int, more: int, kind: str, inner: int, columns: int, rows: int
) -> None:
    """As many choices as experts included, experts without rows, one with all, skipped pairs."""
    variants = swap(block_m=rows)
    check_up(packing, tokens, k, k + more, "concat", False, torch.float32, kind, 16 * inner, 8 * columns, variants)
    check_down(packing, tokens, k, k + more, False, torch.float32, kind, 8 * columns, 16 * inner, variants)


@pytest.mark.parametrize("packing", ["fp8", "mxfp4"])
def test_a_row_is_the_same_in_any_batch(packing: str) -> None:
    """Bit by bit, wherever in a tile it comes to lie."""
    torch.manual_seed(0)
    up = kernel(packed(build.gather_gemm(silu, 256, 64, 3, 1, torch.float32, variants=swap()), packing))
    x, (made, scales, _) = torch.randn(20, 256), quantised(torch.randn(3, 128, 256) * 0.2, packing)
    ids = loads(20, 1, 3, "even")
    order, offsets = group_reference(ids, 3)
    (many,) = up([x, order, offsets, made, None, None, scales])
    for token in (0, 17):
        alone = group_reference(ids[token : token + 1], 3)
        (one,) = up([x[token : token + 1], *alone, made, None, None, scales])
        assert torch.equal(one[0], many[(order == token).nonzero()[0, 0]])
