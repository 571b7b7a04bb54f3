"""Products of fp8 by fp8: by the instruction for them, sums scaled by one more, and no spill on any target."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

import pytest
import torch

from sparsec.codegen.triton.compile import TARGETS, Binary, compile_entry, target_of
from sparsec.codegen.triton.emit import emit_kernel, sketch_kernel
from sparsec.diagnostics import CompileError
from sparsec.dialects.moe import GatherGemm, GemmCombine
from sparsec.ir.core import Func
from sparsec.passes.chips import CHIPS
from sparsec.passes.cost import best, by_family, candidates, obstacle
from sparsec.passes.roofline import beside, predict
from sparsec.passes.schedule import gemm_of, gpu_variants
from sparsec.passes.variants import Gemm, Variant
from tests.codegen.triton import build
from tests.codegen.triton.hopper import serialised
from tests.codegen.triton.packed import packed
from tests.passes.published import DEEPSEEK_V3, QWEN3

pytest.importorskip("triton")
TILE: dict[str, Any] = {"kernel": "fp8", "block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 4}
PRODUCTS = {
    "cuda:sm_80": r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32",
    "cuda:sm_90": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.e4m3\.e4m3",
    "cuda:sm_100": r"tcgen05\.mma\.cta_group::1\.kind::f8f6f4",
    "hip:gfx942": r"v_mfma_f32_\d+x\d+x\d+_?f16",
    "hip:gfx950": r"v_mfma_f32_\d+x\d+x\d+_f8f6f4",
}
SLOW = [pytest.param(target, marks=pytest.mark.slow) for target in TARGETS if target != "cuda:sm_90"]


def silu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(a) * b


def funcs(variants: Any, hidden: int = 2048, width: int = 768) -> list[Func]:
    up = build.gather_gemm(silu, hidden, width, 128, 8, torch.bfloat16, variants=variants, listed=True)
    down = build.gemm_combine(hidden, width, 128, 8, torch.bfloat16, variants=variants, listed=True)
    return [packed(func, "fp8", "fp8") for func in (up, down)]


@pytest.mark.parametrize("target", ["cuda:sm_90", *SLOW])
def test_every_target(target: str) -> None:
    """Where there is no such product, f16 makes it. The rows are rounded in front, by few registers."""
    for func in funcs(({**TILE, "up_to": 64, "block_m": 64, "num_warps": 4}, TILE)):
        kernel = emit_kernel(func, target)
        for variant in kernel.variants:
            rounds, gemm, *_ = (kernel.binaries[launch["file"]] for launch in variant.config["launches"])
            assert rounds.symbol.endswith("_narrow") and rounds.spills == 0 and rounds.shared <= 1024
            assert re.search(PRODUCTS[target], gemm.assembly) and gemm.symbol.endswith("_fp8")
            assert gemm.shared <= TARGETS[target].shared_limit
            if target == "cuda:sm_90":
                assert not serialised(gemm) and gemm.spills == 0
                assert "mma.sync" not in gemm.assembly and "cvt.rn.f16x2.e4m3x2" not in gemm.assembly


def test_a_sum_is_scaled_by_one_instruction() -> None:
    """As the cost model counts; both operands come from shared memory as they lie there."""
    for func in funcs((TILE,)):
        kernel = emit_kernel(func, "cuda:sm_90")
        text = next(b for b in kernel.binaries.values() if b.symbol.endswith("_fp8")).ttgir
        loop = text[text.index("scf.for") : text.index("scf.yield")]
        products = loop.count("ttng.warp_group_dot ")
        assert products == (2 if func.name.startswith("gather") else 1)
        assert loop.count("math.fma") == products and "local_load" not in loop and "local_alloc" not in loop
        assert "tensor<128x64xf32" not in "".join(re.findall(r"arith\.mulf.*", loop))


def compiled(func: Func, target: str, launch: int) -> Binary:
    sketch, on = sketch_kernel(func), target_of(target)
    known = {"PDL": int(on.hopper), "PTX": int(on.backend == "cuda"), "E4M3": int(on.e4m3)}
    return compile_entry(sketch.source, sketch.schedules[0].entries[launch].on(**known), on, func.name)


@pytest.mark.slow
@pytest.mark.parametrize("target", [name for name in CHIPS if CHIPS[name].flops.keys() - CHIPS["cuda:sm_80"].flops])
@pytest.mark.parametrize(("hidden", "width"), [(2048, 768), (320, 200)])
def test_every_variant_that_is_tried_fits(target: str, hidden: int, width: int) -> None:
    on, tried = CHIPS[target], 0
    for up in (True, False):
        op = funcs((TILE,), hidden, width)[not up].body.ops[0]
        assert isinstance(op, GatherGemm | GemmCombine)
        gemm = gemm_of(op)
        for variant in candidates(gemm, on):
            if variant.kernel != "fp8" or variant.num_stages != 3 or predict(gemm, variant, 64, on) is None:
                continue
            binary = compiled(funcs((asdict(variant),), hidden, width)[not up], target, 1)
            assert binary.spills == 0 and binary.shared <= variant.shared(gemm, on), variant
            assert binary.num_stages == variant.num_stages, variant
            tried += 1
    assert tried > 12 or (on.lanes == 64 and hidden % 128)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_what_is_chosen_spills_nothing(target: str) -> None:
    """Whichever family it is, with its rounding."""
    for func in funcs((), 7168, 2048):
        op = func.body.ops[0]
        op.attrs["variants"] = gpu_variants(op, CHIPS[target])
        for binary in emit_kernel(func, target).binaries.values():
            assert binary.spills == 0 and binary.shared <= TARGETS[target].shared_limit, binary.symbol


def test_chips_without_the_product_multiply_rounded_rows() -> None:
    """And those with it too, where few rows would leave it idle."""
    for target, on in CHIPS.items():
        for gemm in QWEN3.layer(packing="fp8", activations="fp8"):
            there = {choice.variant.kernel for choice in by_family(gemm, 4096, on)}
            assert "tiles" in there and ("fp8" in there) == (target not in ("cuda:sm_80", "hip:gfx942"))
            assert best(gemm, 4096, on).variant.kernel == "fp8" or "fp8" not in there
    plain, _ = QWEN3.layer(packing="fp8")
    assert "rows stay as they are" in obstacle("fp8", plain, CHIPS["cuda:sm_90"])
    rounded, _ = QWEN3.layer(packing="fp8", activations="fp8")
    assert obstacle("fp8", rounded, CHIPS["cuda:sm_80"]) == "NVIDIA A100 SXM 80 GB does not multiply e4m3"


@pytest.mark.parametrize("half", ["up", "down"])
def test_rounding_costs_a_launch_and_its_bytes(half: str) -> None:
    on, tokens = CHIPS["cuda:sm_90"], 8192
    tile = Variant("tiles", 128, 64, 128, 8, 4)

    def time(activations: str, variant: Variant) -> float:
        gemm: Gemm = DEEPSEEK_V3.layer(packing="fp8", activations=activations)[half == "down"]
        return beside(gemm, variant, tokens, on)

    values = tokens * (7168 if half == "up" else 8 * 2048)
    rounded = time("fp8", tile) - time("model", tile)
    assert rounded == pytest.approx(3e-6 + 4 * values / (0.9 * 3.35e12))
    narrow = Variant("fp8", 128, 64, 128, 8, 4)
    assert time("fp8", tile) - time("fp8", narrow) == pytest.approx((1 - 4 / 128) * values / (0.9 * 3.35e12))


def test_what_is_chosen_is_written_so() -> None:
    """Every variant begins with a rounding, whichever family it is of."""
    for func in funcs((), 512, 256):
        op = func.body.ops[0]
        variants = gpu_variants(op, CHIPS["cuda:sm_90"])
        op.attrs["variants"] = variants
        sketch = sketch_kernel(func)
        assert {variant["kernel"] for variant in variants} >= {"fp8"}
        for schedule, variant in zip(sketch.schedules, variants, strict=True):
            ending = "_narrow" if variant["kernel"] == "fp8" else "_round"
            assert schedule.entries[0].name == func.name + ending


def test_rows_that_stay_are_not_multiplied_so() -> None:
    func = packed(build.gemm_combine(64, 64, 4, 2, torch.bfloat16, variants=(TILE,)), "fp8")
    with pytest.raises(CompileError, match="family 'fp8' multiplies rows that are rounded, these stay as they are"):
        sketch_kernel(func)
