"""What `info` tells of a module whose banks are packed."""

from __future__ import annotations

import pytest

from sparsec import pipeline
from sparsec.inspect.accounting import ModelInfo, summarise
from sparsec.inspect.dataflow import Dataflow
from sparsec.inspect.ir_record import record_module
from sparsec.ir.parser import parse_module

TEXT = """
module {phase = "fuse", target = "cpu"}

func @main(%x: tensor<s0x128xbf16> {kind = "input"}, %gate: tensor<8x128xbf16> {kind = "param", source = "gate"},
    %up: tensor<8x64x128xbf16> {kind = "param", source = "up"}, %b: tensor<8x64xbf16> {kind = "param", source = "b"},
    %down: tensor<8x128x32xbf16> {kind = "param", source = "down"}) -> (tensor<s0x128xbf16> {kind = "output"}) {
  %z = aten.linear(%x, %gate) : tensor<s0x8xbf16>
  %y, %i, %w = moe.layer(%x, %z, %up, %down, %b) : tensor<s0x128xbf16>, tensor<s0x2xi64>, tensor<s0x2xbf16> {
    router(%l: tensor<s0x8xbf16>):
      %p = aten.softmax.int(%l) {dim = -1} : tensor<s0x8xbf16>
      %v, %e = aten.topk(%p) {k = 2} : tensor<s0x2xbf16>, tensor<s0x2xi64>
      yield %e, %v
    activation(%a: tensor<rx32xbf16>, %c: tensor<rx32xbf16>):
      %h = aten.mul.Tensor(%a, %c) : tensor<rx32xbf16>
      yield %h
  }
  return %y
}
"""


def told(passes: str, to: str) -> ModelInfo:
    module = parse_module(TEXT)
    if passes:
        pipeline.run_passes(module, passes)
    return summarise("layer", Dataflow(record_module(pipeline.run(module, target="cpu", to=to).module)))


@pytest.mark.parametrize("to", ["schedule", "lower"])
@pytest.mark.parametrize(
    ("weights", "each", "down_inner", "scales"),
    [("model", 2, 32, 0), ("int8", 1, 64, 64 + 128), ("int4", 0.5, 128, 64 + 128)],
)
def test_packed_banks_are_the_models_own_parameters(
    weights: str, each: float, down_inner: int, scales: int, to: str
) -> None:
    """`down_inner`: the 32 rows of a down bank padded to whole tiles, which only its bytes show."""
    plain, packed = told("", "fuse"), told(f"pack-banks{{weights={weights}}}", to)
    assert (packed.total, packed.active, packed.routed) == (plain.total, plain.active, plain.routed)
    gate, bias = 8 * 128 * 2, 8 * 64 * 4
    assert packed.weight_bytes == gate + bias + 8 * (64 * 128 + 128 * down_inner) * each + 8 * scales * 4


def on_gpu(weights: str) -> str:
    """The same before its ops are fused, for a GPU."""
    before = "%y, %i, %w = moe.layer(%x, %z, %up, %down, %b) : tensor<s0x128xbf16>, "
    text = TEXT.replace('phase = "fuse", target = "cpu"', f'phase = "raise", weights = "{weights}"')
    text = text.replace(before, "%i, %w = moe.route(%z) : ").replace("router(", "body(")
    split = "      yield %e, %v\n"
    experts = "  }\n  %y = moe.experts(%x, %i, %w, %up, %down, %b) : tensor<s0x128xbf16> {\n"
    return text.replace(split, split + experts)


@pytest.mark.parametrize("to", ["schedule", "lower"])
@pytest.mark.parametrize(("weights", "stored"), [("fp8", 96 * 128 + 2 * 4), ("mxfp4", 192 * (64 + 4))])
def test_banks_in_blocks_too(weights: str, stored: int, to: str) -> None:
    """mxfp4 fills the 32 rows of the down bank up to 128: 128 columns of 64 bytes with 4 scales."""
    plain = told("", "fuse")
    module = pipeline.run(parse_module(on_gpu(weights)), target="cuda:sm_90", to=to).module
    packed = summarise("layer", Dataflow(record_module(module)))
    assert (packed.total, packed.active, packed.routed) == (plain.total, plain.active, plain.routed)
    assert packed.weight_bytes == 8 * 128 * 2 + 8 * 64 * 2 + 8 * stored
