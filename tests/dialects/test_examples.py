"""The examples in op classes' docstrings are parsed, verified and printed."""

from __future__ import annotations

import inspect
import re
import textwrap

import pytest

from sparsec import dialects
from sparsec.ir.equal import equal
from sparsec.ir.mlir import print_generic
from sparsec.ir.opdef import REGISTRY
from sparsec.ir.parser import parse_module
from sparsec.ir.printer import TERMINATORS, print_module
from sparsec.ir.verify import verify_module

assert dialects.__all__

# What examples read: 8 experts of width 48, 2 for each of s0 tokens of width 64; 4 ranks of 3 slots.
GIVEN = {
    "x": "tensor<s0x64xf32>",
    "y_grad": "tensor<s0x64xf32>",
    "logits": "tensor<s0x8xf32>",
    "ids": "tensor<s0x2xi64>",
    "weights": "tensor<s0x2xf32>",
    "order": "tensor<(2*s0)xi32>",
    "offsets": "tensor<9xi32>",
    "h": "tensor<(2*s0)x48xf32>",
    "up": "tensor<8x96x64xf32>",
    "down": "tensor<8x64x48xf32>",
    "bias": "tensor<8x96xf32>",
    "slots": "tensor<12xi64>",
    "shares": "tensor<12xf64>",
    "where": "tensor<s0x2xi64>",
}
KERNEL = """
func @gather_gemm_0(%x: tensor<tx64xf32>, %order: tensor<(2*t)xi32>, %offsets: tensor<9xi32>, %up: tensor<8x96x64xf32>)
    -> (tensor<(2*t)x48xf32>) {backend = "torch", tokens = t} {
  %h = moe.gather_gemm(%x, %order, %offsets, %up) {k = 2} : tensor<(2*t)x48xf32> {
    activation(%a: tensor<rx48xf32>, %b: tensor<rx48xf32>):
      %g = aten.mul.Tensor(%a, %b) : tensor<rx48xf32>
      yield %g
  }
  return %h
}
func @block_0(%x: tensor<s0x64xf32>, %up: tensor<8x96x64xf32>) -> (tensor<s0x64xf32>) {scope = "layers.0.mlp"} {
  %y = aten.exp(%x) : tensor<s0x64xf32>
  return %y
}
"""


def examples(name: str) -> list[str]:
    """The indented blocks of a class's docstring."""
    doc = inspect.cleandoc(REGISTRY[name].__doc__ or "")
    return [textwrap.dedent(block) for block in re.findall(r"(?:^ {4,}\S.*\n?)+", doc, re.MULTILINE)]


OPS = sorted(
    name for name, op in REGISTRY.items() if name not in TERMINATORS and op.__module__.startswith("sparsec.dialects")
)


@pytest.mark.parametrize("name", OPS)
def test_example(name: str) -> None:
    blocks = examples(name)
    assert blocks, f"{name} shows no example"
    for block in blocks:
        assert name in block
        outer = [line for line in block.splitlines() if not line.startswith(" ")]
        made = {value for line in outer if " = " in line for value in re.findall(r"%(\w+)", line.split(" = ")[0])}
        read = {value for line in outer for value in re.findall(r"%(\w+)", line.partition(" = ")[2] or line)}
        args = ", ".join(f"%{value}: {GIVEN[value]}" for value in GIVEN if value in (read | {"x"}) - made)
        last = [line for line in outer if name in line][-1]
        if last.endswith(": handle"):  # no function returns one
            last = outer[-1]
        results = last.split(" = ")[0]
        types = re.findall(r"(?:tensor|sym)<[^>]*>", block[block.rindex(last) :].split("{\n")[0])
        text = f"func @main({args}) -> ({', '.join(types)}) {{\n{block}\nreturn {results}\n}}\n{KERNEL}"
        module = parse_module(text, f"{name}.sparsec")
        verify_module(module)
        printed = print_module(module)
        assert " ".join(block.split()) in " ".join(printed.split())
        assert print_module(parse_module(printed)) == printed
        assert equal(parse_module(print_generic(module)), module)
