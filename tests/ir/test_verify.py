"""The verifier: sound modules pass, and every defect is reported, at its line, in the text around it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sparsec import dialects
from sparsec.diagnostics import CompileError
from sparsec.ir.core import Module, Op
from sparsec.ir.loc import Loc
from sparsec.ir.opdef import make
from sparsec.ir.parser import parse_module
from sparsec.ir.types import DType, Sym, TensorType
from sparsec.ir.verify import verify_module
from tests.ir.modules import LAYER

assert dialects.__all__


def messages(module: Module) -> list[str]:
    with pytest.raises(CompileError) as raised:
        verify_module(module)
    return [diagnostic.message for diagnostic in raised.value.diagnostics]


def test_a_sound_module_passes() -> None:
    verify_module(parse_module(LAYER))


def test_a_problem_is_shown_at_the_users_line() -> None:
    module = parse_module(LAYER.replace('{kind = "input"}, %gate: tensor<4x6', '{kind = "input"}, %gate: tensor<4x7'))
    experts = module.main.body.ops[2]
    experts.attrs["layuot"] = "concat"
    with pytest.raises(CompileError) as raised:
        verify_module(module)
    assert str(raised.value) == (
        "small.py:10: error: 'moe.experts' has no attribute 'layuot'; did you mean 'layout'?\n"
        "    return self.experts(x, ids, weights)\n"
        "    }\n"
        '  > %y = moe.experts(%x, %ids, %weights, %up, %down) {layuot = "concat"} : tensor<s0x6xf32> {\n'
        "  >   activation(%a: tensor<rx5xf32>, %b: tensor<rx5xf32>):\n"
        "  >     %g = aten.silu(%a) : tensor<rx5xf32>\n"
        "  >     %m = aten.mul.Tensor(%g, %b) : tensor<rx5xf32>\n"
        "  >     yield %m\n"
        "  > }\n"
        "    return %y\n"
        "  note: in @main"
    )


def test_all_problems_are_reported_at_once() -> None:
    text = LAYER.replace("{k = 2}", "{kk = 2}").replace("%up, %down)", "%down, %up)").replace("{dim = -1}", "")
    found = messages(parse_module(text))
    assert "'aten.softmax.int' needs attribute 'dim'" in found[0]
    assert "'aten.topk' needs attribute 'k'" in found[1]
    assert "'aten.topk' has no attribute 'kk'; did you mean 'k'?" in found[2]
    assert any(message.startswith("'moe.experts' ") for message in found[3:])


def swap_ops(module: Module) -> None:
    ops = module.main.body.ops
    ops[0], ops[1] = ops[1], ops[0]


def use_outer_value(module: Module) -> None:
    main, (linear, route, *_) = module.main, module.main.body.ops
    softmax = route.regions[0].ops[0]
    softmax.operands = (linear.result,)
    assert main.body.ops


def drop_return(module: Module) -> None:
    module.main.body.ops.pop()


def return_early(module: Module) -> None:
    block = module.main.body
    block.insert_before(block.ops[1], make("func.return", []))


def empty_region(module: Module) -> None:
    module.main.body.ops[1].regions[0].ops.clear()


def unbound_symbol(module: Module) -> None:
    linear = module.main.body.ops[0]
    linear.result.type = TensorType((Sym("s7*2"), 4), DType.f32)


def unbound_symbol_alone(module: Module) -> None:
    linear = module.main.body.ops[0]
    linear.result.type = TensorType((Sym("s7"), 4), DType.f32)


def unbound_attribute(module: Module) -> None:
    block = module.main.body
    full = make("aten.full", [], [TensorType((2,), DType.f32)], {"size": (Sym("s9"),), "fill_value": 0})
    block.insert_before(block.ops[0], full)


def foreign_attrs(module: Module) -> None:
    main = module.main
    main.arg_attrs[main.body.ops[0].result] = {"kind": "input"}
    main.result_attrs[3] = {"kind": "output"}


def bad_kinds(module: Module) -> None:
    main = module.main
    main.arg_attrs[main.body.args[0]] = {"kind": "inputt"}
    main.arg_attrs[main.body.args[1]] = {"kind": "param"}
    main.result_attrs[0] = {"kind": "mutation"}


def classless(module: Module) -> None:
    block = module.main.body
    block.insert_before(block.ops[0], Op("aten.silu", [block.args[0]], [block.args[0].type]))


def missing_operand(module: Module) -> None:
    experts = module.main.body.ops[2]
    experts.operands = experts.operands[:4]


def wrong_attribute(module: Module) -> None:
    module.main.body.ops[2].attrs["layout"] = "diagonal"


def too_many_operands(module: Module) -> None:
    softmax = module.main.body.ops[1].regions[0].ops[0]
    softmax.operands = softmax.operands * 2


def rank_of_bank(module: Module) -> None:
    module.main.body.args[2].type = TensorType((4,), DType.f32)


def erased(module: Module) -> None:
    linear = module.main.body.ops[0]
    linear.block = None
    module.main.body.ops.remove(linear)


DEFECTS: list[tuple[Callable[[Module], None], list[str]]] = [
    (swap_ops, ["'moe.route' uses %logits before its definition"]),
    (use_outer_value, ["'aten.softmax.int' uses %logits, which is defined outside of the region of 'moe.route'"]),
    (drop_return, ["the function does not end in `return`"]),
    (return_early, ["`return` stands where it does not end the function"]),
    (empty_region, ["the region of 'moe.route' does not end in `yield`"]),
    (unbound_symbol, ["the type of %logits, tensor<(s7*2)x4xf32>, mentions 's7', which no argument binds"]),
    (unbound_symbol_alone, ["the type of %logits, tensor<s7x4xf32>, mentions 's7', which no argument binds"]),
    (unbound_attribute, ["attribute 'size' mentions 's9', which no argument binds"]),
    (foreign_attrs, ["attributes for %logits, which is not its argument", "attributes for result 3, it returns 1"]),
    (bad_kinds, ["argument %x is of kind 'inputt'", "argument %gate is a param and", "result 0 is a mutation and"]),
    (classless, ["'aten.silu' has no class"]),
    (missing_operand, ["'moe.experts' lacks operand 'down'"]),
    (wrong_attribute, ["'moe.experts' attribute 'layout' is 'diagonal', not of type Literal"]),
    (too_many_operands, ["'aten.softmax.int' has 2 operands, takes at most 1"]),
    (rank_of_bank, ["'moe.experts' up is tensor<4xf32>: an expert bank has three dimensions"]),
    (erased, ["'moe.route' uses %logits, whose op was erased"]),
]


@pytest.mark.parametrize("defect, expected", DEFECTS, ids=[defect.__name__ for defect, _ in DEFECTS])
def test_defect(defect: Callable[[Module], None], expected: list[str]) -> None:
    module = parse_module(LAYER)
    defect(module)
    found = messages(module)
    for message in expected:
        assert any(message in line for line in found), found


CALL = """
func @main(%x: tensor<s0x4xf32>) -> (tensor<s0x4xf32>) {
  %b = kernel.alloc() : tensor<s0x4xf32>
  %y = kernel.launch([%x], [%b]) {callee = "k"} : tensor<s0x4xf32>
  return %y
}

func @k(%x: tensor<tx4xf32>) -> (tensor<tx4xf32>) {backend = "torch", tokens = t} {
  %y = aten.silu(%x) : tensor<tx4xf32>
  return %y
}
"""


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('"k"', '"j"', "'kernel.launch' calls @j, which is not in the module (it has: @k)"),
        ("[%x]", "[%x, %x]", "'kernel.launch' has 2 arguments, @k has 1"),
        (
            "@k(%x: tensor<tx4xf32>)",
            "@k(%x: tensor<tx5xf32>)",
            "argument 0 of 'kernel.launch' is tensor<s0x4xf32>, @k",
        ),
        (
            "@k(%x: tensor<tx4xf32>)",
            "@k(%x: tensor<tx4xi64>)",
            "argument 0 of 'kernel.launch' is tensor<s0x4xf32>, @k",
        ),
        ("tokens = t", "tokens = t, n = u", ""),
        ("[%b]", "[%x]", "buffer %x does not come from kernel.alloc"),
    ],
)
def test_calls(old: str, new: str, message: str) -> None:
    verify_module(parse_module(CALL))
    module = parse_module(CALL.replace(old, new))
    if message:
        assert any(message in line for line in messages(module))
    else:
        verify_module(module)


def test_unbacked_symbols_are_bound_by_results() -> None:
    verify_module(
        parse_module("""
func @main(%x: tensor<s0xf32>, %n: sym<s1>) -> (tensor<(u0*2 + s1)xf32>) {
  %i = aten.nonzero(%x) : tensor<u0x1xi64>
  %u = aten.item(%x) : sym<u1>
  %y = aten.full() {size = [(u0*2 + s1)], fill_value = u1} : tensor<(u0*2 + s1)xf32>
  return %y
}""")
    )


def test_a_function_without_ops_is_shown() -> None:
    module = parse_module(LAYER)
    module.main.loc = Loc("small.py", 1, "", "class Small:")
    module.main.body.ops.clear()
    with pytest.raises(CompileError, match=r"small\.py:1: error: the function does not end in `return`"):
        verify_module(module)
