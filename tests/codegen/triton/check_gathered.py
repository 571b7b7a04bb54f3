"""The family `gathered` in Triton's interpreter, against the op's own reference, with three multiprocessors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.dialects.moe import gather_gemm_reference, group_reference
from sparsec.dialects.moe.references import tiles_reference
from tests.codegen.triton import build
from tests.codegen.triton.check_experts import TorchEnv, clamped, close, loads, silu, squared
from tests.codegen.triton.interpret import kernel

NARROW: dict[str, Any] = {"kernel": "gathered", "block_m": 16, "block_n": 32, "block_k": 32, "num_warps": 8}
DIVIDED: dict[str, Any] = {**NARROW, "block_m": 128, "block_n": 64, "block_k": 64, "num_warps": 4}
ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {"single": squared, "interleaved": clamped, "concat": silu}


def check(
    tokens: int, k: int, experts: int, kind: str, layout: str = "concat", bias: bool = False, transposed: bool = False,
    hidden: int = 48, width: int = 40, variant: dict[str, Any] = NARROW,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    dtype, activation = torch.float16, ACTIVATIONS[layout]
    func = build.gather_gemm(activation, hidden, width, experts, k, dtype, layout, bias, transposed, (variant,), True)
    columns = width if layout == "single" else 2 * width
    x = torch.randn(tokens, hidden, dtype=dtype)
    up = torch.randn((experts, hidden, columns) if transposed else (experts, columns, hidden), dtype=dtype) * 0.2
    up_bias = torch.randn(experts, columns, dtype=dtype) if bias else None
    order, offsets = group_reference(loads(tokens, k, experts, kind), experts)
    tiles = tiles_reference(offsets, tokens * k)
    (h,) = kernel(func)([x, order, offsets, up, up_bias, None, None, tiles])
    env: Any = TorchEnv(activation)
    body: Any = func.body.ops[0].regions[0]
    wide = [None if t is None else t.float() for t in (x, up, up_bias)]
    wanted = gather_gemm_reference(env, body, layout, wide[0], order, offsets, wide[1], wide[2], transposed, k)  # type: ignore[arg-type]
    used = int(offsets[-1])
    close(h[:used], wanted[:used].to(dtype))


@pytest.mark.parametrize("layout", ACTIVATIONS)
@pytest.mark.parametrize("transposed", [False, True])
def test_layouts(layout: str, transposed: bool) -> None:
    check(11, 2, 3, "skip", layout, True, transposed)


@pytest.mark.parametrize("kind", ["even", "hot"])
def test_divided_work(kind: str) -> None:
    check(150, 2, 3, kind, hidden=64, width=128, variant=DIVIDED)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    st.integers(0, 60), st.integers(1, 4), st.integers(0, 3), st.integers(1, 5), st.integers(1, 12),
    st.sampled_from(["even", "hot", "skip"]),
)  # fmt: skip
def test_any_size(tokens: int, k: int, more: int, inner: int, columns: int, kind: str) -> None:
    check(tokens, k, k + more, kind, hidden=16 * inner, width=8 * columns)


def test_rows_wider_than_a_program_copies() -> None:
    check(9, 2, 3, "even", "single", hidden=1200, width=16)
