"""The pass `schedule`: variants for every number of tokens, on every target."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from sparsec import pipeline
from sparsec.ir.parser import parse_module
from sparsec.passes.chips import CHIPS
from sparsec.passes.cost import FAMILIES

TEXT = """
module {phase = "fuse"}

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
            assert rows[0] <= 32 and rows[-1] >= 64
            assert all(variant["kernel"] in FAMILIES and variant["predicted_us"] > 0 for variant in variants)
            assert all(variant["limiter"] in ("memory", "compute", "cache", "latency") for variant in variants)


def test_scheduling_twice_changes_nothing() -> None:
    result = pipeline.run_passes(parse_module(TEXT), "schedule,schedule", target="cuda:sm_90")
    assert [record.changed for record in result.records] == [True, False]


def test_one_order_of_adding_where_it_is_asked_for() -> None:
    """By itself the down-projection takes another family for a few tokens, which saves a launch."""
    families = list[set[str]]()
    for attrs in ("", ", invariant = true"):
        module = parse_module(TEXT.replace('phase = "fuse"', f'phase = "fuse"{attrs}'))
        given: Any = pipeline.run(module, target="cuda:sm_90", to="schedule").module.main.body.ops[2].attrs["variants"]
        families.append({variant["kernel"] for variant in given})
    assert "rows" in families[0] and "rows" not in families[1]
