"""What can be proven of GPU kernels without a GPU: they fit, spill nothing, use the instructions they are for, and move
and multiply what the cost model counts."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from sparsec.codegen.triton.compile import TARGETS, Binary
from sparsec.codegen.triton.emit import TritonKernel, emit_kernel
from sparsec.ir.core import Func
from sparsec.ir.types import DType
from sparsec.passes.chips import CHIPS
from sparsec.passes.cost import FAMILIES, obstacle, ranges, ranked
from sparsec.passes.roofline import work
from sparsec.passes.schedule import gemm_of, gpu_variants
from sparsec.passes.variants import Gemm, Variant
from tests.codegen.triton import build
from tests.codegen.triton.hopper import serialised, under_way
from tests.codegen.triton.packed import packed
from tests.codegen.triton.ttir import account
from tests.passes.published import DEEPSEEK_V3, GPT_OSS, MIXTRAL, OLMOE, QWEN3, Shape

pytest.importorskip("triton")
SMALL = Shape(8, 2, 512, 256)
UNEVEN = Shape(8, 4, 320, 200)  # nothing is a multiple of a tile
TORCH = {DType.bf16: torch.bfloat16, DType.f16: torch.float16, DType.f32: torch.float32}


def silu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(a) * b


@dataclass(frozen=True)
class Case:
    """A GEMM of a layer of some shape."""

    shape: Shape
    half: str
    dtype: DType = DType.bf16
    transposed: bool = False
    layout: str = "concat"
    packing: str = "plain"
    activations: str = "model"

    def func(self, variants: Sequence[Any] = ()) -> Func:
        s, dtype = self.shape, TORCH[self.dtype]
        if self.half == "up":
            up = (s.hidden, s.width, s.experts, s.k, dtype, self.layout, False, self.transposed)
            made = build.gather_gemm(silu, *up, variants=variants, listed=True)
        else:
            down = (s.hidden, s.width, s.experts, s.k, dtype, False, self.transposed)
            made = build.gemm_combine(*down, variants=variants, listed=True)
        return made if self.packing == "plain" else packed(made, self.packing, self.activations)

    def gemm(self) -> Gemm:
        return gemm_of(self.func().body.ops[0])  # type: ignore[arg-type]

    def place(self, variant: Variant) -> int:
        """Which launch the GEMM is: rows are rounded and brought into order before."""
        return (variant.kernel == "gathered") + (self.activations != "model")

    def scheduled(self, target: str) -> TritonKernel:
        """Compiled with the variants that the schedule chooses."""
        return emit_kernel(self.func(gpu_variants(self.func().body.ops[0], CHIPS[target])), target)

    def compiled(self, variant: Variant, target: str) -> Binary:
        """The GEMM's binary of one variant."""
        kernel = emit_kernel(self.func([_config(variant, 16), _config(replace(TILES, block_k=64))]), target)
        launch = kernel.variants[0].config["launches"][self.place(variant)]
        return kernel.binaries[launch["file"]]


TILES = Variant("tiles", 64, 64, 64, 4, 3)
"""Takes any number of tokens."""


def _config(variant: Variant, up_to: int | None = None) -> dict[str, Any]:
    sizes = {name: getattr(variant, name) for name in Variant.__dataclass_fields__}
    return {**({} if up_to is None else {"up_to": up_to}), **sizes}


def check_scheduled(case: Case, target: str) -> set[str]:
    """Compile what the schedule chooses and look at every launch. Returns: the families that were chosen."""
    kernel, on, gemm = case.scheduled(target), CHIPS[target], case.gemm()
    for variant in kernel.variants:
        choice = dict(variant.config["choice"])
        choice = {name: choice[name] for name in Variant.__dataclass_fields__}
        chosen = Variant(**choice)
        for i, launch in enumerate(variant.config["launches"]):
            binary = kernel.binaries[launch["file"]]
            where = f"{case} on {target}, {chosen}, {launch['symbol']}"
            assert binary.spills == 0, where
            assert binary.shared <= TARGETS[target].shared_limit == on.shared, where
            assert binary.registers is not None and binary.registers <= (512 if on.lanes == 64 else 255), where
            if i == case.place(chosen):
                check_instructions(binary, chosen, gemm, target, where)
                assert launch["num_stages"] == chosen.num_stages, f"{where}: its stages do not fit"
                assert binary.shared <= chosen.shared(gemm, on), where
    return {variant.config["choice"]["kernel"] for variant in kernel.variants}


def check_instructions(binary: Binary, variant: Variant, gemm: Gemm, target: str, where: str) -> None:
    """The matrix instruction and the copy engine where they are due."""
    text, direct = binary.assembly, variant.direct(gemm, CHIPS[target])
    if target == "cuda:sm_90":
        assert ("wgmma.mma_async" in text) == (direct and variant.kernel != "rows"), where
        # 16 terms of a row are added at a time, in ascending order, whatever the family and its tile.
        assert {*re.findall(r"wgmma\.mma_async\S*\.m64n\d+k(\d+)\.", text)} <= {"16"}, where
        check_overlap(binary, variant, gemm, where)
    if target == "cuda:sm_100":
        assert ("tcgen05.mma" in text) == (direct and variant.kernel != "rows"), where
    if target.startswith("cuda"):
        by_engine = account(binary.ttir).engine
        bank = "up" if gemm.half == "up" else "down"
        engines = {"tma": {bank}, "swap": {bank}, "persistent": {bank, "h"}, "gathered": {bank, "gathered"}}
        due = engines.get(variant.kernel, set[str]())
        assert by_engine == due and ("cp.async.bulk.tensor" in text) == bool(due), where


def check_overlap(binary: Binary, variant: Variant, gemm: Gemm, where: str) -> None:
    """While a product is made the next one is asked for, and copies of later stages are on their way."""
    products, copies = under_way(binary)
    assert not serialised(binary), where
    if gemm.inner <= variant.block_k * variant.split:  # one step, no loop
        return
    # Where weights go back to shared memory, or sums of fp8 are scaled, each product is waited for.
    ahead = gemm.packing == "plain" or (gemm.packing == "mxfp4" and variant.widens(gemm))
    if variant.direct(gemm, CHIPS["cuda:sm_90"]) and variant.kernel != "rows" and ahead:
        assert products >= 1, where
    if not variant.stays:  # there the copy engine brings both operands
        assert copies >= variant.num_stages - 2, where


CHOSEN = [Case(QWEN3, "up"), Case(QWEN3, "down")]


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.half)
def test_what_is_chosen_for_hopper_is_built_as_it_was_meant(case: Case) -> None:
    families = check_scheduled(case, "cuda:sm_90")
    assert "swap" in families and families & {"tma", "persistent"}


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["fp8", "mxfp4"])
@pytest.mark.parametrize("target", ["cuda:sm_90", "cuda:sm_100"])
@pytest.mark.parametrize("shape", [QWEN3, GPT_OSS, DEEPSEEK_V3], ids=str)
def test_what_is_chosen_for_packed_weights_is_too(shape: Shape, target: str, packing: str) -> None:
    families = set[str]()
    for half in ("up", "down"):
        families |= check_scheduled(Case(shape, half, packing=packing), target)
    assert "swap" in families


@pytest.mark.slow
@pytest.mark.parametrize("target", sorted(CHIPS))
@pytest.mark.parametrize("shape", [MIXTRAL, QWEN3, OLMOE, GPT_OSS, DEEPSEEK_V3, UNEVEN], ids=str)
def test_what_is_chosen_is_built_as_it_was_meant(shape: Shape, target: str) -> None:
    for half in ("up", "down"):
        check_scheduled(Case(shape, half), target)
    check_scheduled(Case(shape, "up", transposed=True, layout="interleaved"), target)
    check_scheduled(Case(shape, "down", transposed=True), target)


VARIANTS = [
    ("up", Variant("tiles", 16, 64, 128, 4, 3)),
    ("down", Variant("tiles", 128, 128, 64, 8, 3)),
    ("up", Variant("swap", 32, 64, 64, 4, 4)),
    ("down", Variant("swap", 16, 64, 128, 4, 3)),
    ("up", Variant("tma", 128, 64, 64, 4, 4)),
    ("down", Variant("persistent", 128, 128, 64, 8, 4)),
    ("up", Variant("gathered", 128, 64, 64, 8, 3)),
    ("up", Variant("rows", 2, 8, 128, 4, 4)),
    ("down", Variant("rows", 1, 8, 128, 4, 4)),
]
NARROW = [
    ("up", Variant("fp8", 64, 64, 128, 4, 3)),
    ("down", Variant("fp8", 128, 128, 128, 8, 4)),
    ("up", Variant("tiles", 64, 64, 128, 4, 3)),
    ("down", Variant("rows", 1, 32, 128, 4, 4)),
]
PACKED = [
    ("up", Variant("tiles", 16, 64, 128, 4, 3)),
    ("down", Variant("tiles", 128, 64, 128, 8, 3)),
    ("up", Variant("swap", 32, 64, 128, 4, 4)),
    ("down", Variant("swap", 128, 128, 128, 8, 3)),
    ("up", Variant("rows", 2, 32, 128, 4, 4)),
    ("down", Variant("rows", 1, 32, 128, 4, 4)),
]


@pytest.mark.parametrize("packing", ["fp8", "mxfp4"])
@pytest.mark.parametrize(("half", "variant"), PACKED, ids=str)
def test_a_program_on_packed_weights_does_too(half: str, variant: Variant, packing: str) -> None:
    check_account(Case(SMALL, half, packing=packing), variant)


@pytest.mark.parametrize(("half", "variant"), NARROW, ids=str)
def test_a_program_on_rounded_rows_does_too(half: str, variant: Variant) -> None:
    check_account(Case(SMALL, half, packing="fp8", activations="fp8"), variant)


@pytest.mark.parametrize(("half", "variant"), VARIANTS, ids=str)
def test_a_program_moves_and_multiplies_what_the_model_counts(half: str, variant: Variant) -> None:
    check_account(Case(SMALL, half), variant)


@pytest.mark.parametrize("half", ["up", "down"])
def test_padding_is_counted(half: str) -> None:
    check_account(Case(UNEVEN, half), Variant("tiles", 16, 64, 128, 4, 3))


def test_every_family_is_accounted_for() -> None:
    assert {variant.kernel for _, variant in (*VARIANTS, *NARROW)} == set(FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize(("half", "variant"), VARIANTS, ids=str)
def test_programs_of_other_layers_too(half: str, variant: Variant) -> None:
    cases = [Case(QWEN3, half), Case(GPT_OSS, half, DType.f16), Case(UNEVEN, half), Case(SMALL, half, DType.f32)]
    cases += [Case(SMALL, half, transposed=True), Case(QWEN3, half, transposed=True, layout="interleaved")]
    compared = 0
    for case in cases:
        gemm = case.gemm()
        whole = variant.kernel in ("tiles", "rows") or gemm.inner % variant.block_k == 0
        if whole and not obstacle(variant.kernel, gemm, CHIPS["cuda:sm_90"]):
            check_account(case, variant)
            compared += 1
    assert compared >= 3


def check_account(case: Case, variant: Variant) -> None:
    """Compare Triton's IR with `roofline.work`."""
    gemm = case.gemm()
    found, done = account(case.compiled(variant, "cuda:sm_90").ttir), work(gemm, variant, 16)
    bank, rows, out = ("up", "x", "h") if gemm.half == "up" else ("down", "h", "partial")
    out = "y" if variant.kernel == "rows" and gemm.half == "down" else out
    rows = "gathered" if variant.kernel == "gathered" else rows
    assert found.flops == done.flops
    scales = found.loads[f"{bank}_scale"]
    loaded = found.loads[bank] + found.loads[rows] + (0 if gemm.packing == "fp8" else scales)
    loaded += found.loads[f"{rows}_scale"] * done.steps // (done.steps + 1)
    if variant.kernel == "rows":  # they are asked for one step ahead; what the last one asks for is masked
        loaded -= found.loads[rows] // (done.steps + 1)
    if gemm.packing == "fp8":  # a tile reads the whole scale of its block, of which the model counts a share
        assert loaded == pytest.approx(done.loads, rel=1e-3) and 0 < scales <= 4 * gemm.slots * 2 * (done.steps + 1)
    else:
        assert loaded == done.loads
    assert found.stores == {out: done.stores}
    rest = {name: size for name, size in found.loads.items() if not name.startswith((bank, rows))}
    assert rest.keys() <= {"order", "offsets", "tiles", "weights"} and sum(rest.values()) < 8192
    # One block of rows over all columns reads an expert's weights once.
    if gemm.columns % variant.block_n == 0 and gemm.inner % (variant.block_k * variant.split) == 0:
        experts = gemm.k if variant.kernel == "rows" and gemm.half == "down" else 1
        blocks = gemm.columns // variant.block_n * variant.split
        assert found.loads[bank] * blocks == pytest.approx(experts * gemm.weights, rel=0.07 if scales else 0)


@pytest.mark.parametrize("tokens", [1, 5, 64, 1000, 8192])
@pytest.mark.parametrize("shape", [MIXTRAL, QWEN3], ids=str)
def test_the_number_of_programs_is_that_of_uniform_routing(shape: Shape, tokens: int) -> None:
    """Blocks of rows of random routings, counted, against the model's expectation."""
    drawn, experts = random.Random(0), range(shape.experts)
    for rows in (16, 128):
        total, rounds = 0, max(3, 400 // tokens)
        for _ in range(rounds):
            counts = [0] * shape.experts
            for _ in range(tokens):
                for expert in drawn.sample(experts, shape.k):
                    counts[expert] += 1
            total += sum(-(-count // rows) for count in counts)
        expected = work(shape.layer()[0], Variant("tma", rows, shape.width, 64, 4, 3), tokens).programs
        assert expected == pytest.approx(total / rounds, rel=0.05)


def test_ranges_of_tokens_have_programs_for_all_of_them() -> None:
    """The variant of every number of tokens may see as many: `rows` looks through a bounded number of pairs."""
    for shape in (MIXTRAL, QWEN3, UNEVEN):
        for gemm in shape.layer():
            for range_ in ranges(gemm, CHIPS["cuda:sm_90"], frozenset(_orders(gemm))):
                assert range_.chosen.variant.kernel != "rows" or (range_.up_to or 1 << 30) * shape.k <= 1024


def _orders(gemm: Gemm) -> set[str]:
    on = CHIPS["cuda:sm_90"]
    return {c.variant.order(gemm, on) for tokens in (1, 4096) for c in ranked(gemm, tokens, on)}
