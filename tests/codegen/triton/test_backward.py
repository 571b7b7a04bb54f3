"""Backward kernels without a GPU: they fit every target, spill nothing, use the instructions they are for, and move and
multiply what the cost model counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("triton")
from sparsec.codegen.triton.compile import TARGETS, Binary
from sparsec.codegen.triton.emit import emit_kernel
from sparsec.diagnostics import CompileError
from sparsec.dialects.moe import BankGrad, HiddenGrad
from sparsec.differentiable import backward
from sparsec.ir.core import Func
from sparsec.passes.chips import CHIPS
from sparsec.passes.gradient_variants import gradient_candidates
from sparsec.passes.gradients import Bank as BankShape
from sparsec.passes.gradients import done, foresee, gradient_of
from sparsec.passes.variants import Variant
from tests.codegen.triton.gradients import Bank
from tests.codegen.triton.hopper import serialised, under_way
from tests.codegen.triton.ttir import account

BF16 = torch.bfloat16
BANKS = {
    "olmoe": Bank(64, 8, 2048, 1024, dtype=BF16),
    "gpt_oss": Bank(32, 4, 2880, 2880, "interleaved", True, True, True, dtype=BF16),
    "single": Bank(8, 2, 256, 320, "single", True, dtype=torch.float16),
    "f32": Bank(16, 2, 512, 384, bias=True),
}
MORE = {
    "interleaved": replace(BANKS["gpt_oss"], up_transposed=False, down_transposed=False),
    "transposed": replace(BANKS["gpt_oss"], layout="concat"),
    "uneven": Bank(8, 2, 328, 200, bias=True, dtype=BF16),
}
GRADIENTS = ("moe.hidden_grad", "moe.bank_grad", "moe.bias_grad")


def kernels(bank: Bank, target: str) -> list[Func]:
    """The kernels of a bank's backward program, but for that of x's gradient, which is a moe.gemm_combine."""
    module = backward(bank.kinds()[1], [True] * 4 + [bank.bias] * 2, target)
    found = [func for name, func in module.funcs.items() if name != "main"]
    assert {func.body.ops[0].name for func in found} == {*GRADIENTS[: 3 if bank.bias else 2], "moe.gemm_combine"}
    return [func for func in found if func.body.ops[0].name in GRADIENTS]


def compiled(func: Func, variant: Variant, target: str) -> Binary:
    """The first launch by one variant."""
    func.body.ops[0].attrs["variants"] = (asdict(variant),)
    kernel = emit_kernel(func, target)
    return kernel.binaries[kernel.variants[0].config["launches"][0]["file"]]


def check(bank: Bank, target: str) -> set[str]:
    """Compile what the schedule chooses. Returns: the families that it chose."""
    families = set[str]()
    for func in kernels(bank, target):
        kernel = emit_kernel(func, target)
        families |= {variant.config["choice"].get("kernel", "tiles") for variant in kernel.variants}
        for binary in kernel.binaries.values():
            check_fits(binary, target, "rows" in binary.symbol or "bank" in binary.symbol, bank.dtype)
    return families


def check_fits(binary: Binary, target: str, gemm: bool, dtype: torch.dtype) -> None:
    assert binary.spills == 0, binary.symbol
    assert binary.shared <= TARGETS[target].shared_limit
    if target == "cuda:sm_90" and gemm and dtype is not torch.float32:
        assert "wgmma.mma_async" in binary.assembly, binary.symbol
        assert not serialised(binary)


@pytest.mark.slow
@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("name", BANKS)
def test_compiled(name: str, target: str) -> None:
    families = check(BANKS[name], target)
    narrow = TARGETS[target].hopper and BANKS[name].dtype is not torch.float32
    assert families == ({"tiles", "tma"} if narrow else {"tiles"})


def each(bank: Bank, target: str, banks: bool) -> Iterator[tuple[Func, HiddenGrad | BankGrad, Variant]]:
    """Every tile that is tried of a bank's backward kernels, with as many stages as fit; `banks`: of banks' gradients,
    which know of no region, too."""
    for func in kernels(bank, target):
        op = func.body.ops[0]
        if isinstance(op, HiddenGrad) or (isinstance(op, BankGrad) and banks):
            grad, on, tiles = gradient_of(op), CHIPS[target], dict[Variant, Variant]()
            for variant in gradient_candidates(grad, on):
                if foresee(grad, variant, 4096, on) is not None:
                    tiles[replace(variant, num_stages=1)] = variant
            for variant in tiles.values():
                yield func, op, variant


@pytest.mark.slow
@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("name", [*BANKS, *MORE])
def test_every_tile_that_is_tried_is_what_the_model_takes_it_for(name: str, target: str) -> None:
    """No spills on any target; on Hopper, of which the constants are, as many programs at a time as counted."""
    bank, on = (BANKS | MORE)[name], CHIPS[target]
    for func, op, variant in each(bank, target, name in ("olmoe", "uneven", "f32")):
        where = f"{op.name} by {variant} on {target}"
        binary, made = compiled(func, variant, target), foresee(gradient_of(op), variant, 4096, on)
        assert binary.spills == 0 and binary.shared <= TARGETS[target].shared_limit, where
        assert made is not None and binary.registers is not None
        if on.wide == 64 and bank.dtype is not torch.float32:
            assert binary.num_stages == variant.num_stages, where
        if target == "cuda:sm_90" and bank.dtype is not torch.float32:
            fits = min(65536 // (binary.registers * binary.threads), TARGETS[target].shared_limit // binary.shared)
            assert fits >= made.resident, where
            assert "wgmma.mma_async" in binary.assembly and not serialised(binary), where
        assert ("cp.async.bulk.tensor" in binary.assembly) == (variant.kernel == "tma"), where


TRIED = {
    "moe.hidden_grad": [Variant("tiles", 128, 64, 64, 8, 3), Variant("tma", 128, 128, 64, 8, 4)],
    "moe.bank_grad": [Variant("tiles", 128, 256, 64, 8, 4), Variant("tma", 128, 256, 64, 8, 4)],
}


def check_account(bank: Bank, most: int | None = None) -> None:
    """Compare Triton's IR with `gradients.done`, and look at what is under way in the loops.

    `most`: how many kernels.
    """
    for func in kernels(bank, "cuda:sm_90")[:most]:
        op = func.body.ops[0]
        if not isinstance(op, HiddenGrad | BankGrad):
            continue
        grad = gradient_of(op)
        for variant in TRIED[op.name]:
            binary = compiled(func, variant, "cuda:sm_90")
            found, due = account(binary.ttir), done(grad, variant, 1)
            # A bank's rows come block by block in a loop, and by `tma` once more, masked, after it: counted once each.
            times = 2 if isinstance(grad, BankShape) and variant.kernel == "tma" else 1
            loads = sum(found.loads[name] for name in ("x", "y_grad", "up", "down", "sorted", "gathered"))
            assert found.flops == times * due.flops and sum(found.stores.values()) == due.stores
            assert loads == times * due.loads
            engine = {"up", "down"} if isinstance(op, HiddenGrad) else {"sorted"}
            assert found.engine == (engine if variant.kernel == "tma" else set())
            products, copies = under_way(binary)
            assert products >= 1 and copies >= variant.num_stages - 2
            assert binary.spills == 0 and not serialised(binary)


def test_a_program_moves_and_multiplies_what_the_model_counts() -> None:
    check_account(Bank(8, 2, 512, 256, dtype=BF16), 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_oss", "olmoe", "single", "interleaved", "transposed"])
def test_programs_of_other_layers_too(name: str) -> None:
    check_account((BANKS | MORE)[name])


def test_a_family_that_cannot_do_it_says_why() -> None:
    for func in kernels(BANKS["f32"], "cuda:sm_90"):
        for kernel, why in (("tma", "f32 is not multiplied"), ("rows", "there is no family of kernels 'rows'")):
            if func.body.ops[0].name in TRIED:
                func.body.ops[0].attrs["variants"] = ({"kernel": kernel},)
                with pytest.raises(CompileError, match=why):
                    emit_kernel(func, "cuda:sm_90")
    for func in kernels(Bank(4, 2, 36, 24, dtype=BF16), "cuda:sm_90"):
        if func.body.ops[0].name == "moe.hidden_grad":
            func.body.ops[0].attrs["variants"] = ({"kernel": "tma"},)
            with pytest.raises(CompileError, match="multiples of 16 bytes, not 36 of bf16"):
                emit_kernel(func, "cuda:sm_90")
