"""Launches that may start early wait for those in front of them before they write, leave, or let the next one start."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from sparsec import pipeline
from sparsec.codegen.emit import emit
from sparsec.codegen.triton import families
from sparsec.codegen.triton.early import may_start
from sparsec.codegen.triton.emit import TritonKernel, emit_kernel, sketch_kernel
from sparsec.ir.core import Func
from sparsec.ir.parser import parse_module
from sparsec.ir.printer import print_module
from tests.codegen.triton import build, small
from tests.codegen.triton.packed import packed
from tests.codegen.triton.routers import ROUTERS

pytest.importorskip("triton")
TILE: dict[str, Any] = {"block_m": 64, "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 2}
LEAVES = re.compile(
    r"\b(st\.global|red\.|atom\.|ret;|exit;|griddepcontrol\.launch_dependents|cp\.async\.bulk\.tensor\S*\.global\.shared)"
)
READS = re.compile(r"\b(tl\.load|tl\.store|tl\.atomic_\w+|listed_tile|find_tile|owner)\(")


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
        made = build.gather_gemm(silu, 64, 64, 4, 2, torch.bfloat16, variants=variants, listed=True)
    else:
        made = build.gemm_combine(64, 64, 4, 2, torch.bfloat16, variants=variants, listed=True)
    return packed(made, "fp8", "fp8") if family == "fp8" else made


NAMES = ["route", *(f"up {name}" for name in families.UP), *(f"down {name}" for name in families.DOWN)]
QUICK = ("route", "down rows", "down persistent")


def launches(made: TritonKernel) -> list[tuple[dict[str, Any], str]]:
    found = [launch for variant in made.variants for launch in variant.config["launches"]]
    return [(launch, made.binaries[launch["file"]].assembly) for launch in found]


@pytest.mark.parametrize("name", NAMES)
def test_every_launch_can_start_early(name: str) -> None:
    """What it reads until then is older than the launch in front: never rows of h, and for others nothing."""
    sketch = sketch_kernel(build_one(name))
    for entry in (entry for schedule in sketch.schedules for entry in schedule.entries):
        body = sketch.source[sketch.source.index(f"def {entry.name}(") :].split("@triton.jit")[0]
        assert "PDL" in entry.constants and body.count("arrive(PDL)") == 1, entry.name
        ahead = re.sub(r'""".*?"""', "", body[body.index("):\n") : body.index("arrive(PDL)")], flags=re.S)
        if re.match(r"gemm_combine_0_(?!combine)|gather_gemm_0_gathered", entry.name):
            assert not re.search(r"\b(h|partial|y|tl\.store|tl\.atomic_\w+)\b", ahead), entry.name
        else:
            assert not READS.search(ahead), entry.name


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
        if not re.fullmatch(
            r"gemm_combine_0_(gemm|swap|tma|rows|persistent|fp8)|gather_gemm_0_gathered", launch["symbol"]
        ):
            assert "ld.global" not in ahead, launch["symbol"]


@pytest.mark.parametrize("target", ["cuda:sm_80", "hip:gfx942"])
def test_other_chips_launch_one_after_the_other(target: str) -> None:
    func = build.gemm_combine(64, 64, 4, 2, torch.bfloat16, variants=(TILE,))
    for launch, text in launches(emit_kernel(func, target)):
        assert launch["pdl"] is False
        assert "griddepcontrol" not in text


ALONE = """
module {phase = "fuse"}

func @main(%h: tensor<(2*s0)x64xbf16> {kind = "input"}, %ids: tensor<s0x2xi64> {kind = "input"}, %w: tensor<s0x2xbf16> {kind = "input"}, %down: tensor<8x64x64xbf16> {kind = "param", source = "down"}) -> (tensor<s0x64xbf16> {kind = "output"}) {
  %order, %offsets, %tiles = moe.group(%ids) {num_experts = 8, listed = true} : tensor<(2*s0)xi32>, tensor<9xi32>, tensor<4x(2*s0//16+10)x4xi32>
  BETWEEN
  %y = moe.gemm_combine(%r, %order, %offsets, %w, %down, none, none, %tiles) : tensor<s0x64xbf16>
  return %y
}
"""  # noqa: E501
UP = """%r = moe.gather_gemm(%w2, %order, %offsets, %down) {k = 2, layout = "single"} : tensor<(2*s0)x64xbf16> {
    activation(%a: tensor<rx64xbf16>):
      %g = aten.relu(%a) : tensor<rx64xbf16>
      yield %g
  }"""
BETWEEN = {
    "nothing": ("", False),
    "a view": ("%r = aten.reshape(%h) {shape = [(2*s0), 64]} : tensor<(2*s0)x64xbf16>", False),
    "a kernel": ("%w2 = aten.slice.Tensor(%h) {end = s0} : tensor<s0x64xbf16>\n  " + UP, True),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_a_launch_behind_the_sort_waits_for_it(between: str) -> None:
    """The down-projection looks up its tile early only where another kernel of ours is launched after the sort."""
    text, early = BETWEEN[between]
    text = ALONE.replace("BETWEEN", text) if text else ALONE.replace("BETWEEN", "").replace("%r,", "%h,")
    module = pipeline.run(parse_module(text), target="cuda:sm_90").module
    func = module.funcs["gemm_combine_0"]
    assert may_start(func, module.main) is early
    func.body.ops[0].attrs["variants"] = ({**TILE, "kernel": "persistent"},)
    emitted = emit(module, "cuda:sm_90")
    (variant,) = emitted.plan.kernels["gemm_combine_0"].variants
    first, second = variant.config["launches"]
    assert (first["pdl"], second["pdl"]) == (early, True)
    name = first["file"].removesuffix("cubin") + "ptx"
    assert ("griddepcontrol.wait" in emitted.texts[name].decode()) is early


def test_rows_are_rounded_between_the_sort_and_what_looks_up_its_tile() -> None:
    text = ALONE.replace("BETWEEN", "").replace("%r,", "%h,").replace("%down, none, none,", "%down, none, %scale,")
    packed_bank = (
        'f8E4M3FN> {kind = "param", source = "down"}, %scale: tensor<8x1x1xf32> {kind = "param", source = "s"}'
    )
    text = text.replace('bf16> {kind = "param", source = "down"}', packed_bank)
    text = text.replace("%tiles) :", '%tiles) {packing = "fp8", activations = "fp8"} :')
    module = pipeline.run(parse_module(text), target="cuda:sm_90").module
    func = module.funcs["gemm_combine_0"]
    assert may_start(func, module.main)
    for schedule in sketch_kernel(func).schedules:
        rounds, *rest = schedule.entries
        assert rounds.name in ("gemm_combine_0_round", "gemm_combine_0_narrow") and rest


def test_launches_of_a_layer_all_start_early() -> None:
    kernels = small.emitted("cuda:sm_90").plan.kernels.values()
    launches = [launch for kernel in kernels for variant in kernel.variants for launch in variant.config["launches"]]
    assert {launch["pdl"] for launch in launches} == {True}


def test_one_bad_place_is_enough() -> None:
    """Layers share a kernel: it waits if any of them launches it right behind the sort."""
    module = small.lowered("cuda:sm_90")
    copy = parse_module(print_module(module))
    launch = next(op for op in copy.main.body.ops if op.attrs.get("callee") == "gemm_combine_0")
    func = copy.funcs["gemm_combine_0"]
    assert may_start(func, copy.main)
    rows, *rest = launch.operands
    assert rows.op is not None and rows.op.attrs["callee"] == "gather_gemm_0"
    launch.operands = (copy.main.body.args[0], *rest)  # rows that no kernel of ours has written
    assert not may_start(func, copy.main)
