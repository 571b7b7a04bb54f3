"""Both text forms: what is printed reads back to the same, and errors say where and what was expected."""

from __future__ import annotations

import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsec import dialects
from sparsec.diagnostics import CompileError
from sparsec.ir.core import Block, Func, Module
from sparsec.ir.equal import attr_key, equal
from sparsec.ir.loc import Loc
from sparsec.ir.mlir import print_generic
from sparsec.ir.opdef import make
from sparsec.ir.parser import parse_module
from sparsec.ir.printer import print_module, print_op
from sparsec.ir.types import DType, Sym, TensorType
from tests.ir.modules import EVERYTHING, LAYER

assert dialects.__all__
F32 = TensorType((4,), DType.f32)


@pytest.mark.parametrize("text", [EVERYTHING, LAYER, ""], ids=["everything", "layer", "empty"])
def test_text_survives_both_forms(text: str) -> None:
    module = parse_module(text)
    assert print_module(module) == text
    generic = print_generic(module)
    again = parse_module(generic)
    assert equal(again, module)
    assert print_generic(again) == generic
    assert print_module(again) == text


def test_locations_are_read() -> None:
    linear, route, *_ = parse_module(EVERYTHING).main.body.ops
    assert linear.loc == Loc("models/small.py", 34, "model.gate")
    assert linear.loc.source == "logits = F.linear(x, self.weight)  # noqa"
    assert route.loc.origins == (Loc("b.py", 4), Loc("a b/é.py", 7, "m"), Loc("c.py", 5, '"\n'))
    softmax, topk, _ = route.regions[0].ops
    assert softmax.loc == route.loc
    assert not topk.loc


def test_what_is_written_freely_is_read() -> None:
    """Line breaks, comments and spaces are free, and tokens may stand on lines of their own."""
    bare = re.sub("  //.*", "", LAYER)
    text = bare.replace(", ", " ,\n   ").replace(" = moe", "\n =   moe").replace("yield", "// a comment\nyield")
    assert equal(parse_module(text), parse_module(LAYER))


def test_names_are_kept_and_made_unique() -> None:
    block = Block([F32, F32, F32], ["a", "a", ""])
    func = Func("main", block)
    for hint in ("a", "", "b c", "7x", "a_1"):
        op = block.append(make("aten.silu", [block.args[0]], [F32]))
        op.result.name = hint
    block.append(make("func.return", [block.ops[-1].result]))
    text = print_module(Module([func]))
    assert "func @main(%a: tensor<4xf32>, %a_1: tensor<4xf32>, %0: tensor<4xf32>)" in text
    names = [line.split(" = ")[0].strip() for line in text.splitlines() if " = " in line]
    assert names == ["%a_2", "%1", "%b_c", "%_7x", "%a_1_1"]
    assert print_module(parse_module(text)) == text


def test_print_op_shows_names_of_its_function() -> None:
    route = parse_module(LAYER).main.body.ops[1]
    assert print_op(route).splitlines()[0] == (
        "%ids, %weights = moe.route(%logits) : tensor<s0x2xi64>, tensor<s0x2xf32> {"
    )
    assert print_op(route).splitlines()[-1] == "}"


ATTRS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text()
    | st.sampled_from([*DType, Sym("s0"), Sym("s0*(u1 + 2)//3"), Sym("max(s0, 1)"), Sym("none"), Sym("f32")]),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


KEYS = st.text(min_size=1) | st.sampled_from(["return", "loc", "func", "a.b", "none", "fused", "in"])


@settings(max_examples=150, deadline=None)
@example({"A.0": None, "0": None})
@given(st.dictionaries(KEYS, ATTRS, max_size=3))
def test_any_attribute_survives_both_forms(attrs: dict[str, Any]) -> None:
    block = Block([F32], ["x"])
    block.append(make("aten.silu", [block.args[0]], [F32], attrs))
    block.append(make("func.return", [block.args[0]]))
    module = Module([Func("main", block, attrs)], attrs)
    for text in (print_module(module), print_generic(module)):
        again = parse_module(text)
        assert attr_key(again.attrs) == attr_key(again.main.attrs) == attr_key(attrs)
        assert attr_key(again.main.body.ops[0].attrs) == attr_key(attrs)
    assert print_module(parse_module(print_generic(module))) == print_module(module)


@settings(max_examples=100, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_keep_their_bits(value: float) -> None:
    text = print_module(Module(attrs={"x": value}))
    assert "." in text
    read = parse_module(text).attrs["x"]
    assert read == value
    assert isinstance(read, float)
    assert math.copysign(1, read) == math.copysign(1, value)


# ---------------------------------------------------------------------------------------------------------- errors
def wrapped(line: str) -> str:
    return f"func @main(%x: tensor<s0x4xf32>) -> (tensor<s0x4xf32>) {{\n  {line}\n  return %x\n}}\n"


ERRORS = {
    "%y = aten.sillu(%x) : tensor<s0x4xf32>": (8, "unknown op 'aten.sillu'; did you mean 'aten.silu'?"),
    "%y = moe.rout(%x) : tensor<s0x4xf32>": (8, "unknown op 'moe.rout'; did you mean 'moe.route'?"),
    "%y = mo.route(%x) : tensor<s0x4xf32>": (8, "unknown dialect 'mo'"),
    "%y = aten.silu(%xx) : tensor<s0x4xf32>": (18, "%xx is not defined before its use; did you mean %x?"),
    "%y = aten.silu(%y) : tensor<s0x4xf32>": (18, "%y is not defined before its use"),
    "%x = aten.silu(%x) : tensor<s0x4xf32>": (3, "%x is defined twice"),
    "%y, %y = aten.topk(%x) {k = 2} : tensor<1xf32>, tensor<1xi64>": (3, "%y is defined twice"),
    "%y = aten.silu(%x %x) : tensor<s0x4xf32>": (21, "unexpected `%x`, expected `)` or `,`"),
    "%y = aten.silu %x : tensor<s0x4xf32>": (18, "unexpected `%x`, expected `(`"),
    "%y = aten.silu(%x) tensor<s0x4xf32>": (22, "unexpected `tensor`"),
    "%y = aten.silu(%x) : tensor<s0x4xf33>": (24, "unknown element type 'f33' (did you mean 'f32'?)"),
    "%y = aten.silu(%x) : tensor<s0x4>": (24, "unknown element type '4'"),
    "%y = aten.silu(%x) : tensor<99999999999999999999xf32>": (24, "does not fit 64 bits"),
    "%y = aten.silu(%x) : tensor<(s0**2)xf32>": (24, "`s0**2` is not a size: only names, integers, + - * // %, max"),
    "%y = aten.silu(%x) : tensor<(__import__('os'))xf32>": (24, "is not a size"),
    "%y = aten.silu(%x) : tensor<(s0 if s1 else 2)xf32>": (24, "is not a size"),
    "%y = aten.silu(%x) : tensor<(s0*)xf32>": (24, "is not an expression"),
    "%y = aten.silu(%x) : sym<3>": (24, "a symbol is expected"),
    "%y = aten.silu(%x) {a = [1, 2} : tensor<s0x4xf32>": (32, "unexpected `}`, expected `,` or `]`"),
    "%y = aten.silu(%x) {a = 1, a = 2} : tensor<s0x4xf32>": (30, "attribute 'a' is given twice"),
    "%y = aten.silu(%x) {a = 1e999} : tensor<s0x4xf32>": (27, "too large for a float"),
    "%y = aten.silu(%x) {a = 9223372036854775808} : tensor<s0x4xf32>": (27, "does not fit 64 bits"),
    '%y = aten.silu(%x) {a = "\\q"} : tensor<s0x4xf32>': (27, "a bad escape"),
    "%y = aten.silu(%x) {a = if} : tensor<s0x4xf32>": (27, "`if` is not an expression over sizes"),
    "%y = aten.silu(%x) {a = (s0 << 3)} : tensor<s0x4xf32>": (27, "is not a size"),
    "%y = aten.silu(%x) : tensor<s0x4xf32>, tensor<1xf32>": (3, "'aten.silu' has 2 result types for 1 names"),
    "aten.silu(%x) : tensor<s0x4xf32>": (3, "'aten.silu' has 1 results without a name"),
    "%y = aten.silu(%x) : tensor<s0x4xf32> {\nbody():\nyield\n}": (1, "'aten.silu' takes no region"),
    "%y = moe.route(%x) : tensor<4xf32> {\nbdy():\nyield\n}": (1, "region 'bdy': 'moe.route' has 'body' here"),
    "%y = moe.route(%x) : tensor<4xf32> {\nbody(%z: tensor<4xf32>):\nyield %x\n}": (
        7,
        "%x is defined outside of region",
    ),
    'loc "a.py" in "b"': (3, "a location is written"),
    'loc "a.py":99999999999': (14, "too large"),
}


@pytest.mark.parametrize("line", ERRORS)
def test_error(line: str) -> None:
    column, message = ERRORS[line]
    with pytest.raises(CompileError) as raised:
        parse_module(wrapped(line), "a.sparsec")
    (diagnostic,) = raised.value.diagnostics
    first, shown, caret = str(raised.value).splitlines()[:3]
    assert message in diagnostic.message
    assert diagnostic.column == column
    assert first.startswith(f"a.sparsec:{diagnostic.loc.line}:{diagnostic.column}: error: ")
    source = wrapped(line).splitlines()[diagnostic.loc.line - 1]
    assert shown.strip() == source.strip()
    assert shown[caret.index("^") :][:1] == source[diagnostic.column - 1 : diagnostic.column]


def test_error_in_a_function() -> None:
    with pytest.raises(CompileError, match="function @f does not end in `return`"):
        parse_module("func @f() -> () {\n}\n")
    twice = "func @f() -> () {\nreturn\n}\n" * 2
    with pytest.raises(CompileError, match="function @f is defined twice"):
        parse_module(twice)
    with pytest.raises(CompileError, match=r"returns \(\), its head says \(tensor<1xf32>\)"):
        parse_module("func @f() -> (tensor<1xf32>) {\nreturn\n}\n")
    with pytest.raises(CompileError, match="the text ends too early"):
        parse_module("func @f() -> () {\nreturn\n")


@pytest.mark.parametrize("depth", [100, 20_000])
@pytest.mark.parametrize("opening, closing", [("[", "]"), ("{a = ", "}"), ("(", ")"), ("-", "")])
def test_deep_nesting_is_an_error(depth: int, opening: str, closing: str) -> None:
    value = opening * depth + "1" + closing * depth
    for text in (f"module {{a = {value}}}", f'"builtin.module"() ({{}}) {{a = {value}}} : () -> ()'):
        with pytest.raises(CompileError):
            parse_module(text)


def test_deep_regions_are_an_error() -> None:
    depth = 2000
    region = "%y = moe.route() : tensor<1xf32> {\nbody():\n"
    text = "func @f() -> () {\n" + region * depth + "yield\n" + "}\nyield\n" * (depth - 1) + "}\nreturn\n}\n"
    with pytest.raises(CompileError, match="nested more than 64 deep"):
        parse_module(text)


PIECES = [*'{}()[]<>"\\:,=@x\n', "\x00", "\ud800", "é", "%x", "loc ", "loc(", "#loc", "tensor<", "s0*", "//", "none"]
MORE = ["9" * 5000, "1e", "-", "%0:2", "%0#1", "return", "^bb0"]


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_broken_text_ends_in_a_compile_error(seed: int, generic: bool) -> None:
    """Mutants of good texts: deletions, repetitions, exchanges, foreign pieces."""
    rng = random.Random(seed)
    text = GENERIC if generic else EVERYTHING
    for _ in range(rng.randint(1, 4)):
        i, j = sorted(rng.randrange(len(text)) for _ in range(2))
        j = min(j, i + rng.choice([1, 1, 3, 40]))
        k = rng.randrange(len(text))
        change = rng.choice(["delete", "insert", "repeat", "move"])
        if change == "delete":
            text = text[:i] + text[j:]
        elif change == "insert":
            text = text[:i] + rng.choice([*PIECES, *MORE]) + text[i:]
        elif change == "repeat":
            text = text[:k] + text[i:j] + text[k:]
        else:
            text = text[:i] + text[k : k + j - i] + text[j:]
    try:
        module = parse_module(text)
    except CompileError as error:
        assert error.diagnostics[0].column > 0
    else:
        assert equal(parse_module(print_module(module)), module)


GENERIC = print_generic(parse_module(EVERYTHING))


def test_the_grammar_is_installed_beside_the_parser() -> None:
    command = "from sparsec.ir.text import grammar; assert 'OP_NAME' in grammar()"
    assert subprocess.run([sys.executable, "-c", command], cwd=Path(__file__).parents[2], check=False).returncode == 0
