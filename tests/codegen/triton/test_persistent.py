"""The family `persistent` compiles to TMA copies, wgmma and divided warps without spills; and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from sparsec.codegen.triton.compile import TARGETS, Binary
from sparsec.codegen.triton.emit import TritonKernel, emit_kernel, sketch_kernel
from sparsec.diagnostics import CompileError
from tests.codegen.triton import build

pytest.importorskip("triton")
TILE: dict[str, Any] = {"kernel": "persistent", "block_m": 128, "block_n": 128, "block_k": 64, "num_stages": 4}


def qwen(variant: dict[str, Any], target: str, **changes: Any) -> TritonKernel:
    func = build.gemm_combine(2048, 768, 128, 8, torch.bfloat16, variants=(variant,), listed=True, **changes)
    return emit_kernel(func, target)


def gemm_of(kernel: TritonKernel) -> tuple[Binary, dict[str, Any]]:
    launch = kernel.variants[0].config["launches"][0]
    return kernel.binaries[launch["file"]], launch


def fits(binary: Binary, target: str) -> None:
    assert binary.spills in (0, None) and binary.shared <= TARGETS[target].shared_limit


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("columns", [128, 256])
def test_four_warps_divide_the_work(columns: int, transposed: bool) -> None:
    variant = {**TILE, "block_n": columns, "num_warps": 4}
    binary, launch = gemm_of(qwen(variant, "cuda:sm_90", transposed=transposed, bias=transposed))
    fits(binary, "cuda:sm_90")
    assert binary.threads == 384  # 4 warps that fetch, twice 4 that multiply
    assert launch["num_stages"] == 4
    text = binary.assembly
    assert "setmaxnreg" in text and "cp.async.bulk.tensor" in text and "wgmma.mma_async" in text
    assert "mma.sync" not in text and "cp.async.cg" not in text
    assert len(re.findall("griddepcontrol.wait", text)) == 1 and launch["pdl"]


@pytest.mark.parametrize("columns", [128, 256])
def test_both_groups_of_warps_store_their_own_rows(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own IR: the rows of each group begin at 0 or 64 of the tile, and nothing moves them on once more."""
    triton: Any = pytest.importorskip("triton")
    compiled, compile = list[Any](), triton.compile

    def keep(*args: Any, **options: Any) -> Any:
        compiled.append(compile(*args, **options))
        return compiled[-1]

    monkeypatch.setattr(triton, "compile", keep)
    variant = {**TILE, "block_n": columns, "num_warps": 4, "num_stages": 2}
    qwen(variant, "cuda:sm_90", bias=columns == 128, transposed=columns == 128)
    (text,) = [made.asm["ttgir"] for made in compiled if "warp_specialize" in made.asm["ttgir"]]
    _, *groups = re.split(r"\n    partition\d\(", text)
    assert len(groups) == 2
    for group, begin in zip(groups, (0, 64), strict=True):
        assert re.search(rf"make_range .*end = {begin + 64} : i32, start = {begin} : i32", group)
        assert "ttng.warp_group_dot" in group and "tt.store" in group
        assert not re.search(r"arith\.addi %\w+, %c64_i32\w* .*: i32 loc", group)


@pytest.mark.parametrize("target", ["cuda:sm_90", "cuda:sm_100"])
def test_eight_warps_do_everything(target: str) -> None:
    binary, _ = gemm_of(qwen({**TILE, "block_n": 256, "num_warps": 8}, target))
    fits(binary, target)
    assert binary.threads == 256
    assert "cp.async.bulk.tensor" in binary.assembly and "setmaxnreg" not in binary.assembly
    assert ("wgmma.mma_async" if target == "cuda:sm_90" else "tcgen05.mma") in binary.assembly


def test_maps_say_what_the_binary_wants() -> None:
    _, launch = gemm_of(qwen({**TILE, "block_n": 256, "block_k": 128, "num_warps": 8, "num_stages": 2}, "cuda:sm_90"))
    rows, bank = (arg for arg in launch["args"] if "map" in arg)
    assert rows == {"map": {"in": 0}, "element": "bf16", "shape": ["t * 8", 768], "strides": [768, 1],
                    "box": [128, 64], "swizzle": 3}  # fmt: skip
    assert bank == {"map": {"in": 4}, "element": "bf16", "shape": [128, 2048, 768], "strides": [1572864, 768, 1],
                    "box": [1, 256, 64], "swizzle": 3}  # fmt: skip
    assert launch["grid"] == ["min(sms, (t * 8 // 128 + min(129, t * 8)) * 8)", "1"]


@pytest.mark.parametrize("columns", [128, 256])
def test_groups_of_warps_have_their_rows_copied_apart(columns: int) -> None:
    """Each group waits for the bytes of its 64 rows, and more would run over what lies behind its buffer."""
    binary, launch = gemm_of(qwen({**TILE, "block_n": columns, "num_warps": 4, "num_stages": 2}, "cuda:sm_90"))
    assert [arg["box"] for arg in launch["args"] if "map" in arg] == [[64, 64], [1, columns, 64]]
    expected = re.findall(r"mbarrier\.arrive\.expect_tx\S* _, \[\S+\], (\d+);", binary.assembly)
    assert {int(size) for size in expected} == {64 * 64 * 2, columns * 64 * 2}


@pytest.mark.parametrize("target", ["cuda:sm_80", "hip:gfx942"])
def test_other_chips_have_no_descriptors(target: str) -> None:
    func = build.gemm_combine(64, 64, 4, 2, torch.float16, variants=({**TILE, "num_warps": 8},), listed=True)
    with pytest.raises(CompileError, match=f"takes tensor descriptors, which {target} does not have"):
        emit_kernel(func, target)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float32}, "take bf16 and f16"),
        ({"listed": False}, "read their tiles from a list"),
        ({"width": 40}, "rows of 80 bytes with 40 terms"),
        ({"hidden": 60, "transposed": True}, "rows of 120 bytes with 48 terms"),
        ({"variants": ({**TILE, "block_n": 512},), "hidden": 512}, "tiles of up to 256 columns"),
    ],
)
def test_what_it_cannot_compute_is_refused(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"hidden": 64, "width": 48, "dtype": torch.float16, "listed": True, "variants": (TILE,)}
    with pytest.raises(CompileError, match=message):
        sketch_kernel(build.gemm_combine(experts=4, k=2, **{**given, **changes}))
