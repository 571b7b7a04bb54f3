"""Forward and backward programs of a bank in Triton's interpreter, against autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.differentiable import WITH_GRADIENT, Program, backward, forward, runner
from sparsec.ir.core import Module
from tests.codegen.triton.check_experts import loads
from tests.codegen.triton.gradients import Bank, expected, with_variants
from tests.codegen.triton.interpret import kernel

TARGET = "cuda:sm_90"
WIDE = {"block_m": 32, "block_n": 32, "block_k": 16}


def program(module: Module, *variants: dict[str, int]) -> Program:
    """A lowered module as a function, by interpreted kernels."""
    module = with_variants(module, *variants)
    kernels = {name: kernel(func) for name, func in module.funcs.items() if name != "main"}
    return runner(module.main, kernels)


def check(bank: Bank, ids: torch.Tensor, *variants: dict[str, int]) -> None:
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
