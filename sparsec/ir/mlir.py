"""The generic text form, which is MLIR: real MLIR tools read it with unregistered dialects allowed.

What MLIR has no word for is kept so: a symbolic size is `?` with the tensor's encoding naming the symbols
(`tensor<?x64xf32, ["s0"]>`); a symbol as an attribute is `#sparsec.sym<"s0*2">`, as a type `!sparsec.sym<"s0">`; holes
and lists of operands are in `operand_segments`; a module path is a named location around the file's; attributes of
functions and arguments are prefixed `sparsec.`; the user's line is a comment, which other tools drop.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping

from sparsec.ir.core import Attr, Block, Func, Module, Op
from sparsec.ir.loc import Loc
from sparsec.ir.printer import Names, format_float, one_line
from sparsec.ir.types import DType, Sym, SymType, Type

PREFIX = "sparsec."  #: of attributes of modules, functions and arguments, which MLIR wants in a dialect
SEGMENTS = "operand_segments"


def print_generic(module: Module) -> str:
    """The module as MLIR, ending in a newline."""
    lines = ['"builtin.module"() ({']
    for func in module.funcs.values():
        _Writer(lines).func(func)
    attrs = _prefixed(module.attrs)
    lines.append(f"}}) {_dict(attrs)} : () -> () loc(unknown)" if attrs else "}) : () -> () loc(unknown)")
    return "\n".join(lines) + "\n"


class _Writer:
    def __init__(self, lines: list[str]) -> None:
        self.lines, self.names = lines, Names()

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
        text = f'"{op.name}"({", ".join(map(self.names.of, op.operands))})'
        attrs = {key: _attr(value) for key, value in op.attrs.items()}
        if op.segments is not None:
            attrs[SEGMENTS] = _attr(op.segments)
        signature = _signature([v.type for v in op.operands], [v.type for v in op.results])
        tail = f"{' ' + _dict(attrs) if attrs else ''} : {signature} {_location(op.loc)}"
        self.lines.append("")
        for i, region in enumerate(op.regions):
            mark = self.names.enter()
            if i:
                self.lines.append(f"{indent}}}, {{")
            self.block(region, indent)
            self.names.leave(mark)
        names = ", ".join(map(self.names.define, op.results))
        head = f"{indent}{names} = {text}" if names else indent + text
        if op.regions:
            self.lines[first] = head + " ({"
            self.lines.append(f"{indent}}}){tail}")
        else:
            self.lines[first] = head + tail


def format_type(type: Type) -> str:
    """A type in MLIR's spelling, symbols in its encoding."""
    if isinstance(type, SymType):
        return f'!sparsec.sym<"{type.expr}">'
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
            return f'#sparsec.sym<"{attr}">'
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
