"""The generic text form, which is MLIR: real MLIR tools read it with unregistered dialects allowed.

What MLIR has no word for is kept so: a symbolic size is `?` with the tensor's encoding naming the symbols
(`tensor<?x64xf32, ["s0"]>`); a symbol as an attribute is `#sparsec.expr<"s0*2">`, as a type `!sparsec.sym<"s0">`; a
module path is a named location around the file's; attributes of functions and arguments are prefixed `sparsec.`; the
user's line is a comment, which other tools drop.

Other tools know no defaults: attributes of our ops are all spelled out, and a region that is left out is empty. How
many values an optional operand has is in `operandSegmentSizes` (see `sparsec.ir.irdl`); holes and lists of operands of
other ops are in `operand_segments`. Regions end in `region.yield`, of a dialect that nobody registers: MLIR takes no op
that IRDL defines for a terminator.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping
from typing import cast

from sparsec.ir.core import Attr, Block, Func, Module, Op
from sparsec.ir.irdl import Places, places, segment_sizes, segments_of
from sparsec.ir.loc import Loc
from sparsec.ir.opdef import OpDef
from sparsec.ir.printer import Names, format_float, one_line
from sparsec.ir.types import DType, HandleType, Sym, SymType, Type

PREFIX = "sparsec."  #: of attributes of modules, functions and arguments, which MLIR wants in a dialect
SEGMENTS = "operand_segments"
YIELD, REGION_YIELD = "moe.yield", "region.yield"
OPERAND_SIZES, RESULT_SIZES = "operandSegmentSizes", "resultSegmentSizes"


def print_generic(module: Module) -> str:
    """The module as MLIR, ending in a newline."""
    lines = ['"builtin.module"() ({']
    open_places = places(module)
    for func in module.funcs.values():
        _Writer(lines, open_places).func(func)
    attrs = _prefixed(module.attrs)
    lines.append(f"}}) {_dict(attrs)} : () -> () loc(unknown)" if attrs else "}) : () -> () loc(unknown)")
    return "\n".join(lines) + "\n"


class _Writer:
    def __init__(self, lines: list[str], open_places: Places) -> None:
        self.lines, self.names, self.open_places = lines, Names(), open_places

    def func(self, func: Func) -> None:
        self.lines.append('  "func.func"() ({')
        self.block(func.body, "  ")
        args, results = [arg.type for arg in func.body.args], func.result_types
        attrs = {"sym_name": _string(func.name), "function_type": _signature(args, results)}
        if any(func.arg_attrs.values()):
            attrs["arg_attrs"] = _list(_dict(_prefixed(func.arg_attrs.get(arg, {}))) for arg in func.body.args)
        if any(func.result_attrs.values()):
            attrs["res_attrs"] = _list(_dict(_prefixed(func.result_attrs.get(i, {}))) for i in range(len(results)))
        self.lines.append(f"  }}) {_dict(attrs | _prefixed(func.attrs))} : () -> () {_location(func.loc)}")

    def block(self, block: Block, indent: str) -> None:
        args = ", ".join(f"{self.names.define(arg)}: {format_type(arg.type)}" for arg in block.args)
        self.lines.append(f"{indent}^bb0({args}):" if args else f"{indent}^bb0:")
        for op in block.ops:
            self.op(op, indent + "  ")

    def op(self, op: Op, indent: str) -> None:
        first = len(self.lines)
        name = REGION_YIELD if op.name == YIELD else op.name
        text = f'"{name}"({", ".join(map(self.names.of, op.operands))})'
        fields = op.fields() if isinstance(op, OpDef) else None
        given = op.attrs if fields is None else fields.defaults | op.attrs
        attrs = {key: _attr(value) for key, value in given.items()} | self.sizes(op)
        signature = _signature([v.type for v in op.operands], [v.type for v in op.results])
        tail = f"{' ' + _dict(attrs) if attrs else ''} : {signature} {_location(op.loc)}"
        self.lines.append("")
        left_out = max(0, (0 if fields is None else len(fields.regions)) - len(op.regions))
        for i, region in enumerate([*op.regions, *[None] * left_out]):
            if i:
                self.lines.append(f"{indent}}}, {{")
            if region is not None:
                mark = self.names.enter()
                self.block(region, indent)
                self.names.leave(mark)
        names = ", ".join(map(self.names.define, op.results))
        head = f"{indent}{names} = {text}" if names else indent + text
        if op.regions or left_out:
            self.lines[first] = head + " ({"
            self.lines.append(f"{indent}}}){tail}")
        else:
            self.lines[first] = head + tail

    def sizes(self, op: Op) -> dict[str, str]:
        """How the operands form arguments and the results fields, where their number does not tell."""
        operands, results = segment_sizes(op, self.open_places)
        attrs, told = dict[str, str](), None
        if operands is not None:
            attrs[OPERAND_SIZES], told = _array(operands), segments_of(type(cast(OpDef, op)), operands)
        if op.segments != told:
            attrs[SEGMENTS] = _attr(op.segments)
        if results is not None:
            attrs[RESULT_SIZES] = _array(results)
        return attrs


def _array(sizes: Iterable[int]) -> str:
    return f"array<i32: {', '.join(map(str, sizes))}>"


def format_type(type: Type) -> str:
    """A type in MLIR's spelling, symbols in its encoding."""
    if isinstance(type, SymType):
        return f'!sparsec.sym<"{type.expr}">'
    if isinstance(type, HandleType):
        return "!sparsec.handle"
    dims = "".join(f"{dim}x" if isinstance(dim, int) else "?x" for dim in type.shape)
    symbolic = [f'"{dim}"' for dim in type.shape if isinstance(dim, Sym)]
    encoding = f", [{', '.join(symbolic)}]" if symbolic else ""
    return f"tensor<{dims}{_dtype(type.dtype)}{encoding}>"


def _dtype(dtype: DType) -> str:
    return "complex<f32>" if dtype is DType.c64 else dtype.value


def _signature(operands: Iterable[Type], results: Iterable[Type]) -> str:
    outs = [format_type(type) for type in results]
    return f"({', '.join(map(format_type, operands))}) -> {outs[0] if len(outs) == 1 else '(' + ', '.join(outs) + ')'}"


def _attr(attr: Attr) -> str:
    match attr:
        case None:
            return "none"
        case bool():
            return "true" if attr else "false"
        case int():
            return str(attr)
        case float():
            if math.isfinite(attr):
                return format_float(attr)
            return f"0x{struct.pack('>d', attr).hex().upper()} : f64"
        case Sym():
            return f'#sparsec.expr<"{attr}">'
        case str():
            return _string(attr)
        case DType():
            return _dtype(attr)
        case Mapping():
            return _dict({key: _attr(value) for key, value in attr.items()})
        case _:
            return _list(map(_attr, attr))


def _prefixed(attrs: Mapping[str, Attr]) -> dict[str, str]:
    return {PREFIX + key: _attr(value) for key, value in attrs.items()}


def _dict(attrs: Mapping[str, str]) -> str:
    plain = re.compile(r"[A-Za-z_][\w.$]*\Z", re.ASCII)
    return f"{{{', '.join(f'{key if plain.match(key) else _string(key)} = {text}' for key, text in attrs.items())}}}"


def _list(items: Iterable[str]) -> str:
    return f"[{', '.join(items)}]"


def _string(text: str) -> str:
    """An MLIR string: printable ASCII as it is, every other byte of the UTF-8 as two hex digits."""
    data = text.encode("utf-8", "surrogatepass")
    return '"' + "".join(chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\{b:02X}" for b in data) + '"'


def _location(loc: Loc) -> str:
    if not loc:
        return "loc(unknown)"
    places = [_place(loc), *map(_place, loc.origins)]
    text = f"loc(fused[{', '.join(places)}])" if loc.origins else f"loc({places[0]})"
    return f"{text}  // {one_line(loc.source)}" if loc.source.strip() else text


def _place(loc: Loc) -> str:
    place = f"{_string(loc.file)}:{loc.line}:0"
    return f"{_string(loc.scope)}({place})" if loc.scope else place
