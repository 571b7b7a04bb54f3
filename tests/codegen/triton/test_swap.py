"""Families whose weights come by the copy engine, compiled for Hopper: instructions, registers, shared memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsec.codegen.triton.compile import TARGETS
from sparsec.codegen.triton.emit import TritonKernel, emit_kernel, sketch_kernel
from sparsec.diagnostics import CompileError
from sparsec.ir.core import Func
from tests.codegen.triton import build
from tests.codegen.triton.check_experts import clamped, silu, squared

pytest.importorskip("triton")

MODELS = {  # experts, k, hidden, width, layout of the first bank, whether banks are transposed, biased
    "mixtral-8x7b": (8, 2, 4096, 14336, "concat", False, False),
    "qwen3-30b-a3b": (128, 8, 2048, 768, "concat", False, False),
    "olmoe": (64, 8, 2048, 1024, "concat", False, False),
    "gpt-oss-20b": (32, 4, 2880, 2880, "interleaved", True, True),
    "deepseek-v3": (256, 8, 7168, 2048, "concat", False, False),
    "alternating": (16, 2, 1024, 512, "interleaved", False, False),
    "single": (16, 2, 1024, 512, "single", False, False),
}
ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {"single": squared, "interleaved": clamped, "concat": silu}
FEW = [(16, 64, 128, 4, 4), (32, 64, 64, 4, 4), (64, 128, 64, 8, 4)]
MANY = [(64, 64, 64, 4, 4), (128, 128, 64, 8, 4)]


def by(family: str, tiles: list[tuple[int, int, int, int, int]]) -> tuple[dict[str, Any], ...]:
    """Variants of a family: (rows, columns, depth, warps, stages), each for one token more than the one before."""
    names = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
    ends: list[int | None] = [*range(1, len(tiles)), None]
    return tuple(
        {"kernel": family, "up_to": end, **dict(zip(names, t, strict=True))} for t, end in zip(tiles, ends, strict=True)
    )


def layer(model: str, variants: tuple[dict[str, Any], ...]) -> tuple[Func, Func]:
    experts, k, hidden, width, layout, transposed, bias = MODELS[model]
    up = build.gather_gemm(
        ACTIVATIONS[layout], hidden, width, experts, k, torch.bfloat16, layout, bias, transposed, variants
    )
    return up, build.gemm_combine(hidden, width, experts, k, torch.bfloat16, bias, transposed, variants)


def gemms(kernel: TritonKernel) -> list[tuple[dict[str, Any], Any]]:
    """The GEMM's launch of each variant, and its binary."""
    launches = [variant.config["launches"][0] for variant in kernel.variants]
    return [(launch, kernel.binaries[launch["file"]]) for launch in launches]


def check(func: Func, target: str) -> None:
    """Hopper's matrix instruction on the side of the tokens that the tile says, and weights by the copy engine."""
    swapped = func.attrs["variants"][0]["kernel"] == "swap"  # type: ignore[index,call-overload]
    gated = getattr(func.body.ops[0], "layout", "single") != "single"  # both kinds of columns by one instruction
    for launch, binary in gemms(emit_kernel(func, target)):
        sizes = launch["constants"]
        assert binary.spills == 0, launch
        assert binary.shared <= TARGETS[target].shared_limit
        assert "cp.async.bulk.tensor" in binary.assembly
        assert "mma.sync" not in binary.assembly
        assert any("map" in argument for argument in launch["args"])
        if target == "cuda:sm_90":
            found = set(map(int, re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16", binary.assembly)))
            assert found == {sizes["BLOCK_M"] if swapped else sizes["BLOCK_N"] * (2 if gated else 1)}


def test_few_rows_run_on_hoppers_matrix_instruction() -> None:
    for func in layer("gpt-oss-20b", by("swap", FEW)):
        check(func, "cuda:sm_90")


def test_many_rows_with_weights_by_the_copy_engine() -> None:
    for func in layer("qwen3-30b-a3b", by("tma", MANY)):
        check(func, "cuda:sm_90")


@pytest.mark.parametrize("target", ["cuda:sm_90", "cuda:sm_100"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.slow
def test_every_model_compiles(model: str, target: str) -> None:
    for variants in (by("swap", FEW), by("tma", MANY)):
        for func in layer(model, variants):
            check(func, target)


def test_tiles_are_cut_to_what_the_family_takes() -> None:
    """Steps that divide the inner dimension, 64 columns at least, and no more warps than rows of the first operand."""
    func = build.gather_gemm(silu, 2880, 32, 4, 2, torch.bfloat16, variants=by("swap", [(16, 16, 128, 8, 3)]))
    (entry,) = sketch_kernel(func).schedules[0].entries
    assert {name: entry.constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")} == {
        "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64,
    }  # fmt: skip
    assert entry.num_warps == 4
    assert 2880 % entry.constants["BLOCK_K"] == 0


@pytest.mark.parametrize("family", ["swap", "tma"])
def test_rows_that_the_engine_does_not_take_are_refused(family: str) -> None:
    variants = by(family, FEW)
    with pytest.raises(CompileError, match="40 terms to a sum: the copy engine takes"):
        sketch_kernel(build.gather_gemm(silu, 40, 48, 4, 2, torch.bfloat16, variants=variants))
    with pytest.raises(CompileError, match="rows of 40 bytes"):
        sketch_kernel(build.gemm_combine(20, 48, 4, 2, torch.bfloat16, transposed=True, variants=variants))


def test_chips_without_the_engine_are_named() -> None:
    func = build.gemm_combine(64, 64, 4, 2, torch.bfloat16, variants=by("swap", FEW))
    with pytest.raises(CompileError, match="cuda:sm_80"):
        emit_kernel(func, "cuda:sm_80")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("family", ["swap", "tiles"])
def test_the_second_gemm_asks_for_weights_before_it_waits(family: str, transposed: bool) -> None:
    """So that they are on their way while the first one's last programs still run."""
    variants = by(family, [(16, 64, 64, 4, 3)])
    kernel = emit_kernel(
        build.gemm_combine(128, 192, 4, 2, torch.bfloat16, transposed=transposed, variants=variants), "cuda:sm_90"
    )
    ((_, binary),) = gemms(kernel)
    asked = binary.assembly.index("prefetch.global.L2")
    assert asked < binary.assembly.index("griddepcontrol.wait") < binary.assembly.index("mma")
