"""`sparsec::bank` against autograd in f64: on a CPU by PyTorch's operators, on a GPU by the kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparsec.differentiable import WITH_GRADIENT
from tests.codegen.triton.gradients import Bank, expected

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU")])]  # fmt: skip
BANKS = {
    "concat": Bank(6, 3, 64, 48),
    "interleaved": Bank(6, 2, 64, 48, "interleaved", True, True, True),
    "single": Bank(5, 1, 48, 80, "single", True),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def ids_of(bank: Bank, tokens: int) -> torch.Tensor:
    """Random ones, of which some are skipped; the last expert has no rows."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(-1, bank.experts - 1, (tokens, bank.k), generator=generator)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", BANKS)
def test_result_and_gradients(name: str, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    base = BANKS[name]
    bank = replace(base, dtype=dtype)
    for tokens in (1, 9) if device == "cpu" else (1, 9, 130, 700):
        ids = ids_of(bank, tokens)
        operands = bank.operands(ids)
        y_grad = torch.randn(tokens, bank.hidden).to(dtype)
        wanted = expected(bank, ids, operands, y_grad)
        given = {n: None if v is None else v.to(device).requires_grad_() for n, v in operands.items()}
        x, weights, *banks = given.values()
        y, *_ = torch.ops.sparsec.bank(x, ids.to(device), weights, *banks, **bank.options)
        leaves = [value for value in given.values() if value is not None]
        grads = torch.autograd.grad(y, leaves, y_grad.to(device))
        names = [n for n in WITH_GRADIENT if given[n] is not None]
        for n, got in {"y": y.detach(), **dict(zip(names, grads, strict=True))}.items():
            scale = wanted[n].abs().max().clamp_min(1e-3)
            assert (got.cpu().double() - wanted[n]).abs().max() <= TOLERANCE[dtype] * scale, (n, tokens)


@pytest.mark.parametrize("device", DEVICES)
def test_as_an_operator_of_torch(device: str) -> None:
    """Schema, shapes without values, gradients under AOT autograd."""
    bank = BANKS["interleaved"]
    ids = ids_of(bank, 7).clamp_min(0)
    x, weights, *banks = (v.to(device).requires_grad_() for v in bank.operands(ids).values() if v is not None)
    args = (x, ids.to(device), weights, *banks)
    torch.library.opcheck(torch.ops.sparsec.bank.default, args, bank.options)
