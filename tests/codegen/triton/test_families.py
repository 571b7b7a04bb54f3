"""Kernels of several families: what a module holds, and what each variant launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsec.codegen.triton.emit import sketch_kernel
from sparsec.codegen.triton.families import DOWN, UP
from sparsec.diagnostics import CompileError
from tests.codegen.triton import build
from tests.codegen.triton.check_experts import silu

TILES = {"block_m": 16, "block_n": 16, "block_k": 32}
MIXED: tuple[dict[str, Any], ...] = (
    {"up_to": 16, "kernel": "swap", "block_m": 16, "block_n": 64, "block_k": 64},
    {"up_to": 64, **TILES},
    {"up_to": None, "kernel": "swap", "block_m": 32, "block_n": 64, "block_k": 64},
)


def test_a_kernel_holds_each_family_once() -> None:
    sketch = sketch_kernel(build.gemm_combine(64, 64, 8, 2, torch.bfloat16, variants=MIXED))
    names = [[entry.name for entry in schedule.entries] for schedule in sketch.schedules]
    added = "gemm_combine_0_combine"
    swapped, tiled = ["gemm_combine_0_swap", added], ["gemm_combine_0_gemm", added]
    assert names == [swapped, tiled, swapped]
    assert [schedule.up_to for schedule in sketch.schedules] == [16, 64, None]
    for name in (*swapped, *tiled):
        assert sketch.source.count(f"def {name}(") == 1
    assert len({schedule.scratch for schedule in sketch.schedules}) == 1


def test_a_family_is_written_for_its_own_variants() -> None:
    """Tiles that divide the columns need no mask, whatever the tiles of other families are."""
    source = sketch_kernel(build.gather_gemm(silu, 64, 48, 8, 2, torch.bfloat16, variants=MIXED)).source
    tiled, swapped = source[source.index("def gather_gemm_0(") :], source[source.index("def gather_gemm_0_swap(") :]
    assert "columns < I" not in tiled and "columns < I" in swapped


def test_tiles_where_no_family_is_named() -> None:
    assert [
        entry.name
        for entry in sketch_kernel(build.gather_gemm(silu, 64, 48, 8, 2, torch.bfloat16)).schedules[0].entries
    ] == ["gather_gemm_0"]


@pytest.mark.parametrize("up", [True, False])
def test_an_unknown_family_is_named_with_those_there_are(up: bool) -> None:
    variants = ({"kernel": "cubes", **TILES},)
    build_it = (
        build.gather_gemm(silu, 64, 48, 8, 2, torch.bfloat16, variants=variants)
        if up
        else build.gemm_combine(64, 48, 8, 2, torch.bfloat16, variants=variants)
    )
    with pytest.raises(CompileError, match="no family of kernels 'cubes'") as caught:
        sketch_kernel(build_it)
    assert all(name in str(caught.value) for name in (UP if up else DOWN))
