"""The cost model against published measurements, and the variants that come of it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from sparsec import pipeline
from sparsec.diagnostics import CompileError
from sparsec.ir.parser import parse_module
from sparsec.ir.types import DType
from sparsec.passes.chips import CHIPS, chip
from sparsec.passes.cost import Gemm, Tile, best, candidates, predict

H100 = CHIPS["cuda:sm_90"]


def layer(experts: int, k: int, hidden: int, width: int, dtype: DType = DType.bf16) -> tuple[Gemm, Gemm]:
    """Both GEMMs of a gated layer."""
    up = Gemm(experts, k, hidden, width, 2, dtype, dtype.itemsize * width)
    return up, Gemm(experts, k, width, hidden, 1, dtype, 8 * hidden + dtype.itemsize * width)


# Whole expert layers in bf16 on one H100: Liger-Kernel PR 1294 and vLLM PR 24700 (two-way split of Mixtral).
@pytest.mark.parametrize(
    ("shape", "tokens", "measured_us"),
    [
        ((128, 8, 2048, 768), 128, 440),
        ((128, 8, 2048, 768), 1024, 501),
        ((128, 8, 2048, 768), 8192, 1398),
        ((128, 8, 2048, 768), 32768, 5170),
        ((8, 2, 4096, 7168), 1, 144),
        ((8, 2, 4096, 7168), 64, 483),
        ((8, 2, 4096, 7168), 1024, 834),
    ],
)
def test_predictions_are_near_good_kernels(shape: tuple[int, int, int, int], tokens: int, measured_us: float) -> None:
    predicted = sum(best(gemm, tokens, H100)[1].us for gemm in layer(*shape))
    assert 0.8 < predicted / measured_us < 1.1


def test_few_tokens_stream_weights_and_many_compute() -> None:
    up, down = layer(8, 2, 4096, 14336)
    few, many = best(up, 16, H100), best(down, 1024, H100)
    assert few[0].block_m == 16 and few[1].limiter == "memory"
    assert many[0].block_m == 128 and many[1].limiter == "compute"
    assert few[1].hit == pytest.approx(8 * (1 - 0.75**16))
    assert few[1].waste > 1 > best(up, 4096, H100)[1].waste


@pytest.mark.parametrize("target", sorted(CHIPS))
@pytest.mark.parametrize("dtype", [DType.bf16, DType.f32])
def test_what_is_chosen_fits_the_chip(target: str, dtype: DType) -> None:
    on = chip(target)
    for gemm in layer(64, 8, 2048, 1000, dtype):
        for tokens in (1, 100, 10000):
            tile, made = best(gemm, tokens, on)
            assert tile.shared(gemm) <= on.shared
            assert tile.block_m * tile.block_n * gemm.parts / (tile.num_warps * on.lanes) <= 192  # registers
            assert made.us > 0


def test_a_tile_too_large_is_refused() -> None:
    up, _ = layer(8, 2, 4096, 14336)
    assert predict(up, Tile(128, 256, 128, 4, 5), 64, H100) is None
    assert any(predict(up, tile, 64, H100) is None for tile in candidates(H100))


def test_an_unknown_chip_is_an_error() -> None:
    with pytest.raises(CompileError, match=r"no target 'cuda:sm_75' \(there are: cpu, cuda:sm_80"):
        chip("cuda:sm_75")


TEXT = """
module {phase = "place"}

func @main(%x: tensor<s0x2048xbf16> {kind = "input"}, %i: tensor<s0x8xi64> {kind = "input"}, %w: tensor<s0x8xf32> {kind = "input"}, %up: tensor<128x1536x2048xbf16> {kind = "param", source = "up"}, %down: tensor<128x2048x768xbf16> {kind = "param", source = "down"}) -> (tensor<s0x2048xbf16> {kind = "output"}) {
  %o, %f = moe.group(%i) {num_experts = 128} : tensor<(8*s0)xi32>, tensor<129xi32>
  %h = moe.gather_gemm(%x, %o, %f, %up) {k = 8} : tensor<(8*s0)x768xbf16> {
    activation(%a: tensor<rx768xbf16>, %b: tensor<rx768xbf16>):
      %m = aten.mul.Tensor(%a, %b) : tensor<rx768xbf16>
      yield %m
  }
  %y = moe.gemm_combine(%h, %o, %f, %w, %down) : tensor<s0x2048xbf16>
  return %y
}
"""  # noqa: E501


@pytest.mark.parametrize("target", ["cpu", *sorted(CHIPS)])
def test_variants_cover_every_token_count_in_order(target: str) -> None:
    module = pipeline.run(parse_module(TEXT), target=target, to="schedule").module
    for op in module.main.body.ops[:-1]:
        given: Any = op.attrs.get("variants", ())
        variants = [dict(variant) for variant in given]
        if target == "cpu":
            assert not variants, "kernels for CPUs choose by themselves"
            continue
        assert "up_to" not in variants[-1]
        assert all(a["up_to"] < b["up_to"] for a, b in pairwise(variants[:-1]))
        if op.name == "moe.group":
            assert all({"block_rows", "num_warps"} <= variant.keys() for variant in variants)
        else:
            rows = [variant["block_m"] for variant in variants]
            assert rows == sorted(rows) and rows[0] == 16 and rows[-1] >= 64
            assert all(
                variant["predicted_us"] > 0 and variant["limiter"] in ("memory", "compute") for variant in variants
            )


def test_scheduling_twice_changes_nothing() -> None:
    result = pipeline.run_passes(parse_module(TEXT), "schedule,schedule", target="cuda:sm_90")
    assert [record.changed for record in result.records] == [True, False]
