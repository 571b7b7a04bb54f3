"""Reads the generic text form: what `sparsec.ir.mlir` writes, and what MLIR's own printer makes of it.

Accepted besides are the custom syntax of `module`, `func.func` and `return`, result groups (`%0:2`, `%0#1`),
attributes in `<{...}>`, location aliases, and locations of block arguments (which are dropped).
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any, NamedTuple, cast

from lark import Lark, Token

from sparsec.ir.core import Attr, Block, Func, Module, Op, Segments, Value
from sparsec.ir.equal import attr_key
from sparsec.ir.irdl import segments_of
from sparsec.ir.loc import UNKNOWN, Loc, fuse
from sparsec.ir.mlir import OPERAND_SIZES, PREFIX, REGION_YIELD, RESULT_SIZES, SEGMENTS, YIELD
from sparsec.ir.opdef import OpDef
from sparsec.ir.text import (
    DTYPES,
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
    split_dims,
)
from sparsec.ir.types import HANDLE, Dim, DType, Sym, SymType, TensorType, Type

_INHERENT = frozenset({"sym_name", "function_type", "arg_attrs", "res_attrs", "sym_visibility"})
_HEAD = re.compile(
    r'(?:\s|//[^\n]*\n)*(?:["#]|func\.func\b|module\s+attributes\b|module\s*\{\s*(?:func\.func\b|\}\s*\Z))'
)


def is_generic(text: str) -> bool:
    """Whether a text is in the generic form, by how it begins."""
    return _HEAD.match(text) is not None


class _RawOp(NamedTuple):
    results: Token | None
    name: Token
    operands: Token | None
    attrs: list[tuple[Token, Any]]
    regions: list[_RawRegion]
    operand_types: Token | None
    result_types: Token | None
    loc: Token | None


class _RawRegion(NamedTuple):
    params: list[_RawParam]
    ops: list[_RawOp]


class _RawParam(NamedTuple):
    name: Token
    type: Token
    attrs: _Pairs | None
    loc: Token | None


class _Pairs(list[tuple[Token, Any]]):
    """A dictionary that is not yet checked."""


class _Signature(NamedTuple):
    operands: Token | None
    results: Token | None


class _ToTuples(TextTransformer):
    """Brings the forms in which MLIR prints modules and functions to the generic one."""

    def mlir(self, children: list[Any]) -> list[Any]:
        return children

    def mlir_generic(self, children: list[Any]) -> _RawOp:
        results, name, operands, properties, regions, attrs, signature, loc = children
        pairs = [*(properties or ()), *(attrs or ())]
        return _RawOp(results, name, operands, pairs, regions or [], signature.operands, signature.results, loc)

    def mlir_region(self, children: list[Any]) -> _RawRegion:
        label, *ops = children
        return _RawRegion(label or [], ops)

    def mlir_label(self, children: list[Any]) -> list[Any]:
        return children[1] or []

    def mlir_param(self, children: list[Any]) -> _RawParam:
        return _RawParam(*children)

    def signature(self, children: list[Any]) -> _Signature:
        operands, results = children
        return _Signature(operands[0], results[0] if isinstance(results, list) else results)

    def mlir_module(self, children: list[Any]) -> _RawOp:
        attrs, *ops, loc = children
        name = Token("STRING", '"builtin.module"')
        return _RawOp(None, name, None, attrs or [], [_RawRegion([], ops)], None, None, loc)

    def mlir_func(self, children: list[Any]) -> _RawOp:
        symbol, params, returned, attrs, *ops, loc = children
        params = params or []
        name = symbol.update(type="STRING", value=symbol[1:] if symbol[1] == '"' else f'"{symbol[1:]}"')
        pairs = [
            (Token("KEY", "sym_name"), name),
            (Token("KEY", "arg_attrs"), [param.attrs or _Pairs() for param in params]),
            (Token("KEY", "res_attrs"), returned or []),
            *(attrs or ()),
        ]
        return _RawOp(None, symbol.update(value='"func.func"'), None, pairs, [_RawRegion(params, ops)], None, None, loc)

    def mlir_returns(self, children: list[Any]) -> list[Any]:
        found = list[Any]()
        for child in filter(None, children):
            types, attrs = (child, None) if isinstance(child, Token) else child
            alone = len(_types(str(types))) - 1  # a token holds as many types as stand together
            found += [*(_Pairs() for _ in range(alone)), attrs or _Pairs()]
        return found

    def mlir_returned(self, children: list[Any]) -> list[Any]:
        return children

    def mlir_return(self, children: list[Any]) -> _RawOp:
        operands, types, loc = children
        return _RawOp(None, Token("STRING", '"func.return"'), operands, [], [], types, None, loc)

    def mlir_list(self, children: list[Any]) -> list[Any]:
        return [child for child in children if child is not None]

    def mlir_attrs(self, children: list[Any]) -> _Pairs:
        return _Pairs(child for child in children if child is not None)

    def mlir_pair(self, children: list[Any]) -> tuple[Any, ...]:
        return tuple(children)

    type_list = mlir_params = mlir_regions = mlir_returned


@cache
def _lark() -> Lark:
    return Lark(grammar(), start="mlir", parser="lalr", transformer=_ToTuples())


def read_generic(text: str) -> Module:
    """The module that a text in the generic form describes. Raises: TextError."""
    aliases, ops = dict[str, str](), list[_RawOp]()
    for item in parse(_lark(), text, "mlir"):
        if isinstance(item, Token):
            name, _, value = item.partition(" = ")
            aliases[name] = value
        else:
            ops.append(item)
    reader = _Reader(aliases)
    module = Module()
    if len(ops) == 1 and ops[0].name == '"builtin.module"':
        module.attrs = _unprefixed(reader.attrs(ops[0].attrs))
        ops = [op for region in ops[0].regions for op in region.ops]
    for raw in ops:
        if raw.name != '"func.func"':
            raise TextError(raw.name.start_pos or 0, f"{raw.name} outside of a function")
        func = reader.func(raw)
        if func.name in module.funcs:
            raise TextError(raw.name.start_pos or 0, f"function @{func.name} is defined twice")
        module.funcs[func.name] = func
    return module


class _Reader:
    """Makes IR of the tuples."""

    def __init__(self, aliases: Mapping[str, str]) -> None:
        self._aliases = aliases

    def func(self, raw: _RawOp) -> Func:
        attrs = self.attrs(raw.attrs)
        name = attrs.get("sym_name")
        position = raw.name.start_pos or 0
        if not isinstance(name, str) or len(raw.regions) != 1:
            raise TextError(position, "a function needs `sym_name` and one region")
        body, _ = self.block(raw.regions[0], Scope(), 0)
        if not body.ops or body.ops[-1].name != "func.return":
            raise TextError(position, f"function @{name} does not end in `func.return`")
        func = Func(name, body, _unprefixed(attrs), self.loc(raw.loc))
        args = self.attrs_of_each(attrs.get("arg_attrs"), len(body.args), "arg_attrs", position)
        results = self.attrs_of_each(attrs.get("res_attrs"), len(body.ops[-1].operands), "res_attrs", position)
        func.arg_attrs = {arg: given for arg, given in zip(body.args, args, strict=True) if given}
        func.result_attrs = {i: given for i, given in enumerate(results) if given}
        return func

    def attrs_of_each(self, attr: Attr, count: int, what: str, position: int) -> list[dict[str, Attr]]:
        if not attr:
            return [{}] * count
        if not isinstance(attr, tuple) or len(attr) != count or not all(isinstance(one, dict) for one in attr):
            raise TextError(position, f"`{what}` must be a list of {count} dictionaries")
        return [_unprefixed(cast("dict[str, Attr]", one)) for one in attr]

    def block(self, raw: _RawRegion, scope: Scope, depth: int) -> tuple[Block, Scope]:
        block = Block()
        for param in raw.params:
            hint = param.name[1:]
            value = block.add_arg(self.types(param.type)[0], "" if hint.isdigit() else hint)
            scope.define(str(param.name), value, param.name)
        for op in raw.ops:
            block.append(self.op(op, scope, depth))
        return block, scope

    def op(self, raw: _RawOp, scope: Scope, depth: int) -> Op:
        position = raw.name.start_pos or 0
        if depth > MAX_DEPTH:
            raise TextError(position, f"regions are nested more than {MAX_DEPTH} deep")
        name = YIELD if raw.name[1:-1] == REGION_YIELD else raw.name[1:-1]
        cls = op_class(name, position)
        operands = self.operands(raw.operands, scope)
        given = self.types(raw.operand_types)
        if given != tuple(value.type for value in operands):
            raise TextError(position, f"'{name}': the types of its operands differ from the values'")
        attrs = self.attrs(raw.attrs)
        sizes, grouped = self.sizes(cls, attrs, len(operands), position), attrs.pop(SEGMENTS, None)
        segments = sizes if grouped is None else self.segments(grouped, len(operands), position)
        for key, default in cls.fields().defaults.items():
            if key in attrs and attr_key(attrs[key]) == attr_key(default):
                del attrs[key]
        given_regions = list(raw.regions)
        while len(given_regions) > cls.fields().required_regions and given_regions[-1] == _RawRegion([], []):
            given_regions.pop()  # left out
        regions = [self.block(region, Scope(scope), depth + 1)[0] for region in given_regions]
        op: OpDef = object.__new__(cls)
        Op.__init__(op, name, operands, self.types(raw.result_types), attrs, regions, self.loc(raw.loc), segments)
        self.results(raw, op, scope)
        return op

    def operands(self, token: Token | None, scope: Scope) -> list[Value]:
        found = list[Value]()
        for name in re.split(r"\s*,\s*", token) if token else ():
            value = scope.values.get(name)
            if value is None:
                scope.missing(name, offset_of(cast(Token, token), name))
            found.append(value)
        return found

    def results(self, raw: _RawOp, op: Op, scope: Scope) -> None:
        if raw.results is None:
            return
        names = list[tuple[str, Token]]()
        groups = [group.strip().partition(":") for group in raw.results[:-1].split(",")]
        for base, _, count in groups:
            if len(count) > 6:
                raise TextError(raw.results.start_pos or 0, f"{base} has too many results")
            names += [(base if not count else f"{base}#{i}", raw.results) for i in range(int(count or 1))]
        finish_op(op, names, scope)
        for value in op.results:
            hint = value.name.partition("#")[0]
            value.name = "" if hint.isdigit() else hint
        for base, _, count in groups:
            if not count:  # `%a` is also `%a#0`
                scope.values[f"{base}#0"] = scope.values[base]
            elif count == "1":
                scope.values[base] = scope.values[f"{base}#0"]

    def sizes(self, cls: type[OpDef], attrs: dict[str, Attr], count: int, position: int) -> Segments | None:
        """Take segment sizes out of the attributes: what they say of `count` operands. Those of results say nothing."""
        attrs.pop(RESULT_SIZES, None)
        sizes = attrs.pop(OPERAND_SIZES, None)
        if sizes is None:
            return None
        declared = cls.fields().operands
        closed = sum(kind != "Operands" for kind in declared.values())
        numbers = [size for size in sizes if type(size) is int] if isinstance(sizes, tuple) else []
        if sum(numbers) != count or len(numbers) < len(declared) or max(numbers[:closed], default=0) > 1:
            raise TextError(
                position, f"`{OPERAND_SIZES}` must say how many of {count} operands each of {len(declared)} has"
            )
        return segments_of(cls, numbers)

    def segments(self, attr: Attr, count: int, position: int) -> Segments | None:
        flags: list[Any] = []
        for item in attr if isinstance(attr, tuple) else (None,):
            flags += item if isinstance(item, tuple) else [item]
        if not all(type(flag) is int and flag in (0, 1) for flag in flags) or sum(flags) != count:
            raise TextError(position, f"`{SEGMENTS}` must be 0s, 1s and lists of these that count {count} operands")
        return cast(Segments, attr)

    def attrs(self, pairs: list[tuple[Token, Any]], depth: int = 0) -> dict[str, Attr]:
        attrs: dict[str, Attr] = {}
        for key, value in pairs:
            name = _unquote(key) if key.type == "STRING" else str(key)
            if name in attrs:
                raise TextError(key.start_pos or 0, f"attribute '{name}' is given twice")
            attrs[name] = self.value(value, key, depth + 1)
        return attrs

    def value(self, raw: Any, near: Token, depth: int) -> Attr:
        if depth > MAX_DEPTH:
            raise TextError(near.start_pos or 0, f"attribute '{near}' is nested more than {MAX_DEPTH} deep")
        if isinstance(raw, _Signature):
            return None  # a function's type: its arguments and its return say the same
        if isinstance(raw, _Pairs):
            return self.attrs(raw, depth)
        if isinstance(raw, list):
            return tuple(self.value(item, near, depth + 1) for item in cast("list[Any]", raw))
        try:
            return _scalar(cast(Token, raw))
        except ValueError as error:
            raise TextError(cast(Token, raw).start_pos or 0, str(error)) from None

    def types(self, token: Token | None) -> tuple[Type, ...]:
        try:
            return _types(str(token)) if token else ()
        except ValueError as error:
            raise TextError(cast(Token, token).start_pos or 0, str(error)) from None

    def loc(self, token: Token | None) -> Loc:
        if token is None:
            return UNKNOWN
        reader = _LocReader(token, self._aliases)
        loc = reader.location(0)
        source = token[reader.end() :].partition("//")[2].strip()
        return Loc(loc.file, loc.line, loc.scope, source, loc.origins) if source else loc


def _unprefixed(attrs: Mapping[str, Attr]) -> dict[str, Attr]:
    return {key.removeprefix(PREFIX): value for key, value in attrs.items() if key not in _INHERENT}


@lru_cache(maxsize=16384)
def _types(text: str) -> tuple[Type, ...]:
    """Types of a comma list. Raises: ValueError."""
    found = re.findall(r'(tensor|!sparsec\.sym)<((?:[^<>"]|complex<f32>|"[^"]*")*)>|(!sparsec\.handle)\b', text)
    return tuple(
        HANDLE if handle else _tensor(body) if kind == "tensor" else SymType(_symbol(body[1:-1]))
        for kind, body, handle in found
    )


def _tensor(body: str) -> TensorType:
    main, _, encoding = body.partition(",")
    *dims, dtype = split_dims(main.replace("?", "_").replace("complex<f32>", DType.c64.value).strip())
    symbols = re.findall(r'"([^"]*)"', encoding)
    if len(symbols) != dims.count("_"):
        raise ValueError(f'tensor<{body}>: each `?` needs its symbol, as in tensor<?x4xf32, ["s0"]>')
    if dtype not in DTYPES:
        raise ValueError(f"unknown element type '{dtype}' (there are: {', '.join(DTYPES)})")
    names = iter(symbols)
    shape: list[Dim] = [_symbol(next(names)) if dim == "_" else parse_dim(dim) for dim in dims]
    return TensorType(tuple(shape), DTYPES[dtype])


def _symbol(text: str) -> Sym:
    dim = parse_dim(text)
    if isinstance(dim, int):
        raise ValueError(f'"{text}" is not a symbol')
    return dim


def _scalar(token: Token) -> Attr:
    match token.type:
        case "MLIR_NUMBER":
            return _number(token)
        case "MLIR_SYM":
            return _symbol(token.partition('"')[2][:-2])
        case "MLIR_COMPLEX":
            return DType.c64
        case "MLIR_SIZES":
            return tuple(parse_int(digits) for digits in re.findall(r"\d+", token.partition(":")[2]))
        case "STRING":
            return _unquote(token)
        case _:
            if token not in WORDS:
                raise ValueError(f"`{token}` is no attribute that sparsec has")
            return WORDS[token]


def _number(token: str) -> int | float:
    digits, _, suffix = (part.strip() for part in token.partition(":"))
    if digits.startswith("0x") and suffix == "f64" and len(digits) == 18:
        return float(struct.unpack(">d", bytes.fromhex(digits[2:]))[0])
    if digits.lstrip("-").isdigit():
        return parse_int(digits)
    value = float(digits) if "0x" not in digits else math.inf
    if math.isinf(value):
        raise ValueError(f"`{token[:40]}` is no number that sparsec has")
    return value


def _unquote(token: Token) -> str:
    return _bytes(str(token), token.start_pos or 0)


_ESCAPE = re.compile(rb'\\(?:([0-9A-Fa-f]{2})|(n)|(t)|(["\\]))|(\\)')


def _bytes(quoted: str, position: int) -> str:
    def decode(match: re.Match[bytes]) -> bytes:
        code, newline, tab, plain, bad = match.groups()
        if bad is not None:
            raise TextError(position, "a bad escape: MLIR writes a byte as two hex digits (\\0A)")
        return bytes.fromhex(code.decode()) if code else b"\n" if newline else b"\t" if tab else plain

    try:
        return _ESCAPE.sub(decode, quoted[1:-1].encode("utf-8", "surrogatepass")).decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise TextError(position, "a string that is not UTF-8") from None


_LOC_TOKEN = re.compile(r'\s*("(?:[^"\\\n]|\\.)*"|#\w+|\w+|[^\s])')


class _LocReader:
    """Reads `loc(...)`: a file's place, a name around one, several fused, or an alias of any."""

    def __init__(self, token: str, aliases: Mapping[str, str], position: int | None = None) -> None:
        self.token, self.aliases, self.i = token, aliases, 4
        self.position = getattr(token, "start_pos", 0) if position is None else position

    def next(self) -> str:
        match = _LOC_TOKEN.match(self.token, self.i)
        if match is None:
            raise TextError(self.position, "a location that does not end")
        self.i = match.end()
        return match[1]

    def peek(self) -> str:
        match = _LOC_TOKEN.match(self.token, self.i)
        return match[1] if match else ""

    def end(self) -> int:
        """One past the closing bracket."""
        return self.token.index(")", self.i) + 1 if ")" in self.token[self.i :] else len(self.token)

    def location(self, depth: int) -> Loc:
        word = self.next()
        if depth > MAX_DEPTH:
            raise TextError(self.position, f"a location nested more than {MAX_DEPTH} deep")
        if word == "unknown":
            return UNKNOWN
        if word.startswith("#"):
            if not self.aliases.get(word, "").startswith("loc("):
                raise TextError(self.position, f"no location is named {word}")
            return _LocReader(self.aliases[word], self.aliases, self.position).location(depth + 1)
        if word == "fused":
            while self.next() != "[":
                continue
            places = [self.location(depth + 1)]
            while self.next() == ",":
                places.append(self.location(depth + 1))
            return fuse(places)
        if not word.startswith('"'):
            raise TextError(self.position, f"`{word}` is no location that sparsec has")
        name = _bytes(word, self.position)
        if self.peek() == ":":
            self.next()
            line, _, _ = self.next(), self.next(), self.next()
            if not line.isdigit() or len(line) > 9:
                raise TextError(self.position, f"`{line[:12]}` is no line number")
            return Loc(name, int(line))
        if self.peek() == "(":
            self.next()
            place = self.location(depth + 1)
            self.next()
            return Loc(place.file, place.line, name, "", place.origins) if place else UNKNOWN
        return UNKNOWN
