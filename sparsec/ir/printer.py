"""The short text form: what people read, and what `sparsec.ir.parser` reads back to the same module.

    results = dialect.op(operands) {attributes} : result types { regions }

A `loc` line holds for the ops after it, in its block and the regions inside; a terminator has no place of its own.
Names are the hints that values carry; a clash gets a numeric suffix, and a value without a hint is numbered.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping

from sparsec.ir.core import Argument, Attr, Block, Func, Module, Op, Value
from sparsec.ir.loc import UNKNOWN, Loc
from sparsec.ir.opdef import OpDef
from sparsec.ir.types import DType, Sym, Type

TERMINATORS = {"func.return": "return", "moe.yield": "yield"}
WIDTH = 120  #: a function head that is longer has an argument a line
RESERVED = frozenset({"true", "false", "none", "inf", "nan", *(dtype.value for dtype in DType)})
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_.$]*\Z")
_HINT = re.compile(r"[A-Za-z_$.-][A-Za-z0-9_$.-]*\Z")


def print_module(module: Module) -> str:
    """The module in the short form, ending in a newline."""
    parts = [f"module {format_attr(module.attrs)}\n"] if module.attrs else []
    for func in module.funcs.values():
        printer = Printer()
        printer.func(func)
        parts.append("\n".join(printer.lines) + "\n")
    return "\n".join(parts)


def print_op(op: Op) -> str:
    """One op with its regions, as it stands in its function, without its location.

    Names are as in `print_module` where the op has a function around it.
    """
    block = op.block
    while block is not None and isinstance(block.parent, Op):
        block = block.parent.block
    printer = Printer()
    if block is not None and isinstance(block.parent, Func):
        printer.func(block.parent)
        first, last = printer.spans[op]
        lines = printer.lines[first:last]
    else:
        printer.loc = op.loc
        printer.op(op, "")
        lines = printer.lines
    margin = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[margin:] for line in lines)


class Names:
    """Gives every value of a function its printed name, unique among those visible where it is defined.

    Defined values are named in textual order; the names of a region are free again after it.
    """

    def __init__(self) -> None:
        self._names: dict[Value, str] = {}
        self._taken: set[str] = set()
        self._trail: list[str] = []
        self._suffix: dict[str, int] = {}
        self._unnamed = 0

    def define(self, value: Value) -> str:
        """Choose the name of a value, with its `%`."""
        hint = value.name
        if not hint or hint.isdigit():
            name = str(self._unnamed)
            self._unnamed += 1
        else:
            if not _HINT.match(hint):
                hint = re.sub(r"[^A-Za-z0-9_$.-]", "_", hint)
                hint = hint if _HINT.match(hint) else f"_{hint}"
            name = hint
            if name in self._taken:
                count = self._suffix.get(hint, 0)
                while name in self._taken:
                    count += 1
                    name = f"{hint}_{count}"
                self._suffix[hint] = count
            self._taken.add(name)
            self._trail.append(name)
        self._names[value] = named = "%" + name
        return named

    def of(self, value: Value) -> str:
        """The name of a value; one from elsewhere (an error in the module) shows as `%hint?`."""
        return self._names.get(value) or f"%{value.name}?"

    def enter(self) -> tuple[int, int]:
        """Begin a region; give the answer to `leave` at its end."""
        return len(self._trail), self._unnamed

    def leave(self, mark: tuple[int, int]) -> None:
        length, self._unnamed = mark
        for name in self._trail[length:]:
            self._taken.discard(name)
            self._suffix.pop(name, None)
        del self._trail[length:]


class Printer:
    """Writes functions in the short form.

    Attributes:
        lines: the text so far.
        spans: each op's own lines, first and one past the last, without its `loc` line.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.spans: dict[Op, tuple[int, int]] = {}
        self.names = Names()
        self.loc: Loc = UNKNOWN
        self._types: dict[int, str] = {}

    def type(self, type: Type) -> str:
        """A type's text; types are few and shared, so it is kept by identity."""
        text = self._types.get(id(type))
        if text is None:
            text = self._types[id(type)] = str(type)
        return text

    def func(self, func: Func) -> None:
        if func.loc:
            self.lines.append(format_loc(func.loc))
        args = [self._typed(arg, func.arg_attrs.get(arg)) for arg in func.body.args]
        ops = func.body.ops
        types = [value.type for value in ops[-1].operands] if ops else []
        results = ", ".join(
            self.type(type) + (f" {format_attr(func.result_attrs[i])}" if func.result_attrs.get(i) else "")
            for i, type in enumerate(types)
        )
        attrs = f" {format_attr(func.attrs)}" if func.attrs else ""
        head, tail = f"func @{format_symbol(func.name)}(", f") -> ({results}){attrs} {{"
        if len(line := f"{head}{', '.join(args)}{tail}") <= WIDTH:
            self.lines.append(line)
        else:
            self.lines += [head, *(f"  {arg}," for arg in args[:-1]), *(f"  {arg}" for arg in args[-1:]), tail]
        self.loc = func.loc
        self.block(func.body, "  ")
        self.lines.append("}")

    def block(self, block: Block, indent: str) -> None:
        for op in block.ops:
            loc = op.loc
            moved = loc is not self.loc and (loc != self.loc or loc.source != self.loc.source)
            if moved and op.name not in TERMINATORS:
                self.lines.append(indent + format_loc(loc))
                self.loc = loc
            self.op(op, indent)

    def op(self, op: Op, indent: str) -> None:
        first = len(self.lines)
        of = self.names.of
        if op.segments is None:
            operands = ", ".join([of(value) for value in op.operands])
        else:
            operands = ", ".join([self._argument(argument) for argument in op.arguments])
        if (keyword := TERMINATORS.get(op.name)) is not None and not op.results:
            line = f"{indent}{keyword} {operands}".rstrip()
        else:
            line = f"{op.name}({operands})"
        if op.attrs:
            line += f" {format_attr(op.attrs)}"
        regions, results = op.regions, op.results
        if results:
            types = ", ".join([self.type(result.type) for result in results])
            line = f"{line} : {types}"
        if regions:
            # Inner names come first: a region sees no result of its op.
            self.lines.append("")
            self._regions(op, indent)
        if results:
            define = self.names.define
            line = f"{', '.join([define(result) for result in results])} = {line}"
        if keyword is None or results:
            line = indent + line
        if regions:
            self.lines[first] = line + " {"
            self.lines.append(indent + "}")
        else:
            self.lines.append(line)
        self.spans[op] = (first, len(self.lines))

    def _regions(self, op: Op, indent: str) -> None:
        fields = op.fields().regions if isinstance(op, OpDef) else ()
        outer = self.loc
        for i, region in enumerate(op.regions):
            mark = self.names.enter()
            label = fields[i] if i < len(fields) else f"region{i}"
            args = ", ".join([self._typed(arg, None) for arg in region.args])
            self.lines.append(f"{indent}  {label}({args}):")
            self.block(region, indent + "    ")
            self.loc = outer
            self.names.leave(mark)

    def _typed(self, value: Value, attrs: Mapping[str, Attr] | None) -> str:
        text = f"{self.names.define(value)}: {self.type(value.type)}"
        return f"{text} {format_attr(attrs)}" if attrs else text

    def _argument(self, argument: Argument) -> str:
        if argument is None:
            return "none"
        if isinstance(argument, tuple):
            return f"[{', '.join([self._argument(item) for item in argument])}]"
        return self.names.of(argument)


def format_attr(attr: Attr) -> str:
    """An attribute value in the short form."""
    match attr:
        case None:
            return "none"
        case bool():
            return "true" if attr else "false"
        case int():
            return str(attr)
        case float():
            return format_float(attr)
        case Sym():
            return f"({attr})" if attr in RESERVED else repr(attr)
        case str():
            return json.dumps(attr, ensure_ascii=False)
        case DType():
            return attr.value
        case Mapping():
            return f"{{{', '.join([f'{format_key(key)} = {format_attr(value)}' for key, value in attr.items()])}}}"
        case _:
            return f"[{', '.join([format_attr(item) for item in attr])}]"


def format_float(value: float) -> str:
    """A float that reads back to the same bits, with a dot as MLIR wants it: `1.0e-05`, `2.0`, `-inf`, `nan`."""
    if not math.isfinite(value):
        return repr(value)
    text = repr(value)
    if "." not in text:
        digits, e, exponent = text.partition("e")
        text = f"{digits}.0{e}{exponent}"
    return text


def format_key(key: str) -> str:
    return (
        key
        if key.isidentifier() and key.isascii() and key not in TERMINATORS.values()
        else json.dumps(key, ensure_ascii=False)
    )


def format_symbol(name: str) -> str:
    """The name of a function, after its `@`."""
    return name if _SYMBOL.match(name) else json.dumps(name, ensure_ascii=False)


def format_loc(loc: Loc) -> str:
    """A location line: `loc "model.py":104 in "layers.0"  // source`."""
    if not loc:
        return "loc unknown"
    text = f"loc {_place(loc)}"
    if loc.origins:
        text += f" fused [{', '.join(_origin(origin, loc) for origin in loc.origins)}]"
    return f"{text}  // {one_line(loc.source)}" if loc.source.strip() else text


def _origin(origin: Loc, leader: Loc) -> str:
    """A fused place: its line alone where file and module are the leader's."""
    same = (origin.file, origin.scope) == (leader.file, leader.scope)
    return str(origin.line) if same else _place(origin)


def one_line(source: str) -> str:
    """A source line as a comment can hold it."""
    return " ".join(source.split("\n")).replace("\r", " ").strip()


def _place(loc: Loc) -> str:
    scope = f" in {json.dumps(loc.scope, ensure_ascii=False)}" if loc.scope else ""
    return f"{json.dumps(loc.file, ensure_ascii=False)}:{loc.line}{scope}"
