"""Launches that may start early wait for those in front of them before they write, leave, or let the next one start."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from sparsec.codegen.triton import families
from sparsec.codegen.triton.emit import TritonKernel, emit_kernel, sketch_kernel
from sparsec.ir.core import Func
from tests.codegen.triton import build
from tests.codegen.triton.routers import ROUTERS

pytest.importorskip("triton")
TILE: dict[str, Any] = {"block_m": 64, "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 2}
LEAVES = re.compile(
    r"\b(st\.global|red\.|atom\.|ret;|exit;|griddepcontrol\.launch_dependents|cp\.async\.bulk\.tensor\S*\.global\.shared)"
)
EARLY_READS = {"moe.gemm_combine"}  # they look up their tile, which is older than the launch in front


def silu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(a) * b


def router(block_rows: int) -> Func:
    chosen = ROUTERS["olmoe"]
    variants = ({"block_rows": block_rows, "num_warps": 4},)
    return build.route_group(chosen, torch.randn(5, chosen.experts), *map(torch.rand, chosen.params), variants=variants)


def build_one(name: str) -> Func:
    """A kernel by op and family: its first variant is of the family."""
    op, _, family = name.partition(" ")
    variants = ({**TILE, "up_to": 4, "kernel": family}, TILE)
    if op == "route":
        return router(8)
    if op == "up":
        return build.gather_gemm(silu, 64, 64, 4, 2, torch.bfloat16, variants=variants, listed=True)
    return build.gemm_combine(64, 64, 4, 2, torch.bfloat16, variants=variants, listed=True)


NAMES = ["route", *(f"up {name}" for name in families.UP), *(f"down {name}" for name in families.DOWN)]
QUICK = ("route", "down rows", "down persistent")


def launches(made: TritonKernel) -> list[tuple[dict[str, Any], str]]:
    found = [launch for variant in made.variants for launch in variant.config["launches"]]
    return [(launch, made.binaries[launch["file"]].assembly) for launch in found]


@pytest.mark.parametrize("name", NAMES)
def test_every_launch_can_start_early(name: str) -> None:
    sketch = sketch_kernel(build_one(name))
    for entry in (entry for schedule in sketch.schedules for entry in schedule.entries):
        body = sketch.source[sketch.source.index(f"def {entry.name}(") :].split("@triton.jit")[0]
        assert "PDL" in entry.constants and body.count("arrive(PDL)") == 1, entry.name


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in NAMES]
)
def test_every_launch_waits_first(name: str) -> None:
    func = build_one(name)
    for launch, text in launches(emit_kernel(func, "cuda:sm_90")):
        assert launch["pdl"], launch["symbol"]
        body = text[text.index(".visible .entry") :]
        wait = body.index("griddepcontrol.wait")
        assert body.count("griddepcontrol.wait") == 1
        assert body.index("griddepcontrol.launch_dependents") > wait
        ahead = body[:wait]
        assert not LEAVES.search(ahead) and "cp.async" not in ahead, launch["symbol"]
        # They look up their rows or tiles, which were sorted before the launch in front.
        if not re.fullmatch(r"gemm_combine_0_(gemm|swap|tma|rows|persistent)|gather_gemm_0_gathered", launch["symbol"]):
            assert "ld.global" not in ahead, launch["symbol"]


@pytest.mark.parametrize("target", ["cuda:sm_80", "hip:gfx942"])
def test_other_chips_launch_one_after_the_other(target: str) -> None:
    func = build.gemm_combine(64, 64, 4, 2, torch.bfloat16, variants=(TILE,))
    for launch, text in launches(emit_kernel(func, target)):
        assert launch["pdl"] is False
        assert "griddepcontrol" not in text
