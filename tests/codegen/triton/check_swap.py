"""Families whose weights come by the copy engine, in Triton's interpreter: against references and against `tiles`."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.dialects.moe import group_reference
from tests.codegen.triton import build
from tests.codegen.triton.check_experts import check_down, check_up, clamped, loads, silu
from tests.codegen.triton.interpret import kernel

FAMILIES = ("swap", "tma")


def by(family: str, **sizes: int) -> tuple[dict[str, Any], ...]:
    return ({"kernel": family, "up_to": None, "block_m": 16, "block_n": 32, "block_k": 32, **sizes},)


@pytest.mark.parametrize("layout", ["concat", "interleaved", "single"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_layouts(family: str, layout: str, transposed: bool) -> None:
    """Biased, with experts without rows, skipped pairs and a last block of columns that is not whole."""
    check_up(7, 2, 5, layout, True, transposed, torch.float32, "skip", 48, 40, by(family))
    if layout == "single":
        check_down(7, 2, 5, True, transposed, torch.float32, "skip", 40, 48, by(family))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.sampled_from(FAMILIES), st.integers(0, 40), st.integers(1, 4), st.integers(0, 3), st.integers(1, 5),
    st.integers(1, 12), st.sampled_from(["even", "hot", "skip"]), st.booleans(), st.sampled_from([16, 32]),
)  # fmt: skip
def test_any_size(
    family: str, tokens: int, k: int, more: int, inner: int, columns: int, kind: str, transposed: bool, rows: int
) -> None:
    """As many choices as experts included; sums of any multiple of 16, rows of any multiple of 16 bytes."""
    variants = by(family, block_m=rows)
    check_up(tokens, k, k + more, "concat", False, transposed, torch.float16, kind, 16 * inner, 8 * columns, variants)
    check_down(tokens, k, k + more, False, transposed, torch.float16, kind, 8 * columns, 16 * inner, variants)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_as_tiles(family: str) -> None:
    """Variants of a kernel differ by rounding only, whichever takes over from how many tokens on."""
    torch.manual_seed(0)
    variants = ({**by("tiles")[0], "up_to": 12}, *by(family))
    up = kernel(build.gather_gemm(clamped, 64, 48, 4, 2, torch.float32, "interleaved", True, variants=variants))
    down = kernel(build.gemm_combine(64, 48, 4, 2, torch.float32, True, variants=variants))
    x, w1, b1 = torch.randn(13, 64), torch.randn(4, 96, 64) * 0.2, torch.randn(4, 96)
    w2, b2, weights = torch.randn(4, 64, 48) * 0.2, torch.randn(4, 64), torch.rand(13, 2)
    results = list[torch.Tensor]()
    for tokens in (12, 13):
        order, offsets = group_reference(torch.tensor([[0, 3], [3, 1]])[torch.arange(tokens) % 2], 4)
        (h,) = up([x[:tokens], order, offsets, w1, b1])
        (y,) = down([h, order, offsets, weights[:tokens], w2, b2])
        results.append(y[:12])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_the_same_in_any_batch(family: str) -> None:
    """Bit by bit, wherever in a tile it comes to lie."""
    torch.manual_seed(0)
    up = kernel(build.gather_gemm(silu, 96, 64, 3, 1, torch.float32, variants=by(family)))
    x, bank = torch.randn(40, 96), torch.randn(3, 128, 96)
    ids = loads(40, 1, 3, "even")
    order, offsets = group_reference(ids, 3)
    (many,) = up([x, order, offsets, bank])
    for token in (0, 17, 39):
        (one,) = up([x[token : token + 1], *group_reference(ids[token : token + 1], 3), bank])
        assert torch.equal(one[0], many[(order == token).nonzero()[0, 0]])


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs a GPU: NumPy's sums depend on how many rows a tile has"
)
@pytest.mark.parametrize(("family", "rows"), [("swap", (16, 32, 64)), ("tma", (64, 128))])
def test_a_row_is_the_same_by_tiles_of_any_rows(family: str, rows: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tokens = (1, 30, 70)[: len(rows)]
    variants = tuple(
        {**by(family, block_m=m, block_n=64, block_k=64)[0], "up_to": None if m == rows[-1] else end}
        for m, end in zip(rows, tokens, strict=True)
    )
    up = kernel(build.gather_gemm(silu, 512, 256, 3, 1, torch.bfloat16, variants=variants))
    down = kernel(build.gemm_combine(512, 256, 3, 1, torch.bfloat16, variants=variants))
    x, w1, w2 = (0.2 * torch.randn(*shape).bfloat16() for shape in ((70, 512), (3, 512, 512), (3, 512, 256)))
    ids, weights, results = loads(70, 1, 3, "even"), torch.rand(70, 1), list[torch.Tensor]()
    for count in tokens:
        order, offsets = group_reference(ids[:count], 3)
        (h,) = up([x[:count], order, offsets, w1])
        results.append(down([h, order, offsets, weights[:count], w2])[0][0])
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_choice_writes_the_result_itself(family: str) -> None:
    check_down(9, 1, 4, True, False, torch.float16, "skip", 64, 32, by(family))
