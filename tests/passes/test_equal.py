"""Structural equality and copies."""

from __future__ import annotations

import math

import pytest

from sparsec.ir.core import Attr, Module
from sparsec.ir.equal import attr_key, clone_module, count_ops, equal
from sparsec.ir.parser import parse_module
from sparsec.ir.printer import print_module

TEXT = """
func @main(%x: tensor<s0x8xf32>, %up: tensor<4x12x8xf32>, %i: tensor<s0x2xi64>) -> (tensor<(2*s0)x6xf32>) {
  loc "m.py":3
  %o, %f = moe.group(%i) {num_experts = 4} : tensor<(2*s0)xi32>, tensor<5xi32>
  %h = moe.gather_gemm(%x, %o, %f, %up) {k = 2} : tensor<(2*s0)x6xf32> {
    activation(%a: tensor<rx6xf32>, %b: tensor<rx6xf32>):
      %m = aten.mul.Tensor(%a, %b) : tensor<rx6xf32>
      yield %m
  }
  return %h
}
"""


def changed(old: str, new: str) -> Module:
    assert old in TEXT
    return parse_module(TEXT.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [("%m", "%product"), ('loc "m.py":3\n', ""), ("{k = 2}", '{k = 2, layout = "concat"}')],
    ids=["names", "locations", "a default spelled out"],
)
def test_what_makes_no_difference(old: str, new: str) -> None:
    assert equal(parse_module(TEXT), changed(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mul.Tensor(%a, %b)", "mul.Tensor(%b, %a)"),
        ("mul.Tensor", "add.Tensor"),
        ("{k = 2}", "{k = 3}"),
        ("%b: tensor<rx6xf32>", "%b: tensor<rx6xbf16>"),
    ],
    ids=["operands", "an op in a region", "an attribute", "a type"],
)
def test_what_makes_a_difference(old: str, new: str) -> None:
    assert not equal(parse_module(TEXT), changed(old, new))


@pytest.mark.parametrize(("a", "b"), [(1, True), (1, 1.0), ("1", 1), ((1,), (1.0,)), ({"a": 0}, {"a": False})])
def test_attributes_differ_by_kind(a: Attr, b: Attr) -> None:
    assert attr_key(a) != attr_key(b)


def test_a_nan_equals_itself() -> None:
    assert attr_key(math.nan) == attr_key(float("nan"))


def test_a_copy_is_equal_and_shares_nothing() -> None:
    module = parse_module(TEXT)
    copy = clone_module(module)
    assert equal(module, copy)
    assert print_module(module) == print_module(copy)
    assert count_ops(copy) == 5
    copy.main.body.ops[1].attrs["k"] = 7
    copy.main.arg_attrs[copy.main.body.args[0]] = {"kind": "param"}
    assert print_module(module) == print_module(parse_module(TEXT))
    assert not {id(op) for op in module.walk()} & {id(op) for op in copy.walk()}
    assert all(user in set(copy.walk()) for arg in copy.main.body.args for user in arg.users)
