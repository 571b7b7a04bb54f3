"""References of capacities, grouped linears, and banks with input weights and tails, against plain loops."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sparsec.diagnostics import CompileError
from sparsec.dialects.moe import capacity_reference
from sparsec.ir.interp import evaluate_module
from sparsec.ir.parser import parse_module
from sparsec.ir.verify import verify_module
from sparsec.pipeline import run_passes

torch.set_num_threads(1)
TABLES = st.tuples(st.integers(1, 3), st.integers(0, 6), st.integers(1, 3), st.integers(0, 1 << 16))


def counted(ids: list[list[int]], experts: int, capacity: int, order: str) -> list[list[int]]:
    """One group, pair by pair in the order of arrival."""
    kept, seen = [list(row) for row in ids], Counter[int]()
    slots = len(ids[0]) if ids else 0
    by_slot = [(t, j) for j in range(slots) for t in range(len(ids))]
    for t, j in by_slot if order == "slot" else product(range(len(ids)), range(slots)):
        if 0 <= (e := ids[t][j]) < experts:
            seen[e] += 1
            kept[t][j] = e if seen[e] <= capacity else experts
    return kept


@settings(max_examples=80, deadline=None)
@given(TABLES, st.integers(1, 5), st.integers(0, 4), st.sampled_from(["slot", "token"]))
def test_capacity_counts_pairs_as_they_arrive(sizes: tuple[int, ...], experts: int, capacity: int, order: str) -> None:
    groups, each, k, seed = sizes
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, experts + 2, (groups * each, k), generator=generator)
    got = capacity_reference(ids, experts, capacity, order == "slot", groups)
    wanted = [row for part in ids.reshape(groups, each, k).tolist() for row in counted(part, experts, capacity, order)]
    assert got.tolist() == wanted
    module = parse_module(f"""
func @main(%n: tensor<s0xs1xf32>, %ids: tensor<(s0*s1)x{k}xi64>) -> (tensor<(s0*s1)x{k}xi64>) {{
  %kept = moe.capacity(%ids) {{num_experts = {experts}, capacity = {capacity}, order = "{order}", groups = s0}}
      : tensor<(s0*s1)x{k}xi64>
  return %kept
}}""")
    lowered = run_passes(module, "lower-kernels").module
    assert not any(op.name == "moe.capacity" for op in lowered.walk())
    (kept,) = evaluate_module(lowered, [torch.zeros(groups, each), ids], {})
    assert kept.tolist() == wanted


LINEAR = """
func @main(%x: {x}, %ids: tensor<s0x{k}xi64>, %w: {w}, %b: tensor<{e}x{n}xf32>, %s: tensor<s0x{k}xf32>)
    -> (tensor<s0x{k}x{n}xf32>, tensor<s0x{n}xf32>) {{
  %h = moe.grouped_linear(%x, %ids, %w, %b) {{transposed = {transposed}}} : tensor<s0x{k}x{n}xf32>
  %y = moe.grouped_linear(%x, %ids, %w, %b, %s) {{transposed = {transposed}}} : tensor<s0x{n}xf32>
  return %h, %y
}}"""


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(0, 7), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    st.booleans(), st.booleans(), st.integers(0, 1 << 16),
)  # fmt: skip
def test_grouped_linear_equals_a_loop(sizes: tuple[int, ...], rows: bool, transposed: bool, seed: int) -> None:
    tokens, k, e, n, inner = sizes
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*((tokens, k, inner) if rows else (tokens, inner)), generator=generator)
    ids = torch.randint(-1, e + 1, (tokens, k), generator=generator)
    w = torch.randn(*((e, inner, n) if transposed else (e, n, inner)), generator=generator)
    bias, weights = torch.randn(e, n, generator=generator), torch.randn(tokens, k, generator=generator)
    weights[(ids < 0) | (ids >= e)] = torch.nan  # what is skipped may hold anything
    text = LINEAR.format(
        x=f"tensor<s0x{k}x{inner}xf32>" if rows else f"tensor<s0x{inner}xf32>", k=k, e=e, n=n,
        w=f"tensor<{'x'.join(map(str, w.shape))}xf32>", transposed=str(transposed).lower(),
    )  # fmt: skip
    module = parse_module(text)
    verify_module(module)
    wanted = torch.zeros(tokens, k, n)
    for t, j in product(range(tokens), range(k)):
        if 0 <= (expert := int(ids[t, j])) < e:
            matrix = w[expert].T if transposed else w[expert]
            wanted[t, j] = matrix @ (x[t, j] if rows else x[t]) + bias[expert]
    given_ = [x, ids, w, bias, weights]
    for form in (module, run_passes(parse_module(text), "fuse-experts,cse,dce").module):
        h, y = evaluate_module(form, given_, {})
        torch.testing.assert_close(h, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(y, (wanted * weights.nan_to_num().unsqueeze(-1)).sum(1), rtol=1e-5, atol=1e-5)


BANK = """
func @main(%x: tensor<s0x6xf32>, %ids: tensor<s0x2xi64>, %w: tensor<s0x2xf32>, %up: tensor<3x4x6xf32>,
    %down: tensor<3x6x4xf32>, %n: tensor<6xf32>) -> (tensor<s0x6xf32>) {{
  %y = moe.experts({operands}) {{layout = "single"{attrs}}} : tensor<s0x6xf32> {{
    activation(%a: tensor<rx4xf32>):
      %h = aten.relu(%a) : tensor<rx4xf32>
      yield %h
    {tail}
  }}
  return %y
}}"""
TAIL = """tail(%z: tensor<rx6xf32>, %g: tensor<6xf32>):
      %p = aten.softmax.int(%z) {dim = -1} : tensor<rx6xf32>
      %q = aten.mul.Tensor(%p, %g) : tensor<rx6xf32>
      yield %q"""
PLAIN, WITH_TAIL = "%x, %ids, %w, %up, %down", "%x, %ids, %w, %up, %down, none, none, none, none, %n"


def draw(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((5, 6), (5, 2), (3, 4, 6), (3, 6, 4), (6,))
    x, weights, up, down, norm = (torch.randn(shape, generator=generator) for shape in shapes)
    ids = torch.randint(-1, 4, (5, 2), generator=generator)
    weights[(ids < 0) | (ids > 2)] = torch.nan
    return [x, ids, weights, up, down, norm]


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("tail", [False, True])
def test_weights_and_tail_stand_where_they_should(early: bool, tail: bool) -> None:
    attrs = ', weight_on = "input"' if early else ""
    text = BANK.format(operands=WITH_TAIL if tail else PLAIN, attrs=attrs, tail=TAIL if tail else "")
    given_ = x, ids, weights, up, down, norm = draw(3)
    wanted = torch.zeros(5, 6)
    for t, j in product(range(5), range(2)):
        e, weight = int(ids[t, j]), weights[t, j]
        if 0 <= e < 3:
            y = down[e] @ F.relu(up[e] @ (x[t] * weight if early else x[t]))
            y = y.softmax(-1) * norm if tail else y
            wanted[t] += y if early else y * weight
    module = parse_module(text)
    verify_module(module)
    for form in (module, run_passes(parse_module(text), "fuse-experts", target="cuda:sm_90").module):
        (got,) = evaluate_module(form, given_, {})
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("operands", "tail", "message"),
    [
        (WITH_TAIL, "", r"has 1 tail_params but no tail"),
        (PLAIN, TAIL, r"tail takes \(tensor<6xf32>\) after the rows, the tail_params are \(\)"),
        (PLAIN, TAIL.replace("rx6", "rx5"), r"tail must take rows of tensor<s0x6xf32>"),
    ],
)
def test_a_tail_that_does_not_fit_is_an_error(operands: str, tail: str, message: str) -> None:
    module = parse_module(BANK.format(operands=operands, attrs="", tail=tail))
    with pytest.raises(CompileError, match=message):
        verify_module(module)


def test_a_second_region_is_named() -> None:
    with pytest.raises(CompileError, match=r"region 'head': 'moe\.experts' has 'tail' here"):
        parse_module(BANK.format(operands=PLAIN, attrs="", tail=TAIL.replace("tail(", "head(")))


LAYER = """
func @main(%x: tensor<{rows}x6xf32>, %z: tensor<s0x3xf32>, %up: {up}, %down: tensor<3x6x4xf32>, %s: tensor<3xf32>,
    %n: tensor<6xf32>) -> (tensor<{rows}x6xf32>, tensor<s0x2xf32>) {{
  %y, %i, %w = moe.layer(%x, %z, %up, %down, none, none, none, none, {params}) {{layout = "single"{attrs}}}
      : tensor<{rows}x6xf32>, tensor<s0x2xi64>, tensor<s0x2xf32> {{
    router(%l: tensor<s0x3xf32>, %b: tensor<3xf32>):
      %c = aten.add.Tensor(%l, %b) : tensor<s0x3xf32>
      %v, %e = aten.topk(%c) {{k = 2}} : tensor<s0x2xf32>, tensor<s0x2xi64>
      yield %e, %v
    activation(%a: tensor<rx4xf32>):
      %h = aten.relu(%a) : tensor<rx4xf32>
      yield %h
    tail(%t: tensor<rx6xf32>, %g: tensor<6xf32>):
      %o = aten.mul.Tensor(%t, %g) : tensor<rx6xf32>
      yield %o
  }}
  return %y, %w
}}"""


def whole(**changed: str) -> str:
    return LAYER.format(**{"rows": "s0", "up": "tensor<3x4x6xf32>", "params": "%s, %n", "attrs": "", **changed})


@pytest.mark.parametrize("early", [False, True])
def test_a_layer_is_its_route_and_its_experts(early: bool) -> None:
    module = parse_module(whole(attrs=', weight_on = "input"' if early else ""))
    verify_module(module)
    x, _, _, up, down, norm = draw(4)
    logits, bias = torch.randn(5, 3, generator=torch.Generator().manual_seed(5)), torch.tensor([0.5, -1.0, 0.25])
    y, weights = evaluate_module(module, [x, logits, up, down, bias, norm], {})
    chosen, ids = (logits + bias).topk(2)
    assert torch.equal(weights, chosen)
    wanted = torch.zeros(5, 6)
    for t, j in product(range(5), range(2)):
        e, weight = int(ids[t, j]), chosen[t, j]
        row = norm * (down[e] @ F.relu(up[e] @ (x[t] * weight if early else x[t])))
        wanted[t] += row if early else weight * row
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": "s1"}, r"x is tensor<s1x6xf32>, the logits tensor<s0x3xf32>: their rows differ"),
        ({"params": "%n, %s"}, r"region takes \(tensor<s0x3xf32>, tensor<3xf32>\), the operands are"),
        ({"params": "%s"}, r"tail takes \(tensor<6xf32>\) after the rows, the tail_params are \(\)"),
        ({"up": "tensor<3x4x7xf32>"}, r"x has 6 columns, up takes 7"),
        (
            {"attrs": ', packing = "tiles"'},
            r"packing 'tiles': 'up' is tensor<3x4x6xf32>, must be tensor<3x1x1x2",
        ),
        ({"attrs": ', packing = "int8", up_transposed = true'}, r"packed banks are neither transposed nor interleaved"),
        ({"attrs": ', packing = "int4"'}, r"packing 'int4': 'down_scale' is left out, must be tensor<3x1x1x2x16xf32>"),
        ({"attrs": ', packing = "zip"'}, r"attribute 'packing' is 'zip'"),
    ],
)
def test_a_layer_that_does_not_fit_is_an_error(changed: dict[str, str], message: str) -> None:
    with pytest.raises(CompileError, match=message):
        verify_module(parse_module(whole(**changed)))
