"""Backward kernels compile for every target: no spilled registers, tensor cores, within shared memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")
from sparsec.codegen.triton.compile import TARGETS, Binary
from sparsec.codegen.triton.emit import emit_kernel
from sparsec.differentiable import backward
from tests.codegen.triton.gradients import Bank

BF16 = torch.bfloat16
BANKS = {
    "olmoe": Bank(64, 8, 2048, 1024, dtype=BF16),
    "gpt_oss": Bank(32, 4, 2880, 2880, "interleaved", True, True, True, dtype=BF16),
    "single": Bank(8, 2, 256, 320, "single", True, dtype=torch.float16),
    "f32": Bank(16, 2, 512, 384, bias=True),
}
GRADIENTS = ("moe.hidden_grad", "moe.bank_grad", "moe.bias_grad")


def binaries(bank: Bank, target: str) -> Iterator[Binary]:
    """The compiled launches of a bank's backward program, but for that of x's gradient, which is a moe.gemm_combine."""
    module = backward(bank.kinds()[1], [True] * 4 + [bank.bias] * 2, target)
    kernels = [func for name, func in module.funcs.items() if name != "main"]
    found = {func.body.ops[0].name for func in kernels}
    assert found == {*GRADIENTS[: 3 if bank.bias else 2], "moe.gemm_combine"}
    for func in kernels:
        if func.body.ops[0].name in GRADIENTS:
            yield from emit_kernel(func, target).binaries.values()


def check(name: str, target: str) -> None:
    for binary in binaries(BANKS[name], target):
        assert binary.spills == 0, binary.symbol
        assert binary.shared <= TARGETS[target].shared_limit
        gemm = "rows" in binary.symbol or "bank" in binary.symbol
        if target == "cuda:sm_90" and gemm and BANKS[name].dtype is not torch.float32:
            assert "wgmma.mma_async" in binary.assembly, binary.symbol


def test_compiled_for_hopper() -> None:
    check("olmoe", "cuda:sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "hip:gfx942", "hip:gfx950"])
@pytest.mark.parametrize("name", BANKS)
def test_compiled(name: str, target: str) -> None:
    check(name, target)
