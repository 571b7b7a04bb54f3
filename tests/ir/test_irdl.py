"""Real MLIR verifies our modules: IRDL of the op classes, and every golden file of the passes parsed with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsec import dialects
from sparsec.ir.core import Module
from sparsec.ir.equal import equal
from sparsec.ir.irdl import print_irdl
from sparsec.ir.mlir import print_generic
from sparsec.ir.opdef import REGISTRY
from sparsec.ir.parser import parse_module
from tests.ir.modules import LAYER

assert dialects.__all__
TESTS = Path(__file__).parents[1]
GOLDENS = sorted(TESTS.glob("passes/*/*.sparsec"))


@pytest.fixture
def mlir() -> Iterator[Any]:
    """torch-mlir's bindings inside a context of their own."""
    ir = pytest.importorskip("torch_mlir.ir")
    with ir.Context() as context, ir.Location.unknown():
        context.allow_unregistered_dialects = True
        yield ir


def load(mlir: Any, text: str) -> None:
    """Make the context know the dialects of an IRDL text."""
    irdl: Any = pytest.importorskip("torch_mlir.dialects.irdl")
    irdl.load_dialects(mlir.Module.parse(text))


def modules(path: Path) -> list[Module]:
    """Both modules of a golden file."""
    given, _, expected = path.read_text().partition("// ----- expect")
    return [parse_module(text, path.name) for text in (given, expected) if text.strip()]


@pytest.mark.mlir
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_golden_files_are_mlir(mlir: Any, path: Path) -> None:
    for module in modules(path):
        with mlir.Context() as context, mlir.Location.unknown():
            context.allow_unregistered_dialects = True
            load(mlir, print_irdl(module))
            theirs = mlir.Module.parse(print_generic(module))
            assert theirs.operation.verify()
            printed = theirs.operation.get_asm(enable_debug_info=True)
        assert equal(parse_module(printed), module)


def test_there_are_golden_files() -> None:
    assert len(GOLDENS) > 70


@pytest.mark.mlir
def test_irdl_of_every_op(mlir: Any) -> None:
    load(mlir, print_irdl())
    text = print_irdl()
    for name in REGISTRY:
        if name not in ("func.return", "moe.yield"):
            assert f"irdl.operation @{name.partition('.')[2]} {{" in text


WRONG = {
    'layout = "concat"': ('layout = "sideways"', '"sideways"\' does not satisfy the constraint'),
    ', weight_on = "output"': ("", 'attribute "weight_on" is expected but not provided'),
    "1, 1, 1, 1, 1, 0, 0": ("1, 1, 1, 1, 1, 0, 1", "must be equal to the number of operands"),
    "1, 1, 1, 1, 1, 0, ": ("1, 1, 1, 1, 0, 1, ", "element 4 in 'operandSegmentSizes' attribute must be equal to 1"),
    '"moe.experts"': ('"moe.expert"', "unregistered operation 'moe.expert'"),
    "up_transposed = false": ("up_transposed = 0.5", "does not satisfy the constraint"),
}


@pytest.mark.mlir
@pytest.mark.parametrize("old", WRONG)
def test_mlir_refuses(mlir: Any, old: str) -> None:
    """Each a slip in the generic form that MLIR alone would let pass."""
    module = parse_module(LAYER)
    text = print_generic(module)
    new, message = WRONG[old]
    assert old in text
    wrong = text.replace(old, new)
    mlir.Module.parse(wrong)  # nobody knows the dialect yet
    load(mlir, print_irdl(module))
    assert mlir.Module.parse(text).operation.verify()
    with pytest.raises(mlir.MLIRError) as refused:
        mlir.Module.parse(wrong)
    assert message in str(refused.value)


VARIADIC = """\
func @main(%x: tensor<s0x4xf32>, %i: tensor<s0x2xi64>, %n: sym<s1>) -> (tensor<s0x4xf32>, tensor<s0x2xi64>) {
  %a = moe.call([%x]) {callee = "one"} : tensor<s0x4xf32>
  %b, %c = moe.call([%a, %i, %n]) {callee = "two"} : tensor<s0x4xf32>, tensor<s0x2xi64>
  %d, %e = moe.call(%b, %c) {callee = "two"} : tensor<s0x4xf32>, tensor<s0x2xi64>
  return %d, %e
}
"""


@pytest.mark.mlir
def test_values_of_several_types_in_one_variadic_field(mlir: Any) -> None:
    module = parse_module(VARIADIC)
    load(mlir, print_irdl(module))
    theirs = mlir.Module.parse(print_generic(module))
    assert theirs.operation.verify()
    assert equal(parse_module(theirs.operation.get_asm(print_generic_op_form=True)), module)


def test_what_defaults_stand_for_is_spelled_out() -> None:
    text = print_generic(parse_module(LAYER))
    assert 'layout = "concat", up_transposed = false' in text
    assert "layout" not in next(op for op in parse_module(text).walk() if op.name == "moe.experts").attrs
    assert "}, {" in text  # the tail, which is left out
    assert '"region.yield"' in text
    assert '"moe.yield"' not in text


@pytest.mark.parametrize("sizes", ["1, 1", "2, 1, 1, 1, 0, 0, 0, 0, 0, 0", "1, 1, 1, 1, 1, 1, 0, 0, 0, 0"])
def test_sizes_that_do_not_fit(sizes: str) -> None:
    from sparsec.diagnostics import CompileError

    text = print_generic(parse_module(LAYER))
    with pytest.raises(CompileError, match="must say how many of 5 operands each of 10 has"):
        parse_module(text.replace("array<i32: 1, 1, 1, 1, 1, 0, 0, 0, 0, 0>", f"array<i32: {sizes}>"))
