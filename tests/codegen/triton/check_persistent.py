"""The family `persistent` in Triton's interpreter, against the op's own reference, with three multiprocessors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsec.dialects import builtin
from sparsec.dialects.moe import GemmCombine, gemm_combine_reference, group_reference
from sparsec.dialects.moe.references import tiles_reference
from sparsec.ir.core import Func
from sparsec.ir.types import Sym
from tests.codegen.triton import build
from tests.codegen.triton.check_experts import close, loads
from tests.codegen.triton.interpret import kernel

NARROW: dict[str, Any] = {"kernel": "persistent", "block_m": 16, "block_n": 32, "block_k": 32, "num_warps": 4}
DIVIDED: dict[str, Any] = {**NARROW, "block_m": 128, "block_n": 128, "block_k": 64, "num_stages": 4}
WIDE: dict[str, Any] = {**NARROW, "block_n": 256, "num_warps": 8}


def normed(row: torch.Tensor) -> torch.Tensor:
    return row * torch.rsqrt((row.float() ** 2).mean(-1, keepdim=True) + 0.1).to(row.dtype)


def finished(func: Func, tail: Callable[[torch.Tensor], torch.Tensor], hidden: int) -> Func:
    """The same with a tail."""
    func.body.ops.pop()
    old = func.body.ops.pop()
    body = build.region(tail, torch.randn(3, hidden, dtype=torch.float16), rows=[True], symbol=Sym("r"))
    op = GemmCombine([*old.arguments[:8]], None, dict(old.attrs), [body])
    func.body.append(op)
    func.body.append(builtin.Return(list(op.results)))
    return func


def check(
    tokens: int, k: int, experts: int, kind: str, bias: bool = False, transposed: bool = False, hidden: int = 40,
    width: int = 48, variant: dict[str, Any] = NARROW, tail: bool = False,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    dtype = torch.float16
    func = build.gemm_combine(hidden, width, experts, k, dtype, bias, transposed, (variant,), listed=True)
    func = finished(func, normed, hidden) if tail else func
    ids = loads(tokens, k, experts, kind)
    order, offsets = group_reference(ids, experts)
    h = torch.randn(tokens * k, width, dtype=dtype)
    h[int(offsets[-1]) :] = float("nan")  # rows of skipped pairs are not defined
    weights = torch.rand(tokens, k)
    down = torch.randn((experts, width, hidden) if transposed else (experts, hidden, width), dtype=dtype) / width**0.5
    down_bias = torch.randn(experts, hidden, dtype=dtype) if bias else None
    tiles = tiles_reference(offsets, tokens * k)
    (y,) = kernel(func)([h, order, offsets, weights, down, down_bias, None, tiles])
    h[int(offsets[-1]) :] = 0
    close(
        y,
        gemm_combine_reference(
            h, order, offsets, weights, down, down_bias, transposed, dtype, True, normed if tail else None
        ),
    )


@pytest.mark.parametrize("tokens", [0, 1, 3, 40])
@pytest.mark.parametrize("kind", ["even", "hot", "skip"])
def test_token_counts(tokens: int, kind: str) -> None:
    check(tokens, 2, 5, kind)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layouts(bias: bool, transposed: bool) -> None:
    check(11, 2, 3, "skip", bias, transposed)


@pytest.mark.parametrize("hidden", [256, 296, 520])
def test_wide_tiles(hidden: int) -> None:
    check(9, 2, 3, "skip", bias=True, hidden=hidden, variant=WIDE)


@pytest.mark.parametrize("columns", [128, 256])
@pytest.mark.parametrize("kind", ["even", "skip"])
def test_divided_work(kind: str, columns: int) -> None:
    """Tiles as large as a GPU's: several steps over I, several tiles to a program."""
    check(500, 2, 3, kind, bias=True, hidden=328, width=192, variant={**DIVIDED, "block_n": columns})


def test_one_choice_writes_the_result_itself() -> None:
    check(30, 1, 2, "skip")


def test_a_tail_sees_whole_rows() -> None:
    check(13, 2, 3, "skip", bias=True, tail=True)


def test_every_choice() -> None:
    check(6, 4, 4, "even")


def test_steps_divide_the_inner_dimension() -> None:
    check(5, 2, 3, "even", width=80, variant={**NARROW, "block_k": 128})
