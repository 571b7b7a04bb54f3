"""The generic form is MLIR: torch-mlir's parser takes it, and what its printer makes of it reads back the same."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.ir import model_text
from sparsec import dialects
from sparsec.diagnostics import CompileError
from sparsec.ir.core import Module
from sparsec.ir.equal import equal
from sparsec.ir.mlir import format_type, print_generic
from sparsec.ir.parser import parse_module
from sparsec.ir.types import DType, Sym, SymType, TensorType
from tests.ir.modules import EVERYTHING, LAYER

assert dialects.__all__


@pytest.fixture
def mlir() -> Any:
    return pytest.importorskip("torch_mlir.ir")


def test_types() -> None:
    assert format_type(TensorType((4, Sym("s0*2"), Sym("u0")), DType.bf16)) == 'tensor<4x?x?xbf16, ["s0*2", "u0"]>'
    assert format_type(TensorType((), DType.c64)) == "tensor<complex<f32>>"
    assert format_type(SymType(Sym("s0"))) == '!sparsec.sym<"s0">'


def locations(module: Module) -> list[Any]:
    return [(op.loc, op.loc.origins) for op in module.walk()]


@pytest.mark.mlir
@pytest.mark.parametrize("text", [EVERYTHING, LAYER, model_text(100)], ids=["everything", "layer", "model"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enable_debug_info": True},
        {"print_generic_op_form": True},
        {"enable_debug_info": True, "print_generic_op_form": True},
        {"enable_debug_info": True, "print_generic_op_form": True, "use_local_scope": True},
        {"enable_debug_info": True, "use_local_scope": True},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_text_survives_real_mlir(mlir: Any, text: str, options: dict[str, bool]) -> None:
    module = parse_module(text)
    with mlir.Context() as context:
        context.allow_unregistered_dialects = True
        theirs = mlir.Module.parse(print_generic(module))
        assert theirs.operation.verify()
        printed = theirs.operation.get_asm(**options)
    again = parse_module(printed)
    assert equal(again, module)
    if options.get("enable_debug_info"):
        assert locations(again) == locations(module)


ERRORS = {
    '"aten.silu"(%y) : (tensor<4xf32>) -> ()': "%y is not defined before its use",
    '"aten.sillu"(%x) : (tensor<4xf32>) -> ()': "unknown op 'aten.sillu'; did you mean 'aten.silu'?",
    '"aten.silu"(%x) : (tensor<5xf32>) -> ()': "the types of its operands differ",
    '"aten.silu"(%x) : (tensor<?xf32>) -> ()': "each `?` needs its symbol",
    '"aten.silu"(%x) {a = 0x12 : f32} : (tensor<4xf32>) -> ()': "is no number that sparsec has",
    '"aten.silu"(%x) {a = dense} : (tensor<4xf32>) -> ()': "`dense` is no attribute that sparsec has",
    '"aten.silu"(%x) {a = "\\q"} : (tensor<4xf32>) -> ()': "a bad escape",
    '"aten.silu"(%x) {a = "\\FF"} : (tensor<4xf32>) -> ()': "not UTF-8",
    '"aten.silu"(%x) {operand_segments = [1, 1]} : (tensor<4xf32>) -> ()': "that count 1 operands",
    '"aten.silu"(%x) : (tensor<4xf32>) -> () loc(#loc9)': "no location is named #loc9",
    '"aten.silu"(%x) : (tensor<4xf32>) -> () loc(here)': "`here` is no location that sparsec has",
    '%y:2 = "aten.silu"(%x) : (tensor<4xf32>) -> tensor<4xf32>': "has 1 result types for 2 names",
    '"aten.silu"(%x) : (tensor<4xf32>)': "expected `->`",
}


@pytest.mark.parametrize("line", ERRORS)
def test_error(line: str) -> None:
    text = f"func.func @main(%x: tensor<4xf32>) {{\n  {line}\n  return\n}}\n"
    with pytest.raises(CompileError) as raised:
        parse_module(text, "a.mlir")
    assert ERRORS[line] in str(raised.value)
    assert str(raised.value).startswith("a.mlir:")


def test_a_function_without_a_name() -> None:
    with pytest.raises(CompileError, match="a function needs `sym_name`"):
        parse_module('"func.func"() ({ ^bb0: "func.return"() : () -> () }) : () -> ()')
    with pytest.raises(CompileError, match="outside of a function"):
        parse_module('"aten.silu"() : () -> ()')
