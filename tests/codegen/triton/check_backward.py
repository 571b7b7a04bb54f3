"""Forward and backward programs of a bank in Triton's interpreter, against autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.differentiable import WITH_GRADIENT, Program, backward, forward, runner
from sparsec.ir.core import Module
from tests.codegen.triton.check_experts import loads
from tests.codegen.triton.gradients import TINY, Bank, expected, with_variants
from tests.codegen.triton.interpret import kernel

TARGET = "cuda:sm_90"
WIDE = {"block_m": 32, "block_n": 32, "block_k": 16}
ENGINE = {"kernel": "tma", "block_m": 16, "block_n": 32, "block_k": 16, "num_warps": 1}
"""A step of columns through the region is narrower than the tile."""


def program(module: Module, *variants: dict[str, Any]) -> Program:
    """A lowered module as a function, by interpreted kernels."""
    module = with_variants(module, *variants)
    kernels = {name: kernel(func) for name, func in module.funcs.items() if name != "main"}
    return runner(module.main, kernels)


def check(bank: Bank, ids: torch.Tensor, *variants: dict[str, Any]) -> None:
    operands = bank.operands(ids)
    x, weights, *banks = operands.values()
    assert x is not None
    y_grad = torch.randn_like(x)
    wanted = expected(bank, ids, operands, y_grad)
    kinds = bank.kinds()
    y, *sort = program(forward(kinds[0], TARGET), *variants)([x, ids, weights, *banks])
    needed = [tensor is not None for tensor in operands.values()]
    run = program(backward(kinds[1], needed, TARGET), *variants)
    grads = run([y_grad, x, weights, *sort, *banks])
    names = [name for name, needs in zip(WITH_GRADIENT, needed, strict=True) if needs]
    tolerance = 1e-5 if bank.dtype is torch.float32 else 4e-3
    for name, got in {"y": y, **dict(zip(names, grads, strict=True))}.items():
        assert got.dtype is (torch.float32 if name == "weights" else bank.dtype)
        scale = float(wanted[name].abs().max()) if wanted[name].numel() else 1.0
        torch.testing.assert_close(got.double(), wanted[name], rtol=tolerance, atol=tolerance * (scale + 1), msg=name)
        empty = torch.bincount(ids[(ids >= 0) & (ids < bank.experts)].flatten(), minlength=bank.experts) == 0
        if name in ("up", "down", "up_bias", "down_bias"):
            assert not got[empty].any(), f"{name}: an expert without rows has a gradient"


@pytest.mark.parametrize("layout", ["concat", "interleaved", "single"])
@pytest.mark.parametrize("transposed", [False, True])
def test_layouts(layout: str, transposed: bool) -> None:
    torch.manual_seed(0)
    bank = Bank(5, 2, layout=layout, bias=transposed, up_transposed=transposed, down_transposed=transposed)
    check(bank, loads(9, 2, 5, "skip"))
    if transposed:
        check(replace(bank, down_transposed=False, hidden=24, width=20), loads(7, 2, 5, "skip"), WIDE)


@settings(max_examples=6, deadline=None)
@given(
    tokens=st.sampled_from([1, 2, 16, 17, 33]), experts=st.integers(1, 9), kind=st.sampled_from(["hot", "skip", "all"]),
    data=st.data(), layout=st.sampled_from(["concat", "interleaved"]), bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]), size=st.sampled_from([(40, 24), (33, 17), (16, 64)]),
)  # fmt: skip
def test_any_load(
    tokens: int, experts: int, kind: str, data: st.DataObject, layout: str, bias: bool, dtype: torch.dtype,
    size: tuple[int, int],
) -> None:  # fmt: skip
    """Empty experts, one hot expert, skipped pairs, k = 1 and k = E, sizes that no block divides."""
    k = data.draw(st.sampled_from(sorted({1, min(2, experts), experts})))
    torch.manual_seed(0)
    check(Bank(experts, k, *size, layout, bias, dtype=dtype), loads(tokens, k, experts, kind))


def test_no_tokens() -> None:
    """Gradients of the banks are zeros, not what was in memory."""
    check(Bank(3, 2, bias=True), loads(0, 2, 3, "all"))


@pytest.mark.parametrize(
    ("layout", "transposed"),
    [("concat", False), ("concat", True), ("interleaved", False), ("interleaved", True), ("single", True)],
)
def test_by_the_copy_engine(layout: str, transposed: bool) -> None:
    """Experts without rows, skipped pairs, whole blocks of rows and what is left over, a last block of columns that is
    not whole (of 16, which are left out as a whole, and of 8)."""
    torch.manual_seed(0)
    bank = Bank(3, 1, 32, 40, layout, transposed, transposed, transposed, dtype=torch.float16)
    ids = torch.tensor([0] * 37 + [-1] + [2] * 3)[torch.randperm(41)]
    check(bank, ids.view(-1, 1), ENGINE)
    check(replace(bank, k=2, width=48, bias=False, down_transposed=not transposed), loads(3, 2, 3, "hot"), ENGINE)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    tokens=st.sampled_from([1, 16, 17, 48]), experts=st.integers(1, 5), kind=st.sampled_from(["hot", "skip", "all"]),
    layout=st.sampled_from(["concat", "interleaved"]), bias=st.booleans(), inner=st.integers(1, 3),
    width=st.integers(2, 9),
)  # fmt: skip
def test_any_load_by_the_copy_engine(
    tokens: int, experts: int, kind: str, layout: str, bias: bool, inner: int, width: int
) -> None:
    torch.manual_seed(0)
    bank = Bank(experts, min(2, experts), 16 * inner, 8 * width, layout, bias, dtype=torch.float16)
    check(bank, loads(tokens, bank.k, experts, kind), ENGINE)


@pytest.mark.parametrize("family", [TINY, ENGINE], ids=["tiles", "tma"])
def test_what_one_expert_has_reaches_no_other(family: dict[str, Any]) -> None:
    """Rows that are not numbers spoil their own expert's gradients and their own tokens', and nothing else: what lies
    behind an expert's rows is not multiplied, not even by zero."""
    torch.manual_seed(0)
    bank = Bank(4, 1, 32, 32, dtype=torch.float16)
    ids = torch.tensor([0, 1, 3] * 7 + [1]).view(-1, 1)  # the last block of rows of each is not whole
    operands = bank.operands(ids)
    x, weights, *banks = operands.values()
    assert x is not None
    clean = program(backward(bank.kinds()[1], [True] * 4 + [False] * 2, TARGET), family)
    sort = program(forward(bank.kinds()[0], TARGET), TINY)([x, ids, weights, *banks])[1:]
    y_grad = torch.randn_like(x)
    before = clean([y_grad, x, weights, *sort, *banks])
    spoilt = (ids == 1)[:, 0]
    for value in (torch.nan, torch.inf):
        bad_x, bad_grad = (torch.where(spoilt[:, None], value, rows) for rows in (x, y_grad))
        after = clean([bad_grad, bad_x, weights, *sort, *banks])
        for name, was, now in zip(("x", "weights", "up", "down"), before, after, strict=True):
            mine = torch.arange(4) == 1 if name in ("up", "down") else spoilt
            assert torch.equal(was[~mine], now[~mine]) and not torch.isfinite(now[mine]).all(), name
