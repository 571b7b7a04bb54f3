"""Modules that several tests of the IR read."""

from __future__ import annotations

# Every construct of the short form, as the printer writes it.
EVERYTHING = """\
module {phase = "capture", version = 1}

loc "models/small.py":30 in "model"  // def forward(self, ids, x):
func @main(
  %ids: tensor<s0xs1xi64> {kind = "input"},
  %gate: tensor<8x64xf32> {kind = "param", source = "gate.weight"},
  %x: tensor<(s0*s1)x64xf32> {kind = "input"},
  %n: sym<s2>
) -> (tensor<(s0*s1)x2xf32> {kind = "output"}, tensor<1xi1>) {
  loc "models/small.py":34 in "model.gate"  // logits = F.linear(x, self.weight)  # noqa
  %logits = aten.linear(%x, %gate) : tensor<(s0*s1)x8xf32>
  loc "a b/é.py":3 in "m" fused ["b.py":4, 7, "c.py":5 in "\\"\\n"]  // f("//", [x])
  %ids_1, %weights = moe.route(%logits) : tensor<(s0*s1)x2xi64>, tensor<(s0*s1)x2xf32> {
    body(%z: tensor<(s0*s1)x8xf32>):
      %p = aten.softmax.int(%z) {dim = -1} : tensor<(s0*s1)x8xf32>
      loc unknown
      %w, %e = aten.topk(%p) {k = 2} : tensor<(s0*s1)x2xf32>, tensor<(s0*s1)x2xi64>
      yield %e, %w
  }
  %0 = aten.index.Tensor(%weights, [none, %ids_1]) \
{deep = [1, {}, {a = [none, []], "b c" = f32}], size = (s0*2)} : tensor<1xf32>
  %c = aten.cat([%0, %0]) {e = 1.0e-05, big = 1.0e+300, up = inf, down = -inf, half = 0.5, two = 2.0} : tensor<2xc64>
  loc unknown
  %1 = aten.arange() {end = s0, dtype = bf16, pin = false, on = true, \
text = "a\\n\\u0000\\"é\\\\", none = none} : tensor<s0xbf16>
  %u = aten.nonzero(%0) : tensor<u0x1xi64>
  %k.v = aten.item(%0) : sym<u1>
  %2 = aten.full() {size = [(max(s0, u0)), 4, (-u1 + 7//2)], fill = (f32)} : tensor<(max(s0, u0))x4x(-u1 + 7//2)xui8>
  %3 = aten.lt.Scalar(%0) {other = 0} : tensor<1xi1>
  return %weights, %3
}

func @"odd name"(%x: tensor<txf8E4M3FN>) -> () {backend = "torch", tokens = t, variants = [{up_to = 4}, {}]} {
  return
}
"""

# A routed expert layer that verifies and runs: s0 tokens of width 6, 4 experts of width 5.
LAYER = """\
module {phase = "raise"}

func @main(
  %x: tensor<s0x6xf32> {kind = "input"},
  %gate: tensor<4x6xf32> {kind = "param", source = "gate"},
  %up: tensor<4x10x6xf32> {kind = "param", source = "up"},
  %down: tensor<4x6x5xf32> {kind = "param", source = "down"}
) -> (tensor<s0x6xf32> {kind = "output"}) {
  loc "small.py":8 in "mlp"  // logits = F.linear(x, self.gate)
  %logits = aten.linear(%x, %gate) : tensor<s0x4xf32>
  loc "small.py":9 in "mlp"  // weights, ids = logits.softmax(-1).topk(2)
  %ids, %weights = moe.route(%logits) : tensor<s0x2xi64>, tensor<s0x2xf32> {
    body(%z: tensor<s0x4xf32>):
      %p = aten.softmax.int(%z) {dim = -1} : tensor<s0x4xf32>
      %w, %e = aten.topk(%p) {k = 2} : tensor<s0x2xf32>, tensor<s0x2xi64>
      yield %e, %w
  }
  loc "small.py":10 in "mlp.experts"  // return self.experts(x, ids, weights)
  %y = moe.experts(%x, %ids, %weights, %up, %down) : tensor<s0x6xf32> {
    activation(%a: tensor<rx5xf32>, %b: tensor<rx5xf32>):
      %g = aten.silu(%a) : tensor<rx5xf32>
      %m = aten.mul.Tensor(%g, %b) : tensor<rx5xf32>
      yield %m
  }
  return %y
}
"""
