"""The references of the moe ops against loops over tokens and slots."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsec.dialects.moe import group_reference
from sparsec.ir.core import Module
from sparsec.ir.interp import evaluate_module
from sparsec.ir.parser import parse_module
from sparsec.ir.verify import verify_module

torch.set_num_threads(1)
GATES = {"silu": torch.nn.functional.silu, "relu": torch.relu}
FLAGS: tuple[str, ...] = ("up_transposed", "down_transposed", "up_bias", "down_bias")
LAYOUTS = st.sampled_from(["concat", "interleaved", "single"])


def bank(layout: str, gate: str, e: int, h: int, i: int, k: int, flags: dict[str, bool], dtype: str = "f32") -> Module:
    """A module of one moe.experts op; `flags`: up_transposed, down_transposed, up_bias, down_bias."""
    columns = i if layout == "single" else 2 * i
    up = (e, h, columns) if flags["up_transposed"] else (e, columns, h)
    down = (e, i, h) if flags["down_transposed"] else (e, h, i)
    args: dict[str, tuple[str | int, ...]] = {
        "x": ("s0", h),
        "ids": ("s0", k),
        "weights": ("s0", k),
        "up": up,
        "down": down,
    }
    used = "%x, %ids, %weights, %up, %down"
    if flags["up_bias"]:
        args["up_bias"] = (e, columns)
    if flags["down_bias"]:
        args["down_bias"] = (e, h)
    if flags["up_bias"] or flags["down_bias"]:
        used += ", %up_bias" if flags["up_bias"] else ", none"
        used += ", %down_bias" if flags["down_bias"] else ""
    types = {"ids": "i64", "weights": "f32"}
    head = ", ".join(f"%{n}: tensor<{'x'.join(map(str, s))}x{types.get(n, dtype)}>" for n, s in args.items())
    row = f"tensor<rx{i}x{dtype}>"
    parts = [f"%a: {row}"] if layout == "single" else [f"%a: {row}", f"%b: {row}"]
    multiply = "" if layout == "single" else f"%p = aten.mul.Tensor(%g, %b) : {row}"
    attrs = f'layout = "{layout}", up_transposed = {str(flags["up_transposed"]).lower()}'
    attrs += f", down_transposed = {str(flags['down_transposed']).lower()}"
    module = parse_module(f"""
func @main({head}) -> (tensor<s0x{h}x{dtype}>) {{
  %y = moe.experts({used}) {{{attrs}}} : tensor<s0x{h}x{dtype}> {{
    activation({", ".join(parts)}):
      %g = aten.{gate}(%a) : {row}
      {multiply}
      yield {"%g" if layout == "single" else "%p"}
  }}
  return %y
}}""")
    verify_module(module)
    return module


def by_token(
    layout: str, gate: str, flags: dict[str, bool], x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor,
    up_bias: Tensor | None, down_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """One token and one slot at a time, in f64."""
    out = torch.zeros(x.shape[0], x.shape[1], dtype=torch.float64)
    for t in range(x.shape[0]):
        for slot in range(ids.shape[1]):
            e = int(ids[t, slot])
            if not 0 <= e < up.shape[0]:
                continue
            w_up = up[e].double().T if flags["up_transposed"] else up[e].double()
            w_down = down[e].double().T if flags["down_transposed"] else down[e].double()
            a = w_up @ x[t].double() + (0 if up_bias is None else up_bias[e].double())
            if layout == "single":
                a = GATES[gate](a)
            elif layout == "concat":
                a = GATES[gate](a[: len(a) // 2]) * a[len(a) // 2 :]
            else:
                a = GATES[gate](a[::2]) * a[1::2]
            y = w_down @ a + (0 if down_bias is None else down_bias[e].double())
            out[t] += float(weights[t, slot]) * y
    return out


@settings(max_examples=60, deadline=None)
@given(
    layout=LAYOUTS,
    gate=st.sampled_from(sorted(GATES)),
    sizes=st.tuples(st.integers(0, 9), st.integers(1, 5), st.integers(1, 6), st.integers(1, 5), st.integers(1, 3)),
    flags=st.fixed_dictionaries(dict.fromkeys(FLAGS, st.booleans())),
    seed=st.integers(0, 2**16),
)
def test_experts_equal_a_loop_over_tokens(
    layout: str, gate: str, sizes: tuple[int, ...], flags: dict[str, bool], seed: int
) -> None:
    tokens, e, h, i, k = sizes
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make)

    columns = i if layout == "single" else 2 * i
    up = normal(e, h, columns) if flags["up_transposed"] else normal(e, columns, h)
    down = normal(e, i, h) if flags["down_transposed"] else normal(e, h, i)
    ids = torch.randint(-1, e + 2, (tokens, k), generator=make)  # some to skip: -1, e, e + 1
    weights = normal(tokens, k)
    weights[(ids < 0) | (ids >= e)] = float("nan")  # what is skipped may hold anything
    x = normal(tokens, h)
    up_bias = normal(e, columns) if flags["up_bias"] else None
    down_bias = normal(e, h) if flags["down_bias"] else None
    inputs = [v for v in (x, ids, weights, up, down, up_bias, down_bias) if v is not None]
    (y,) = evaluate_module(bank(layout, gate, e, h, i, k, flags), inputs, {})
    expected = by_token(layout, gate, flags, x, ids, weights, up, down, up_bias, down_bias)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_experts_accumulate_in_f32() -> None:
    """In bf16 only x, the activation's arguments and the result are rounded."""
    flags = dict.fromkeys(FLAGS, False)
    module = bank("concat", "silu", 3, 64, 32, 2, flags, "bf16")
    make = torch.Generator().manual_seed(0)
    x, up, down = (torch.randn(*s, generator=make).bfloat16() for s in ((16, 64), (3, 64, 64), (3, 64, 32)))
    ids, weights = torch.randint(0, 3, (16, 2), generator=make), torch.rand(16, 2, generator=make)
    (y,) = evaluate_module(module, [x, ids, weights, up, down], {})
    exact = by_token("concat", "silu", flags, x, ids, weights, up, down, None, None)
    assert y.dtype == torch.bfloat16
    error = (y.double() - exact).norm() / exact.norm()
    assert 0 < error < 2**-7  # a few roundings to 8 bits, not one for each of 96 additions


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.lists(st.lists(st.integers(-2, 12), min_size=3, max_size=3), max_size=12))
def test_group_sorts_pairs_by_expert(experts: int, rows: list[list[int]]) -> None:
    ids = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
    order, offsets = group_reference(ids, experts)
    flat = ids.reshape(-1).tolist()
    expected = [pair for e in range(experts) for pair, chosen in enumerate(flat) if chosen == e]
    skipped = [pair for pair, chosen in enumerate(flat) if not 0 <= chosen < experts]
    assert order.tolist() == expected + skipped
    assert offsets.tolist() == [sum(0 <= chosen < e for chosen in flat) for e in range(experts + 1)]
    assert order.dtype == offsets.dtype == torch.int32


FUSED = """
func @main(%x: tensor<s0x6xf32>, %logits: tensor<s0x4xf32>, %up: tensor<4x10x6xf32>, %down: tensor<4x6x5xf32>)
    -> (tensor<s0x6xf32>, tensor<s0x6xf32>) {
  %ids, %weights, %order, %offsets = moe.route_group(%logits) {num_experts = 4}
      : tensor<s0x2xi64>, tensor<s0x2xf32>, tensor<(2*s0)xi32>, tensor<5xi32> {
    body(%z: tensor<s0x4xf32>):
      %p = aten.softmax.int(%z) {dim = -1} : tensor<s0x4xf32>
      %w, %e = aten.topk(%p) {k = 2} : tensor<s0x2xf32>, tensor<s0x2xi64>
      yield %e, %w
  }
  %h = moe.gather_gemm(%x, %order, %offsets, %up) {k = 2} : tensor<(2*s0)x5xf32> {
    activation(%a: tensor<rx5xf32>, %b: tensor<rx5xf32>):
      %g = aten.silu(%a) : tensor<rx5xf32>
      %m = aten.mul.Tensor(%g, %b) : tensor<rx5xf32>
      yield %m
  }
  %y = moe.gemm_combine(%h, %order, %offsets, %weights, %down) : tensor<s0x6xf32>
  %ids_1, %weights_1 = moe.route(%logits) : tensor<s0x2xi64>, tensor<s0x2xf32> {
    body(%z: tensor<s0x4xf32>):
      %p = aten.softmax.int(%z) {dim = -1} : tensor<s0x4xf32>
      %w, %e = aten.topk(%p) {k = 2} : tensor<s0x2xf32>, tensor<s0x2xi64>
      yield %e, %w
  }
  %y_1 = moe.experts(%x, %ids_1, %weights_1, %up, %down) : tensor<s0x6xf32> {
    activation(%a: tensor<rx5xf32>, %b: tensor<rx5xf32>):
      %g = aten.silu(%a) : tensor<rx5xf32>
      %m = aten.mul.Tensor(%g, %b) : tensor<rx5xf32>
      yield %m
  }
  return %y, %y_1
}
"""


def test_fused_ops_equal_those_they_replace() -> None:
    module = parse_module(FUSED)
    verify_module(module)
    shapes: tuple[Any, ...] = ((7, 6), (7, 4), (4, 10, 6), (4, 6, 5))
    seen = set[str]()
    inputs = [torch.randn(*shape) for shape in shapes]
    y, y_1 = evaluate_module(module, inputs, {}, observer=lambda op, _: seen.add(op.name))
    assert torch.equal(y, y_1)
    assert {"moe.route_group", "moe.gemm_combine", "moe.experts", "aten.topk"} <= seen
