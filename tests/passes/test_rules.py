"""Sizes by their factors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsec.ir.types import Dim, Sym, evaluate, product
from sparsec.passes.rules import factors, is_pointwise, same_size, substitute


@pytest.mark.parametrize(
    ("dim", "old", "new"),
    [
        (Sym("s0"), Sym("s0"), "t"),
        (Sym("2*s0"), Sym("s0"), "2*t"),
        (Sym("2*(s0*s1)"), Sym("s0*s1"), "2*t"),
        (Sym("s1*2*s0"), Sym("s0*s1"), "2*t"),
        (Sym("s0*s1*s2"), Sym("s0*s1"), "s2*t"),
        (Sym("s1"), Sym("s0"), "s1"),
        (Sym("s0 + 1"), Sym("s0 + 1"), "t"),
        (Sym("s0 + 1"), Sym("s0"), "t+1"),
        (Sym("2*(s0*s1)//16+10"), Sym("s0*s1"), "2*t//16+10"),
        (48, 24, 48),
        (Sym("r"), 24, "r"),
    ],
)
def test_substitute(dim: Dim, old: Dim, new: Dim) -> None:
    assert substitute(dim, old, Sym("t")) == new


SIZES = st.one_of(st.integers(1, 9), st.sampled_from([Sym("s0"), Sym("s1"), Sym("s0*s1"), Sym("2*s1")]))


@given(st.lists(SIZES, min_size=1, max_size=4), st.lists(SIZES, min_size=1, max_size=4))
def test_equal_factors_mean_equal_sizes(a: list[Dim], b: list[Dim]) -> None:
    if same_size(a, b):
        for env in ({"s0": 3, "s1": 5}, {"s0": 7, "s1": 2}):
            assert evaluate(product(tuple(a)), env) == evaluate(product(tuple(b)), env)
    assert same_size(a, list(reversed(a)))


def test_factors_sort_what_commutes() -> None:
    assert factors(Sym("s1*4*s0*2")) == factors(Sym("8*(s0*s1)")) == (8, ("s0", "s1"))


def test_pointwise_is_torchs_word_and_random_ops_are_not() -> None:
    assert is_pointwise("aten.add.Tensor") and is_pointwise("aten._to_copy") and is_pointwise("aten.masked_fill.Scalar")
    for name in ("aten.softmax.int", "aten.dropout", "aten.bernoulli", "aten.relu_", "aten.linear", "aten.nothing"):
        assert not is_pointwise(name), name
