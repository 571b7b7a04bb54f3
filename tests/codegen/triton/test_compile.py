"""Kernels compile for every GPU target without a GPU, into what the hardware wants to see."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from sparsec import pipeline
from sparsec.codegen.triton.compile import TARGETS, Target
from sparsec.codegen.triton.emit import TritonKernel, emit_kernel, sketch_kernel
from sparsec.diagnostics import CompileError
from sparsec.ir.core import Func
from sparsec.ir.parser import parse_module
from sparsec.ir.printer import print_module
from sparsec.passes.chips import chip
from sparsec.passes.schedule import gpu_variants
from sparsec.runtime.dims import compile_dim
from tests.codegen.layers import LAYERS
from tests.codegen.triton import build
from tests.codegen.triton.handwritten_routers import HANDWRITTEN
from tests.codegen.triton.packed import packed
from tests.codegen.triton.routers import ROUTERS, Router
from tests.passes.route_layers import HIDDEN, Layer, kernel_of

pytest.importorskip("triton")
CHECKED = ["cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "hip:gfx942", "hip:gfx950"]
TINY = ({"up_to": None, "block_m": 16, "block_n": 32, "block_k": 32, "num_warps": 4, "num_stages": 2},)


def silu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(a) * b


def router(name: str, **kwargs: Any) -> Func:
    chosen: Router = ROUTERS[name]
    return build.route_group(chosen, torch.randn(5, chosen.experts), *map(torch.rand, chosen.params), **kwargs)


def tiny() -> list[Func]:
    one = ({"up_to": None, "block_rows": 8, "num_warps": 4},)
    return [
        router("deepseek_v2", variants=one),
        build.gather_gemm(silu, 64, 48, 8, 2, torch.bfloat16, "interleaved", True, True, TINY),
        build.gemm_combine(64, 48, 8, 2, torch.bfloat16, True, True, TINY),
    ]


def olmoe() -> list[Func]:
    return [
        router("olmoe"),
        build.gather_gemm(silu, 2048, 1024, 64, 8, torch.bfloat16),
        build.gemm_combine(2048, 1024, 64, 8, torch.bfloat16),
    ]


SHAPES = {"tiny": tiny, "olmoe": olmoe}
FUNCS: dict[str, list[Func]] = {}


def compiled(shape: str, target: str) -> list[TritonKernel]:
    if shape not in FUNCS:
        FUNCS[shape] = SHAPES[shape]()
    return [emit_kernel(func, target) for func in FUNCS[shape]]


@pytest.mark.parametrize("target", CHECKED)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_kernel_fits(shape: str, target: str) -> None:
    """Images for every launch, shared memory within the limit, accumulators in registers, the runtime's parameters."""
    for kernel in compiled(shape, target):
        assert kernel.variants[-1].up_to is None
        launches = [launch for variant in kernel.variants for launch in variant.config["launches"]]
        assert {launch["file"] for launch in launches} == kernel.binaries.keys() <= kernel.files.keys()
        for launch in launches:
            binary = kernel.binaries[launch["file"]]
            assert binary.image[:4] == b"\x7fELF"
            assert launch["shared"] == binary.shared <= TARGETS[target].shared_limit
            assert binary.spills == 0, launch
            assert launch["threads"] == launch["num_warps"] * TARGETS[target].warp_size
            if target.startswith("cuda"):
                # The two that follow ours are Triton's scratch pointers, which the runtime passes as null.
                assert len(re.findall(r"^\s*\.param ", binary.assembly, re.M)) == len(launch["args"]) + 2
        for variant in kernel.variants:
            assert json.loads(json.dumps(variant.config)) == variant.config


@pytest.mark.parametrize("target", CHECKED)
def test_tails_input_weights_and_lone_routes_compile(target: str) -> None:
    for name, kernels in (("input_and_tail", ("gather_gemm_0", "gemm_combine_0")), ("lone_route", ("route_0",))):
        lowered = pipeline.run(LAYERS[name].module(), target=target).module
        for kernel in kernels:
            lowered.funcs[kernel].body.ops[0].attrs.pop("variants", None)
            lowered.funcs[kernel].attrs["variants"] = TINY
            made = emit_kernel(lowered.funcs[kernel], target)
            assert all(binary.spills == 0 for binary in made.binaries.values())
            assert made.variants[-1].up_to is None


def test_a_tail_holds_a_wide_row_in_registers() -> None:
    text = print_module(LAYERS["tail"].module()).replace("x40x", "x7168x").replace("40xf32", "7168xf32")
    func = pipeline.run(parse_module(text), target="cuda:sm_90").module.funcs["gemm_combine_0"]
    func.body.ops[0].attrs["variants"] = TINY
    made = emit_kernel(func, "cuda:sm_90")
    (finish,) = [binary for binary in made.binaries.values() if "finish" in binary.symbol]
    assert finish.spills == 0


def test_a_row_that_is_too_wide_is_refused() -> None:
    text = print_module(LAYERS["tail"].module()).replace("x40x", "x16400x").replace("40xf32", "16400xf32")
    func = pipeline.run(parse_module(text), target="cuda:sm_90").module.funcs["gemm_combine_0"]
    with pytest.raises(CompileError, match="a tail over rows of 16400 columns"):
        sketch_kernel(func)


def test_hopper_uses_its_tensor_cores() -> None:
    """From 64 rows a tile is wide enough for wgmma; below, the older instruction has to do."""
    for kernel in compiled("olmoe", "cuda:sm_90")[1:]:
        for variant in kernel.variants:
            launch = variant.config["launches"][0]
            text = kernel.binaries[launch["file"]].assembly
            assert ("wgmma.mma_async" in text) == (launch["constants"]["BLOCK_M"] >= 64)
            assert "mma" in text


@pytest.mark.parametrize("name", sorted(set(ROUTERS) - {"olmoe", "deepseek_v2"}))
@pytest.mark.slow
def test_every_router_compiles(name: str) -> None:
    for target in CHECKED:
        func = router(name, listed=True)
        func.attrs["variants"] = gpu_variants(func.body.ops[0], chip(target))
        assert all(not binary.spills for binary in emit_kernel(func, target).binaries.values())


@pytest.mark.parametrize("name", sorted(HANDWRITTEN))
@pytest.mark.slow
def test_every_raised_router_compiles(name: str) -> None:
    chosen = HANDWRITTEN[name]
    layer = Layer(chosen, chosen.experts, chosen.params)
    func, _ = kernel_of(layer, torch.randn(5, HIDDEN), bank=chosen.experts)
    for target in CHECKED:
        assert all(not binary.spills for binary in emit_kernel(func, target).binaries.values())


@pytest.mark.parametrize("packing", ["plain", "fp8", "mxfp4"])
def test_f32_is_not_cut_to_tf32(packing: str) -> None:
    """The interpreter cannot tell: tensor cores would round what is multiplied to ten bits."""
    up = build.gather_gemm(silu, 128, 128, 4, 2, torch.float32, variants=TINY)
    down = build.gemm_combine(128, 128, 4, 2, torch.float32, variants=TINY)
    for func in (up, down):
        kernel = emit_kernel(func if packing == "plain" else packed(func, packing), "cuda:sm_90")
        products = [line for one in kernel.binaries.values() for line in one.ttir.splitlines() if "tt.dot " in line]
        assert products and not any("tf32" in line for line in products)


def test_grids_cover_every_tile() -> None:
    """However the pairs are spread over the experts, the grid holds a program for each tile."""
    sketch = sketch_kernel(build.gather_gemm(silu, 64, 48, 8, 2, torch.bfloat16, variants=TINY))
    grid: Any = compile_dim(sketch.schedules[0].entries[0].grid[0])
    columns = 2
    for tokens in (1, 2, 7, 8, 50):
        pairs = 2 * tokens
        for counts in ([pairs], [1] * min(8, pairs), [pairs - 7 * (pairs // 8), *[pairs // 8] * 7]):
            assert sum(-(-count // 16) for count in counts) * columns <= grid({"t": tokens})
    assert grid({"t": 0}) == 0


def test_same_input_gives_the_same_bytes() -> None:
    from sparsec.codegen.triton import compile as module

    func = build.gemm_combine(64, 48, 8, 2, torch.bfloat16, variants=TINY)
    first = emit_kernel(func, "cuda:sm_90").files
    module._CACHE.clear()
    assert emit_kernel(func, "cuda:sm_90").files == first


def test_stages_are_lowered_until_they_fit() -> None:
    deep = ({"up_to": None, "block_m": 64, "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 20},)
    kernel = emit_kernel(build.gemm_combine(256, 256, 4, 2, torch.bfloat16, variants=deep), "cuda:sm_90")
    launch = kernel.variants[0].config["launches"][0]
    assert 1 < launch["num_stages"] < 20
    assert launch["shared"] <= TARGETS["cuda:sm_90"].shared_limit


def test_tiles_that_cannot_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(TARGETS["cuda:sm_90"], shared_limit=512)
    monkeypatch.setitem(cast("dict[str, Target]", TARGETS), "cuda:sm_90", small)
    variants = ({**TINY[0], "up_to": 32}, *TINY)
    func = build.gather_gemm(silu, 64, 64, 4, 2, torch.bfloat16, variants=variants)
    message = r"variant up to 32 tokens: 'gather_gemm_0' needs \d+ bytes of shared memory, cuda:sm_90 has 512"
    with pytest.raises(CompileError, match=message):
        emit_kernel(func, "cuda:sm_90")


def test_unknown_op_is_named_with_the_users_line() -> None:
    def strange(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = torch.topk(torch.special.bessel_j0(z), 2)
        return ids, weights

    with pytest.raises(CompileError) as caught:
        sketch_kernel(build.route_group(strange, torch.randn(3, 4)))
    (diagnostic,) = caught.value.diagnostics
    assert "'aten.special_bessel_j0'" in diagnostic.message
    assert diagnostic.loc.file.endswith(".py") and diagnostic.hint


def test_ops_that_cross_tokens_are_refused() -> None:
    def crossing(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = torch.topk(z - z.mean(dim=0), 2)
        return ids, weights

    with pytest.raises(CompileError, match="runs over the tokens"):
        sketch_kernel(build.route_group(crossing, torch.randn(3, 4)))


def test_unknown_target_lists_the_known() -> None:
    with pytest.raises(CompileError, match="no GPU target 'cuda:sm_70'") as caught:
        emit_kernel(build.group(4, 2), "cuda:sm_70")
    assert "cuda:sm_90" in str(caught.value)


def test_source_tells_where_it_comes_from() -> None:
    source = sketch_kernel(router("deepseek_v3")).source
    assert "choose 8 of 256 experts" in source
    assert "tests/codegen/triton/" in source
    assert source.count("# tests/codegen/triton/") >= 1
    compile(source, "generated", "exec")
