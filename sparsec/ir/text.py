"""What the readers of both text forms share: errors in words, types, names of values.

Text is not trusted: sizes are bounded before they are converted, dimension expressions are checked node by node, and
whatever is wrong ends in one `CompileError` that shows the line.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, NoReturn, TypeAlias

from lark import Lark, Token, Transformer
from lark.exceptions import UnexpectedCharacters, UnexpectedEOF, UnexpectedInput, UnexpectedToken
from lark.lexer import PatternStr

from sparsec.diagnostics import CompileError, Diagnostic
from sparsec.ir.core import Attr, Op, Value
from sparsec.ir.loc import Loc
from sparsec.ir.opdef import OpDef, lookup
from sparsec.ir.types import HANDLE, Dim, DType, Sym, SymType, TensorType, Type

MAX_DEPTH = 64  #: of nested regions, lists and dictionaries
MAX_INT = 2**63 - 1
MAX_EXPRESSION = 400  #: characters of one dimension expression

DTYPES = {dtype.value: dtype for dtype in DType}
WORDS: dict[str, Attr] = {"true": True, "false": False, "none": None, **DTYPES}
TextTransformer: TypeAlias = Transformer[Token, Any]

_WORDS = {
    "RESULTS": "results (`%a, %b =`)",
    "OP_NAME": "an op (`moe.route`)",
    "TERMINATOR": "`return` or `yield`",
    "LOC": 'a location (`loc "file.py":12 in "scope"`)',
    "VALUES": "values (`%a, %b`)",
    "VALUE": "a value (`%a`)",
    "TYPES": "types (`tensor<s0x8xf32>`)",
    "TYPE": "a type (`tensor<s0x8xf32>`)",
    "SYMBOL": "a name (`@main`)",
    "NAME": "a name (of an attribute or region)",
    "KEY": "an attribute's name",
    "FLAT_DICT": "attributes (`{key = value}`)",
    "NUMBER": "a number",
    "WORD": "a word (`true`, `none`, `f32`, a symbol)",
    "SIZE": "a size (`(s0*2)`)",
    "STRING": "a string",
    "ALIAS": "an alias (`#loc = ...`)",
    "BLOCK_NAME": "a block (`^bb0`)",
    "$END": "the end of the text",
}


_PIECE = re.compile(r"\"[^\"\n]*\"?|[%@#^]?[\w.]+|\S")  # what an error shows of the text

_LOC_LINE = re.compile(r"[ \t]*(loc)[ \t]")


class TextError(Exception):
    """Something wrong at an offset of the text; `report` makes it a CompileError."""

    def __init__(self, position: int, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.position, self.message, self.hint = position, message, hint


def report(text: str, filename: str, error: TextError) -> CompileError:
    """The error with file:line:column, the line, and a caret."""
    position = max(0, min(error.position, len(text)))
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    line = text[start : end if end >= 0 else len(text)]
    row, column = text.count("\n", 0, start) + 1, position - start + 1
    first = max(0, column - 80)  # a long line is cut around the caret
    shown = line[first : first + 120]
    caret = "".join("\t" if char == "\t" else " " for char in line[first : column - 1]) + "^"
    excerpt = f"  {shown}\n  {caret}"
    return CompileError(
        [Diagnostic(error.message, Loc(filename, row), excerpt=excerpt, hint=error.hint, column=column)]
    )


@cache
def grammar() -> str:
    """The language specification."""
    return files("sparsec.ir").joinpath("grammar.lark").read_text(encoding="utf-8")


def parse(parser: Lark, text: str, start: str) -> Any:
    """Run a lark parser. Raises: TextError that says what was expected."""
    try:
        return parser.parse(text, start=start)
    except UnexpectedInput as error:
        raise _in_words(parser, text, error) from None


def _in_words(parser: Lark, text: str, error: UnexpectedInput) -> TextError:
    names: Iterable[str] = ()
    position = len(text)
    if isinstance(error, UnexpectedCharacters):
        position, names = error.pos_in_stream or 0, error.allowed or ()
    elif isinstance(error, UnexpectedToken):
        names = error.accepts or error.expected
        if error.token.type != "$END":
            position = error.token.start_pos or 0
    elif isinstance(error, UnexpectedEOF):
        names = error.expected
    if (loc := _LOC_LINE.match(text, text.rfind("\n", 0, position) + 1)) is not None:
        return TextError(loc.start(1), 'a location is written `loc "file.py":12 in "scope"` or `loc unknown`')
    names = set(names) - ({"LBRACE"} if "FLAT_DICT" in names else set())
    words = sorted({_word(parser, name) for name in names} - {""})
    choice = " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    found = _PIECE.search(text, position)
    what = f"unexpected `{found.group()[:40]}`" if found else "the text ends too early"
    return TextError(position, what + (f", expected {choice}" if choice else ""))


def _word(parser: Lark, name: str) -> str:
    if name in _WORDS or name.removeprefix("MLIR_") in _WORDS:
        return _WORDS.get(name) or _WORDS[name.removeprefix("MLIR_")]
    if name in ("COMMENT", "SOURCE", "SEP") or name.startswith("__IGNORE"):
        return ""
    try:
        pattern = parser.get_terminal(name).pattern
    except KeyError:
        return ""
    return f"`{pattern.value}`" if isinstance(pattern, PatternStr) else ""


# ------------------------------------------------------------------------------------------------------- sizes, types
_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_DIM = re.compile(r"(?P<size>\d+)|(?P<name>[A-WYZa-wyz_][A-WYZa-wyz0-9_]*)|(?P<open>\()")
_OPS = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod)


def parse_int(text: str) -> int:
    """An integer of at most 64 bits. Raises: ValueError."""
    if len(text) > 20 or not -MAX_INT - 1 <= (value := int(text)) <= MAX_INT:
        raise ValueError(f"the number {text[:24]} does not fit 64 bits")
    return value


@lru_cache(maxsize=4096)
def parse_dim(text: str) -> Dim:
    """A size: an integer, a symbol, or an expression over symbols with `+ - * // %`, `max` and `min`.

    Raises: ValueError for anything else.
    """
    text = text.strip()
    if text.isdecimal() and text.isascii():
        return parse_int(text)
    if len(text) > MAX_EXPRESSION:
        raise ValueError(f"a size of more than {MAX_EXPRESSION} characters")
    try:
        node = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(f"`{text}` is not an expression over sizes") from None
    _check_dim(node, text)
    return Sym(text)


def _check_dim(node: ast.expr, text: str) -> None:
    match node:
        case ast.Constant(value=int(value)) if not isinstance(value, bool) and value <= MAX_INT:
            return
        case ast.Name(id=name) if name.isascii():
            return
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            _check_dim(operand, text)
        case ast.BinOp(left=left, op=op, right=right) if isinstance(op, _OPS):
            _check_dim(left, text)
            _check_dim(right, text)
        case ast.Call(func=ast.Name(id="max" | "min"), args=[_, _, *_] as args, keywords=[]):
            for arg in args:
                _check_dim(arg, text)
        case _:
            raise ValueError(f"`{text}` is not a size: only names, integers, + - * // %, max and min")


@lru_cache(maxsize=16384)
def parse_type(text: str) -> Type:
    """A type: `tensor<s0x64xbf16>`, `sym<s0>` or `handle`. Raises: ValueError that says what is wrong."""
    if text == "handle":
        return HANDLE
    if text.startswith("sym<") and text.endswith(">"):
        expr = parse_dim(text[4:-1])
        if isinstance(expr, int):
            raise ValueError(f"`{text}`: a symbol is expected, not a number")
        return SymType(expr)
    if not text.startswith("tensor<") or not text.endswith(">"):
        raise ValueError(f"`{text}` is not a type (tensor<s0x8xf32>, sym<s0> or handle)")
    *dims, dtype = split_dims(text[7:-1])
    if dtype not in DTYPES:
        close = difflib.get_close_matches(dtype, DTYPES, n=1)
        known = f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(DTYPES)}"
        raise ValueError(f"unknown element type '{dtype}' ({known})")
    return TensorType(tuple(parse_dim(dim) for dim in dims), DTYPES[dtype])


def split_dims(text: str) -> list[str]:
    """`4x(s0*2)xf32` at its outer `x`: the sizes, then the element type. Raises: ValueError."""
    parts, i = list[str](), 0
    while (match := _DIM.match(text, i)) is not None:
        end = match.end()
        if match["open"]:
            depth = 1
            while depth and end < len(text):
                depth += {"(": 1, ")": -1}.get(text[end], 0)
                end += 1
        if text[end : end + 1] != "x":
            break
        inside = text[i + 1 : end - 1] if match["open"] else text[i:end]
        parts.append(inside)
        i = end + 1
    return [*parts, text[i:]]


# --------------------------------------------------------------------------------------------------- names and classes
class Scope:
    """The values that a region can see. Regions see nothing of what is around them."""

    def __init__(self, outer: Scope | None = None, label: str = "") -> None:
        self.values: dict[str, Value] = {}
        self.outer, self.label = outer, label

    def define(self, name: str, value: Value, token: Token) -> None:
        """Make a name visible that `token` holds. Raises: TextError if it is taken."""
        if name in self.values:
            raise TextError(offset_of(token, name), f"{name} is defined twice")
        self.values[name] = value

    def missing(self, name: str, position: int) -> NoReturn:
        """Explain a name that is not in `values`. Raises: TextError."""
        scope = self.outer
        while scope is not None:
            if name in scope.values:
                takes = f"region '{self.label}'" if self.label else "the region"
                raise TextError(
                    position,
                    f"{name} is defined outside of {takes}, which sees only its own arguments",
                    hint="make it an operand of the op and an argument of the region",
                )
            scope = scope.outer
        close = difflib.get_close_matches(name, self.values, n=1)
        raise TextError(
            position, f"{name} is not defined before its use" + (f"; did you mean {close[0]}?" if close else "")
        )


def op_class(name: str, position: int) -> type[OpDef]:
    """The class of an op. Raises: TextError for an unknown one."""
    try:
        return lookup(name)
    except KeyError as error:
        raise TextError(position, str(error.args[0])) from None


def offset_of(token: Token, name: str) -> int:
    """Where a value's name stands in a token that lists several."""
    found = re.search(re.escape(name.partition("#")[0]) + r"(?![A-Za-z0-9_$.\-])", token)
    return (token.start_pos or 0) + (found.start() if found else 0)


def finish_op(op: Op, results: list[tuple[str, Token]], scope: Scope) -> None:
    """Name and define the results of an op. Raises: TextError if names and results differ in number."""
    if len(results) != len(op.results):
        position = results[0][1].start_pos if results else -1
        raise TextError(position or 0, f"'{op.name}' has {len(op.results)} result types for {len(results)} names")
    for (name, token), value in zip(results, op.results, strict=True):
        value.name = "" if name[1:].isdigit() else name[1:]
        scope.define(name, value, token)
