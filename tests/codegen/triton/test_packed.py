"""Kernels on packed banks compile for every GPU, widen weights by few instructions, and load them ahead of time."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from sparsec.codegen.triton.compile import TARGETS
from sparsec.codegen.triton.emit import TritonKernel, emit_kernel, sketch_kernel
from sparsec.diagnostics import CompileError
from sparsec.ir.core import Func
from sparsec.passes.chips import chip
from sparsec.passes.cost import candidates
from sparsec.passes.roofline import predict
from sparsec.passes.schedule import gpu_variants
from tests.codegen.triton import build
from tests.codegen.triton.check_experts import clamped
from tests.codegen.triton.hopper import serialised, under_way
from tests.codegen.triton.packed import packed
from tests.passes.published import DEEPSEEK_V3, GPT_OSS, QWEN3, Shape

pytest.importorskip("triton")
FEW = {"up_to": 64, "block_m": 16, "block_n": 64, "block_k": 128, "num_warps": 4, "num_stages": 4}
ROWS = {"kernel": "rows", "up_to": 8, "block_m": 1, "block_n": 16, "block_k": 128, "num_warps": 4, "num_stages": 4}
MANY = {"block_m": 128, "block_n": 64, "block_k": 128, "num_warps": 8, "num_stages": 3}
REST: dict[str, Any] = {"up_to": None, "block_m": 16, "block_n": 32, "block_k": 128}
SLOW = [pytest.param(target, marks=pytest.mark.slow) for target in TARGETS if target != "cuda:sm_90"]


def silu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(a) * b


def kernels(packing: str, target: str, variants: Any = (FEW, MANY)) -> list[TritonKernel]:
    funcs = [
        build.gather_gemm(silu, 2048, 768, 128, 8, torch.bfloat16, variants=variants),
        build.gemm_combine(2048, 768, 128, 8, torch.bfloat16, variants=variants),
    ]
    return [emit_kernel(packed(func, packing), target) for func in funcs]


@pytest.mark.parametrize("target", ["cuda:sm_90", *SLOW])
@pytest.mark.parametrize("packing", ["fp8", "mxfp4"])
def test_every_target(packing: str, target: str) -> None:
    for kernel in kernels(packing, target):
        launches = [launch for variant in kernel.variants for launch in variant.config["launches"]]
        gemms = [launch for launch in launches if "BLOCK_K" in launch["constants"]]
        assert len(gemms) == 2
        for launch in gemms:
            binary = kernel.binaries[launch["file"]]
            assert binary.spills == 0 and binary.shared <= TARGETS[target].shared_limit
            assert launch["constants"]["PTX"] == target.startswith("cuda")
            if target == "cuda:sm_90":
                assert ("wgmma.mma_async" in binary.assembly) == (launch["constants"]["BLOCK_M"] >= 64)
                assert ("prefetch.global.L2" in binary.assembly) == binary.symbol.startswith("gemm_combine")


@pytest.mark.parametrize("target", ["cuda:sm_90", *SLOW])
@pytest.mark.parametrize("packing", ["fp8", "mxfp4"])
def test_rows_on_every_target(packing: str, target: str) -> None:
    """Without tensor cores, going up two rows at a time."""
    check_rows(build.gather_gemm(silu, 512, 256, 8, 2, torch.bfloat16, variants=({**ROWS, "block_m": 2}, REST)),
               build.gemm_combine(512, 256, 8, 4, torch.bfloat16, variants=({**ROWS, "block_n": 8}, REST)),
               packing=packing, target=target)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("packing", ["fp8", "mxfp4"])
def test_rows_that_no_block_divides(packing: str, target: str) -> None:
    for layout in ("interleaved", "concat", "single"):
        activation = torch.relu if layout == "single" else silu
        variants = (ROWS, REST)
        check_rows(build.gather_gemm(activation, 300, 130, 8, 2, torch.bfloat16, layout, True, variants=variants),
                   packing=packing, target=target)  # fmt: skip
    uneven = ({**ROWS, "split": 2}, REST)
    check_rows(build.gemm_combine(130, 300, 8, 3, torch.bfloat16, True, variants=uneven),
               packing=packing, target=target)  # fmt: skip


def check_rows(*funcs: Func, packing: str, target: str) -> None:
    """Compile kernels on packed banks and look at their first launch."""
    for func in funcs:
        kernel = emit_kernel(packed(func, packing), target)
        (launch,) = kernel.variants[0].config["launches"]
        binary = kernel.binaries[launch["file"]]
        assert binary.spills == 0 and binary.shared <= TARGETS[target].shared_limit
        assert launch["constants"]["PTX"] == target.startswith("cuda")
        if target == "cuda:sm_90":
            assert "mma" not in binary.assembly
            assert not re.search(r"cvt\.rn\.(f16x2|bf16x2)\.e\dm\d", binary.assembly)


def loads_of_a_warp(ttgir: str) -> set[tuple[int, int]]:
    """Of the tiles of bytes: how many along the inner dimension a thread has, and how many threads a warp has there."""
    layout = r"#(\w+) = #ttg\.blocked<\{sizePerThread = \[\d+, \d+, (\d+)\], threadsPerWarp = \[\d+, \d+, (\d+)\]"
    found = {name: (int(own), int(threads)) for name, own, threads in re.findall(layout, ttgir)}
    tiles = re.findall(r"ttg\.local_load .*-> tensor<\d+x\d+x\d+xi8, #(\w+)>", ttgir)
    return {found[name] for name in tiles}


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["fp8", "mxfp4"])
def test_the_order_of_adding_is_one_for_all_tiles(packing: str) -> None:
    """A row's terms are added by as many threads, each with as many, whatever the number of tokens chooses."""
    for half, small, large in (("up", 16, 64), ("down", 4, 16)):
        for n in (small, large):
            gemm = next(gemm for gemm in QWEN3.layer(packing=packing) if gemm.half == half)
            tiles = [v for v in candidates(gemm, chip("cuda:sm_90")) if v.kernel == "rows" and v.block_n == n]
            tile = min(tiles, key=str, default=None)
            if tile is None:  # more than a step
                assert packing == "fp8" and n == large
                continue
            variants = ({**vars(tile), "up_to": 8}, FEW)
            made = (
                build.gather_gemm(silu, 2048, 768, 128, 8, torch.bfloat16, variants=variants)
                if half == "up"
                else build.gemm_combine(2048, 768, 128, 8, torch.bfloat16, variants=variants)
            )
            kernel = emit_kernel(packed(made, packing), "cuda:sm_90")
            (launch,) = kernel.variants[0].config["launches"]
            assert launch["num_warps"] == tile.num_warps
            assert loads_of_a_warp(kernel.binaries[launch["file"]].ttgir) == {(16, 8 if packing == "fp8" else 2)}


@pytest.mark.parametrize("packing", ["fp8", "mxfp4"])
def test_rows_load_weights_ahead_of_time(packing: str) -> None:
    """Weights come to shared memory, 16 bytes a thread, and two are widened by one product."""
    kernel = emit_kernel(packed(build.gemm_combine(2048, 768, 128, 8, torch.bfloat16, variants=(ROWS, FEW)), packing),
                         "cuda:sm_90")  # fmt: skip
    (launch,) = kernel.variants[0].config["launches"]
    text = kernel.binaries[launch["file"]].assembly
    weights = 16 * 8 * 128 // 128  # of a tile, by thread
    assert text.count("fma.rn.bf16x2") == weights // 2
    assert "prefetch.global.L2" in text.split("griddepcontrol.wait")[0]
    size = {"fp8": 1, "mxfp4": 2}[packing]
    steps = 4 - 1 + 1  # that are asked for before the loop, and in it
    assert len(re.findall(r"cp\.async\.cg\.shared\.global .*0x10", text)) == steps * weights // 16 // size


@pytest.mark.parametrize("packing", ["fp8", "mxfp4"])
def test_decode_takes_rows(packing: str) -> None:
    """A token or two of a layer of many experts: no sum of rows is launched, and the kernels compile as meant."""
    op = packed(build.gemm_combine(2048, 768, 128, 8, torch.bfloat16), packing).body.ops[0]
    variants = gpu_variants(op, chip("cuda:sm_90"))
    assert variants[0]["kernel"] == "rows" and variants[0]["up_to"] >= 4
    assert variants[-1]["kernel"] == "swap" and variants[-1]["block_m"] == 128


@pytest.mark.parametrize("warps", [4, 8])
def test_bytes_that_are_widened_together_are_of_one_column(warps: int) -> None:
    narrow = {**MANY, "num_warps": warps, "block_m": 16, "block_n": 16}
    few = {**ROWS, "num_warps": warps, "block_n": 4}
    func = packed(build.gather_gemm(silu, 256, 256, 8, 2, torch.bfloat16, variants=(few, narrow)), "mxfp4")
    assert [schedule.entries[0].num_warps for schedule in sketch_kernel(func).schedules] == [1, 4]


@pytest.mark.parametrize("packing", ["fp8", "mxfp4"])
def test_widening_takes_one_product_for_two_weights(packing: str) -> None:
    """No conversion of floats, and every load of the loop is asynchronous."""
    kernel = kernels(packing, "cuda:sm_90", ({**FEW, "up_to": None},))[1]
    (text,) = (binary.assembly for binary in kernel.binaries.values() if binary.symbol.endswith("_gemm"))
    body = text[text.index("mma.sync") : text.rindex("mma.sync")]
    weights = 64 * 128 // 128  # of a tile, by thread
    assert text.count("fma.rn.bf16x2") == weights // 2
    assert not re.search(r"cvt\.rn\.(f16x2|bf16x2)\.e\dm\d", text)
    loads = len(re.findall(r"ld\.global", body))
    assert loads <= (1 if packing == "fp8" else 0), "fp8 has one scale for a tile"


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["fp8", "mxfp4"])
def test_what_the_schedule_chooses_spills_nothing(packing: str) -> None:
    for func in (build.gather_gemm(silu, 2048, 768, 128, 8, torch.bfloat16),
                 build.gemm_combine(2048, 768, 128, 8, torch.bfloat16)):  # fmt: skip
        op = packed(func, packing).body.ops[0]
        op.attrs["variants"] = gpu_variants(op, chip("cuda:sm_90"))
        made = emit_kernel(func, "cuda:sm_90")
        assert len(made.variants) > 1
        assert all(binary.spills == 0 for binary in made.binaries.values())


def swap(m: int, n: int, warps: int, stages: int = 4) -> dict[str, Any]:
    return {"kernel": "swap", "block_m": m, "block_n": n, "block_k": 128, "num_warps": warps, "num_stages": stages}


def check_swap(func: Func, packing: str, target: str) -> None:
    """Weights by the copy engine, widened in registers, from which wgmma takes them."""
    kernel = emit_kernel(packed(func, packing), target)
    for variant in kernel.variants:
        launch = variant.config["launches"][0]
        binary = kernel.binaries[launch["file"]]
        assert binary.spills == 0, launch
        assert launch["num_stages"] == variant.config["choice"]["num_stages"]
        assert binary.shared <= TARGETS[target].shared_limit
        assert "cp.async.bulk.tensor" in binary.assembly and "mma.sync" not in binary.assembly
        if target == "cuda:sm_90":
            products = re.findall(r"wgmma\.mma_async\.\S*m64n(\d+)k16\S* \{[^}]*\}, (\{%r\d+)?", binary.assembly)
            assert {int(columns) for columns, _ in products} == {launch["constants"]["BLOCK_M"]}
            assert all(registers for _, registers in products), "weights go back to shared memory"
            assert not serialised(binary)
            assert (under_way(binary)[0] > 0) == (packing == "mxfp4"), "sums of fp8 are scaled step by step"
            loop = binary.assembly[: binary.assembly.rindex("wgmma.mma_async")]
            assert not re.search(r"st\.shared\.v4|ldmatrix|stmatrix", loop)


@pytest.mark.parametrize("packing", ["fp8", "mxfp4"])
def test_swap_widens_in_registers(packing: str) -> None:
    """Up to 128 rows of a gated expert whose columns alternate, with a bias; going down, with a last step beyond K."""
    many = ({**swap(16, 32, 4), "up_to": 1}, swap(128, 64, 8))
    gated = build.gather_gemm(clamped, 2880, 2880, 32, 4, torch.bfloat16, "interleaved", True, False, many)
    check_swap(gated, packing, "cuda:sm_90")
    down = build.gemm_combine(2880, 2880, 32, 4, torch.bfloat16, True, False, (swap(64, 128, 8),), listed=True)
    check_swap(down, packing, "cuda:sm_90")


@pytest.mark.parametrize("packing", ["fp8", "mxfp4"])
def test_swap_widens_by_few_instructions(packing: str) -> None:
    """One product for two weights, which come in two bytes, or four by two products: as the cost model counts."""
    func = build.gemm_combine(2048, 768, 8, 2, torch.bfloat16, variants=(swap(32, 64, 4),))
    kernel = emit_kernel(packed(func, packing), "cuda:sm_90")
    text = kernel.binaries[kernel.variants[0].config["launches"][0]["file"]].assembly
    weights = 64 * 128 // 128  # of a tile, by thread
    assert text.count("fma.rn.bf16x2") == weights // 2
    assert len(re.findall(r"ld\.shared\.b16", text)) == weights // (2 if packing == "fp8" else 4)
    assert not re.search(r"ld\.shared\.v\d\.b8|cvt\.rn\.(f16x2|bf16x2)\.e\dm\d", text)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:sm_90", "cuda:sm_100"])
@pytest.mark.parametrize("packing", ["fp8", "mxfp4"])
@pytest.mark.parametrize("shape", [DEEPSEEK_V3, GPT_OSS], ids=["deepseek-v3", "gpt-oss"])
def test_every_tile_of_swap_that_is_tried_fits(shape: Shape, packing: str, target: str) -> None:
    """No spills, and no more shared memory than the cost model says."""
    on, layout = chip(target), "interleaved" if shape is GPT_OSS else "concat"
    for gemm in shape.layer(packing=packing):
        tried = [v for v in candidates(gemm, on) if v.kernel == "swap" and v.num_stages == 3]
        tried = [v for v in tried if predict(gemm, v, 1, on) is not None]
        assert len(tried) >= 8
        ends = [*range(1, len(tried)), None]
        variants = tuple({**vars(v), "up_to": end} for v, end in zip(tried, ends, strict=True))
        given = shape.hidden, shape.width, shape.experts, shape.k, torch.bfloat16
        func = (
            build.gather_gemm(clamped, *given, layout, shape is GPT_OSS, False, variants, listed=True)
            if gemm.half == "up"
            else build.gemm_combine(*given, shape is GPT_OSS, False, variants, listed=True)
        )
        kernel = emit_kernel(packed(func, packing), target)
        for variant, made in zip(tried, kernel.variants, strict=True):
            launch = made.config["launches"][0]
            binary = kernel.binaries[launch["file"]]
            assert binary.spills == 0, variant
            assert launch["num_stages"] == 3 and binary.shared <= variant.shared(gemm, on), variant


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["fp8", "mxfp4"])
@pytest.mark.parametrize("layout", ["single", "concat", "interleaved"])
def test_swap_of_every_layout(layout: str, packing: str) -> None:
    """Columns and sums that no tile divides."""
    activation = torch.relu if layout == "single" else silu
    for target in ("cuda:sm_90", "cuda:sm_100"):
        variants = ({**swap(16, 64, 4), "up_to": 1}, swap(64, 128, 8))
        check_swap(build.gather_gemm(activation, 1040, 840, 8, 2, torch.bfloat16, layout, variants=variants),
                   packing, target)  # fmt: skip


def test_swap_names_what_the_engine_does_not_take() -> None:
    few = ({**FEW, "kernel": "swap"},)
    for hidden, width, packing, says in ((128, 60, "mxfp4", "60 columns of each kind"), (72, 64, "fp8", "rows of 72")):
        func = packed(build.gather_gemm(silu, hidden, width, 4, 2, torch.bfloat16, variants=few), packing)
        with pytest.raises(CompileError, match=says):
            sketch_kernel(func)
    with pytest.raises(CompileError, match="cuda:sm_80"):
        emit_kernel(packed(build.gemm_combine(128, 128, 4, 2, torch.bfloat16, variants=few), "fp8"), "cuda:sm_80")


def test_other_families_refuse() -> None:
    func = packed(build.gemm_combine(64, 64, 4, 2, torch.bfloat16, variants=({**FEW, "kernel": "persistent"},)), "fp8")
    with pytest.raises(CompileError, match="family 'persistent' reads plain weights, these are fp8"):
        sketch_kernel(func)


def test_tiles_are_cut_to_blocks() -> None:
    """A scale holds for 128 of K: no tile is deeper."""
    wide = ({**FEW, "block_k": 256}, {**MANY, "block_k": 64})
    for packing, depths in (("fp8", [128, 64]), ("mxfp4", [128, 128])):
        sketch = sketch_kernel(packed(build.gemm_combine(512, 512, 4, 2, torch.bfloat16, variants=wide), packing))
        assert [schedule.entries[0].constants["BLOCK_K"] for schedule in sketch.schedules] == depths
