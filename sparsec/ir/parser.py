"""Reads the text of the IR, in the short or the generic form. `grammar.lark` beside this file is the language.

A text is read in two steps: lark makes plain tuples of tokens, then the builder makes ops in textual order, which
resolves names. Both steps stop at the first problem, with its line, a caret, and what was expected.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any, NamedTuple, cast

from lark import Lark, Token

from sparsec.diagnostics import CompileError
from sparsec.ir.core import Attr, Block, Func, Module, Op, Segments, Value
from sparsec.ir.loc import UNKNOWN, Loc
from sparsec.ir.mlir_reader import is_generic, read_generic
from sparsec.ir.opdef import OpDef
from sparsec.ir.printer import TERMINATORS
from sparsec.ir.text import (
    MAX_DEPTH,
    WORDS,
    Scope,
    TextError,
    TextTransformer,
    finish_op,
    grammar,
    offset_of,
    op_class,
    parse,
    parse_dim,
    parse_int,
    parse_type,
    report,
)
from sparsec.ir.types import Type

_KEYWORDS = {keyword: name for name, keyword in TERMINATORS.items()}


def parse_module(text: str, filename: str = "<text>") -> Module:
    """The module that a text in either form describes.

    The result is as well formed as its text: `sparsec.ir.verify` checks what the ops mean.

    Raises:
        CompileError: with file:line:column, the line, a caret, and what was expected.
    """
    try:
        if is_generic(text):
            return read_generic(text)
        return _Builder().module(parse(_lark(), text, "module"))
    except TextError as error:
        raise report(text, filename, error) from None


# ------------------------------------------------------------------------------------------------ step one: to tuples
class _RawOp(NamedTuple):
    results: Token | None
    name: Token
    arguments: list[Any]  # VALUES tokens, None for a hole, lists of both
    attrs: Any
    types: Token | None
    regions: list[_RawRegion]


class _RawRegion(NamedTuple):
    label: Token
    params: list[tuple[Token, Token, Any]]
    items: list[_RawOp | Token]


class _RawFunc(NamedTuple):
    name: Token
    params: list[tuple[Token, Token, Any]]
    returned: list[tuple[Token, Any]]
    attrs: Any
    items: list[_RawOp | Token]


class _Pairs(list[tuple[Token, Any]]):
    """A dictionary that is not yet checked."""


class _ToTuples(TextTransformer):
    """What lark calls as it reduces each rule; children that are left out are None."""

    def module(self, children: list[Any]) -> list[Any]:
        return children

    def func(self, children: list[Any]) -> _RawFunc:
        name, params, returned, attrs, *items = children
        return _RawFunc(name, params or [], returned, attrs, items)

    def params(self, children: list[Any]) -> list[Any]:
        return children

    def param(self, children: list[Any]) -> tuple[Any, ...]:
        return tuple(children)

    def returns(self, children: list[Any]) -> list[Any]:
        return [child for child in children if child is not None]

    returned = param

    def op(self, children: list[Any]) -> _RawOp:
        results, name, arguments, attrs, types, regions = children
        return _RawOp(results, name, arguments, attrs, types, regions or [])

    def terminator(self, children: list[Any]) -> _RawOp:
        keyword, values, attrs = children
        return _RawOp(None, keyword, [values] if values else [], attrs, None, [])

    def regions(self, children: list[Any]) -> list[Any]:
        return children

    def region(self, children: list[Any]) -> _RawRegion:
        label, params, *items = children
        return _RawRegion(label, params or [], items)

    def arguments(self, children: list[Any]) -> list[Any]:
        return [child for child in children if child is not None]

    operand_list = arguments

    def hole(self, children: list[Any]) -> str:
        return ""

    def pairs(self, children: list[Any]) -> _Pairs:
        return _Pairs(child for child in children if child is not None)

    dict = pairs
    pair = param

    def list(self, children: list[Any]) -> list[Any]:
        return [child for child in children if child is not None]


@cache
def _lark() -> Lark:
    return Lark(grammar(), start=["module", "dict"], parser="lalr", transformer=_ToTuples())


# ------------------------------------------------------------------------------------------------- attributes and locs
def _attrs(raw: Any, depth: int = 0) -> dict[str, Attr]:
    """Attributes of a FLAT_DICT token or of checked pairs; None gives {}."""
    if raw is None:
        return {}
    if isinstance(raw, Token):
        try:
            return dict(_flat(str(raw)))
        except TextError as error:
            raise TextError((raw.start_pos or 0) + error.position, error.message, error.hint) from None
    attrs: dict[str, Attr] = {}
    for key, value in cast(_Pairs, raw):
        name = _string(key) if key.type == "STRING" else str(key)
        if name in attrs:
            raise TextError(key.start_pos or 0, f"attribute '{name}' is given twice")
        attrs[name] = _value(value, key, depth + 1)
    return attrs


@lru_cache(maxsize=8192)
def _flat(text: str) -> Mapping[str, Attr]:
    return _attrs(parse(_lark(), text, "dict"))


def _value(raw: Any, near: Token, depth: int) -> Attr:
    if depth > MAX_DEPTH:
        raise TextError(near.start_pos or 0, f"attribute '{near}' is nested more than {MAX_DEPTH} deep")
    if isinstance(raw, _Pairs):
        return _attrs(raw, depth)
    if isinstance(raw, list):
        return tuple(_value(item, near, depth + 1) for item in cast("list[Any]", raw))
    token = cast(Token, raw)
    try:
        match token.type:
            case "NUMBER":
                return _number(token)
            case "WORD":
                return WORDS[token] if token in WORDS else parse_dim(token)
            case "STRING":
                return _string(token)
            case _:
                return parse_dim(token[1:-1])
    except ValueError as error:
        raise TextError(token.start_pos or 0, str(error)) from None


def _number(text: str) -> int | float:
    if text.lstrip("-").isdigit():
        return parse_int(text)
    value = float(text)
    if math.isinf(value) and "inf" not in text:
        raise ValueError(f"the number {text[:24]} is too large for a float")
    return value


def _string(token: Token) -> str:
    if "\\" not in token:
        return token[1:-1]
    try:
        return cast(str, json.loads(token, strict=False))
    except ValueError:
        raise TextError(
            token.start_pos or 0, 'a bad escape: a string is written as in JSON (\\n, \\", \\u00e9)'
        ) from None


_PLACE = re.compile(r'("(?:[^"\\\n]|\\.)*"):(\d+)(?:[ \t]+in[ \t]+("(?:[^"\\\n]|\\.)*"))?')
_LINE = re.compile(r"\d+")
_FUSED = re.compile(r"[ \t]+fused[ \t]*\[")


def _loc(token: Token) -> Loc:
    """The location of a LOC token, with the source line that follows it."""
    first = _PLACE.match(token, 4 + len(token[4:]) - len(token[4:].lstrip()))
    if first is None:
        return UNKNOWN
    leader, origins = _place(first, token), list[Loc]()
    end = first.end()
    if (fused := _FUSED.match(token, end)) is not None:
        end = fused.end()
        while token[end] != "]":
            if (place := _PLACE.match(token, end)) is not None:
                origins.append(_place(place, token))
                end = place.end()
            elif (line := _LINE.match(token, end)) is not None:
                origins.append(Loc(leader.file, _line_number(line, token), leader.scope))
                end = line.end()
            else:
                end += 1
    source = token.partition("//")[2] if "//" not in token[:end] else token[end:].partition("//")[2]
    return Loc(leader.file, leader.line, leader.scope, source.strip(), tuple(origins))


def _place(match: re.Match[str], token: Token) -> Loc:
    file, _, scope = match.groups()
    quote = token.update  # a token of the same place, for errors
    line = _line_number(match, token, 2)
    return Loc(_string(quote(value=file)), line, _string(quote(value=scope)) if scope else "")


def _line_number(match: re.Match[str], token: Token, group: int = 0) -> int:
    digits = match[group]
    if len(digits) > 9:
        raise TextError((token.start_pos or 0) + match.start(group), f"the line number {digits[:12]} is too large")
    return int(digits)


# -------------------------------------------------------------------------------------------------- step two: to the IR
class _Builder:
    """Makes a module of the tuples."""

    def __init__(self) -> None:
        self._types: dict[str, tuple[Type, ...]] = {}
        self._classes: dict[str, type[OpDef]] = {}
        self._attrs: dict[str, dict[str, Attr]] = {}

    def module(self, children: list[Any]) -> Module:
        attrs, *items = children
        module, loc = Module(attrs=_attrs(attrs)), UNKNOWN
        for item in items:
            if isinstance(item, Token):
                loc = _loc(item)
                continue
            func = self.func(item, loc)
            loc = UNKNOWN
            if func.name in module.funcs:
                raise TextError(item.name.start_pos, f"function @{func.name} is defined twice")
            module.funcs[func.name] = func
        return module

    def func(self, raw: _RawFunc, loc: Loc) -> Func:
        name = raw.name[1:]
        if name.startswith('"'):
            name = _string(raw.name.update(value=name))
        scope = Scope()
        body = self.params(raw.params, scope)
        func = Func(name, body, _attrs(raw.attrs), loc)
        for value, (_, _, attrs) in zip(body.args, raw.params, strict=True):
            if attrs is not None:
                func.arg_attrs[value] = _attrs(attrs)
        self.items(raw.items, body, scope, loc, 0)
        if not body.ops or body.ops[-1].name != "func.return":
            raise TextError(raw.name.start_pos or 0, f"function @{name} does not end in `return`")
        returned = tuple(self.types(type)[0] for type, _ in raw.returned)
        if returned != func.result_types:
            given = ", ".join(map(str, func.result_types))
            wanted = ", ".join(map(str, returned))
            raise TextError(raw.name.start_pos or 0, f"function @{name} returns ({given}), its head says ({wanted})")
        func.result_attrs = {i: _attrs(attrs) for i, (_, attrs) in enumerate(raw.returned) if attrs is not None}
        return func

    def params(self, params: list[tuple[Token, Token, Any]], scope: Scope) -> Block:
        block = Block()
        for name, type, _ in params:
            hint = name[1:]
            value = block.add_arg(self.types(type)[0], "" if hint.isdigit() else hint)
            scope.define(str(name), value, name)
        return block

    def items(self, items: list[_RawOp | Token], block: Block, scope: Scope, loc: Loc, depth: int) -> None:
        for item in items:
            if isinstance(item, Token):
                loc = _loc(item)
            else:
                block.append(self.op(item, scope, loc, depth))

    def op(self, raw: _RawOp, scope: Scope, loc: Loc, depth: int) -> Op:
        name = _KEYWORDS.get(raw.name) or str(raw.name)
        cls = self._classes.get(name)
        if cls is None:
            cls = self._classes[name] = op_class(name, raw.name.start_pos or 0)
        operands, segments = self.operands(raw.arguments, scope)
        types = self.types(raw.types) if raw.types is not None else ()
        if raw.name in _KEYWORDS:
            loc = UNKNOWN
        op: OpDef = object.__new__(cls)
        regions = self.regions(raw, cls, scope, loc, depth + 1) if raw.regions else ()
        Op.__init__(op, name, operands, types, self.attrs(raw.attrs), regions, loc, segments)
        if raw.results is not None or types:
            self.results(raw, op, scope)
        return op

    def results(self, raw: _RawOp, op: Op, scope: Scope) -> None:
        if raw.results is None:
            raise TextError(raw.name.start_pos or 0, f"'{op.name}' has {len(op.results)} results without a name")
        names = _split(raw.results[:-1])
        finish_op(op, [(name, raw.results) for name in names], scope)

    def operands(self, arguments: list[Any], scope: Scope) -> tuple[list[Value], Segments | None]:
        operands, segments, plain = list[Value](), list[int | tuple[int, ...]](), True
        for argument in arguments:
            if isinstance(argument, Token):
                found = self.values(argument, scope)
                operands += found
                segments += [1] * len(found)
            elif isinstance(argument, list):
                plain = False
                inner, holes = self.operands(cast("list[Any]", argument), scope)
                operands += inner
                segments.append(tuple(cast("tuple[int, ...]", holes)) if holes is not None else (1,) * len(inner))
            else:
                plain = False
                segments.append(0)
        return operands, None if plain else tuple(segments)

    def values(self, token: Token, scope: Scope) -> list[Value]:
        known = scope.values
        try:
            return [known[name] for name in _split(token)]
        except KeyError as error:
            scope.missing(error.args[0], offset_of(token, error.args[0]))

    def attrs(self, raw: Any) -> dict[str, Attr]:
        return _attrs(raw)

    def types(self, token: Token) -> tuple[Type, ...]:
        types = self._types.get(token)
        if types is None:
            found = list[Type]()
            for match in re.finditer(r"(?:tensor|sym)<[^<>\n]*>|handle\b", token):
                try:
                    found.append(parse_type(match.group()))
                except ValueError as error:
                    raise TextError((token.start_pos or 0) + match.start(), str(error)) from None
            types = self._types[str(token)] = tuple(found)
        return types

    def regions(self, raw: _RawOp, cls: type[OpDef], scope: Scope, loc: Loc, depth: int) -> list[Block]:
        declared = cls.fields().regions
        if depth > MAX_DEPTH:
            raise TextError(raw.name.start_pos or 0, f"regions are nested more than {MAX_DEPTH} deep")
        if not declared:
            raise TextError(raw.regions[0].label.start_pos or 0, f"'{raw.name}' takes no region")
        for i, region in enumerate(raw.regions):
            if i >= len(declared) or region.label != declared[i]:
                expected = f"'{declared[i]}'" if i < len(declared) else "no further region"
                raise TextError(
                    region.label.start_pos or 0, f"region '{region.label}': '{raw.name}' has {expected} here"
                )
        blocks = list[Block]()
        for region in raw.regions:
            inner = Scope(scope, str(region.label))
            block = self.params(region.params, inner)
            for _, _, attrs in region.params:
                if attrs is not None:
                    raise TextError(region.label.start_pos or 0, "the arguments of a region have no attributes")
            self.items(region.items, block, inner, loc, depth)
            blocks.append(block)
        return blocks


def _split(token: str) -> list[str]:
    """The names in a list of values."""
    if "," not in token:
        return [token.strip()]
    return [name.strip() for name in token.split(",")]


__all__ = ["CompileError", "parse_module"]
