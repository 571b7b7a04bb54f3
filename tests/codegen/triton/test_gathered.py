"""The family `gathered` compiles to TMA copies of both operands, wgmma and divided warps; and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from sparsec.codegen.triton.compile import TARGETS, Binary
from sparsec.codegen.triton.emit import emit_kernel, sketch_kernel
from sparsec.diagnostics import CompileError
from tests.codegen.triton import build
from tests.codegen.triton.check_experts import clamped, silu
from tests.codegen.triton.hopper import serialised, under_way

pytest.importorskip("triton")
TILE: dict[str, Any] = {"kernel": "gathered", "block_m": 128, "block_n": 128, "block_k": 64, "num_stages": 4}


def gemm_of(target: str, variant: dict[str, Any], layout: str, transposed: bool) -> tuple[Binary, dict[str, Any]]:
    activation = clamped if layout == "interleaved" else silu
    func = build.gather_gemm(
        activation, 2048, 768, 128, 8, torch.bfloat16, layout, True, transposed, (variant,), listed=True
    )
    kernel = emit_kernel(func, target)
    copy, gemm = kernel.variants[0].config["launches"]
    assert copy["symbol"] == "gather_gemm_0_copy" and copy["grid"] == ["(t * 8 + 7) // 8", "2"]
    binary = kernel.binaries[gemm["file"]]
    assert binary.spills in (0, None) and binary.shared <= TARGETS[target].shared_limit
    assert "cp.async.bulk.tensor" in binary.assembly and "cp.async.cg" not in binary.assembly
    assert binary.assembly.index("griddepcontrol.wait") < binary.assembly.index("cp.async.bulk.tensor")
    return binary, gemm


@pytest.mark.parametrize(("layout", "transposed"), [("concat", False), ("interleaved", False), ("concat", True)])
def test_four_warps_divide_the_work(layout: str, transposed: bool) -> None:
    binary, gemm = gemm_of("cuda:sm_90", {**TILE, "num_warps": 4}, layout, transposed)
    assert binary.threads == 384  # 4 warps that fetch, twice 4 that multiply
    assert gemm["num_stages"] == 4
    assert "setmaxnreg" in binary.assembly and "wgmma.mma_async.sync.aligned.m64n128k16" in binary.assembly
    rows = gemm["args"][0]
    assert rows["map"] == {"scratch": 0} and rows["shape"] == ["t * 8", 2048] and rows["strides"] == [2048, 1]
    assert rows["box"] == [64, 64]  # each group of warps has its own half of the rows


def test_both_groups_of_warps_store_their_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own IR: the rows of each group begin at 0 or 64 of the tile, and nothing moves them on once more."""
    triton: Any = pytest.importorskip("triton")
    compiled, compile = list[Any](), triton.compile

    def recorded(*args: Any, **kwargs: Any) -> Any:
        compiled.append(compile(*args, **kwargs))
        return compiled[-1]

    monkeypatch.setattr(triton, "compile", recorded)
    gemm_of("cuda:sm_90", {**TILE, "num_warps": 4, "num_stages": 2}, "interleaved", False)
    (text,) = [made.asm["ttgir"] for made in compiled if "warp_specialize" in made.asm["ttgir"]]
    fetching, *groups = re.split(r"\n    partition\d\(", text)
    assert len(re.findall(r"async_tma_copy_global_to_local %gathered.*memdesc<64x64x", fetching)) == 2
    assert len(groups) == 2
    for group, begin in zip(groups, (0, 64), strict=True):
        assert re.search(rf"make_range .*end = {begin + 64} : i32, start = {begin} : i32", group)
        assert group.count("ttng.warp_group_dot ") == 2 and "tt.store" in group
        assert not re.search(r"arith\.addi %\w+, %c64_i32\w* .*: i32 loc", group)


@pytest.mark.parametrize(
    ("target", "layout", "transposed"),
    [
        ("cuda:sm_90", "concat", False),
        ("cuda:sm_90", "concat", True),
        ("cuda:sm_90", "interleaved", False),
        ("cuda:sm_90", "interleaved", True),
        ("cuda:sm_100", "concat", False),
    ],
)
def test_eight_warps_do_everything(target: str, layout: str, transposed: bool) -> None:
    binary, _ = gemm_of(target, {**TILE, "num_warps": 8, "num_stages": 3}, layout, transposed)
    assert binary.threads == 256 and "setmaxnreg" not in binary.assembly
    if target == "cuda:sm_100":
        assert "tcgen05.mma" in binary.assembly
        return
    # A sum of both kinds of columns, or two of them in a loop of its own for each tile: none is waited for in between.
    assert "wgmma.mma_async" in binary.assembly and not serialised(binary) and under_way(binary)[0] >= 1


def test_columns_that_alternate_are_left_to_eight_warps() -> None:
    """Triton cannot divide the work where they are parted in registers."""
    func = build.gather_gemm(
        clamped, 64, 64, 4, 2, torch.bfloat16, "interleaved", False, True, ({**TILE, "num_warps": 4},), listed=True
    )
    _, gemm = sketch_kernel(func).schedules[0].entries
    assert (gemm.num_warps, gemm.constants["DIVIDED"]) == (8, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float32}, "take bf16 and f16"),
        ({"listed": False}, "read their tiles from a list"),
        ({"hidden": 40}, "rows of 80 bytes with 40 terms"),
        ({"width": 50, "transposed": True}, "rows of 200 bytes with 64 terms"),
    ],
)
def test_what_it_cannot_compute_is_refused(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"hidden": 64, "width": 48, "dtype": torch.float16, "listed": True, "variants": (TILE,)}
    with pytest.raises(CompileError, match=message):
        sketch_kernel(build.gather_gemm(silu, experts=4, k=2, **{**given, **changes}))
