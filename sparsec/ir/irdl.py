"""IRDL of our dialects, from the op classes: real MLIR tools then verify the generic form, not only parse it.

    mlir-opt --irdl-file=model.irdl.mlir --allow-unregistered-dialect model.mlir

`aten` is left out: names of its operators hold dots and capitals, which IRDL's must not; PyTorch's schemas define them.
So is what ends a region, since no op that IRDL defines can.

IRDL wants all values of a variadic operand to be of one type. Where a module has several types in one place, its IRDL
has as many optional operands there as the module needs. What takes more than one optional or variadic operand carries
how many it has of each in `operandSegmentSizes` (results: `resultSegmentSizes`).
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, TypeAlias, Union, cast, get_args, get_origin

from sparsec.ir.core import Module, Op, Segments, Value
from sparsec.ir.opdef import REGISTRY, OpDef
from sparsec.ir.types import DType, Sym

Places: TypeAlias = Mapping[tuple[str, str], int]
"""(op, field) of variadic fields that must take values of several types -> how many optional places they have."""

FOREIGN = frozenset({"func.return", "moe.yield"})  #: ops that another dialect has in the generic form
_OPEN = ("Operands", "Results")
_BASES: dict[Any, str] = {
    int: "#builtin.integer",
    float: "#builtin.float",
    str: "#builtin.string",
    DType: "#builtin.type",
    type(None): "#builtin.type",
    tuple: "#builtin.array",
    dict: "#builtin.dictionary",
}


def places(module: Module) -> Places:
    """Where in a module one variadic field takes values of several types, and how many at most."""
    most, mixed = dict[tuple[str, str], int](), set[tuple[str, str]]()
    for op in filter(_is_declared, module.walk()):
        for declared, _, rest in _fields(op):
            if rest is not None:
                key = op.name, list(declared)[-1]
                most[key] = max(most.get(key, 0), len(rest))
                if len({value.type for value in rest}) > 1:
                    mixed.add(key)
    return {key: most[key] for key in sorted(mixed)}


def segment_sizes(op: Op, open_places: Places) -> tuple[list[int] | None, list[int] | None]:
    """How many values each operand and each result has, as IRDL counts them; None where it need not be told."""
    if not _is_declared(op):
        return None, None
    found = list[list[int] | None]()
    for declared, flags, rest in _fields(op):
        sizes, variable = list(flags), sum(kind == "OptOperand" for kind in declared.values())
        if rest is not None:
            given = open_places.get((op.name, list(declared)[-1]))
            sizes += [len(rest)] if given is None else [1] * len(rest) + [0] * (given - len(rest))
            variable += 1 if given is None else given
        found.append(sizes if variable > 1 else None)
    operands, results = found
    return operands, results


def segments_of(cls: type[OpDef], sizes: Sequence[int]) -> Segments | None:
    """The operand segments that such sizes stand for, if every argument is one value or none."""
    closed = sum(kind not in _OPEN for kind in cls.fields().operands.values())
    flags = [*sizes[:closed], *[1] * sum(sizes[closed:])]
    while flags and not flags[-1]:
        flags.pop()
    return None if all(flags) else tuple(flags)


def _is_declared(op: Op) -> bool:
    """Whether IRDL defines an op; `aten`'s and what other dialects have are not."""
    return isinstance(op, OpDef) and type(op).op_name in REGISTRY and op.name not in FOREIGN


def _fields(op: Op) -> Iterator[tuple[dict[str, str], list[int], Sequence[Value] | None]]:
    """Operands, then results: those declared, how many values each has, and the values of a variadic last one."""
    fields = cast(OpDef, op).fields()
    for declared, arguments in ((fields.operands, op.arguments), (fields.results, op.results)):
        closed = sum(kind not in _OPEN for kind in declared.values())
        flags = [int(argument is not None) for argument in arguments[:closed]]
        flags += [0] * (closed - len(flags))
        rest = None
        if closed < len(declared):
            flat = (item if isinstance(item, tuple) else (item,) for item in arguments[closed:])
            rest = [value for item in flat for value in item if value is not None]
        yield declared, flags, rest


def print_irdl(module: Module | None = None) -> str:
    """The dialects as IRDL, ending in a newline. With a module, its variadic fields have the places it needs."""
    open_places = {} if module is None else places(module)
    lines = [
        "// What sparsec's modules may hold besides MLIR's own `func` and PyTorch's operators (`aten`).",
        "irdl.dialect @sparsec {",
        "  // A size that is known at run time, as a type and as an attribute: an expression over symbols.",
        *_symbolic("type", "sym"),
        *_symbolic("attribute", "expr"),
        "  // An exchange between ranks that has begun.",
        "  irdl.type @handle",
        "}",
    ]
    for dialect, names in groupby(sorted(REGISTRY.keys() - FOREIGN), key=lambda name: name.partition(".")[0]):
        lines += ["", f"irdl.dialect @{dialect} {{"]
        for name in names:
            lines += _operation(name, REGISTRY[name], open_places)
        lines.append("}")
    return "\n".join(lines) + "\n"


def _symbolic(kind: str, name: str) -> Iterator[str]:
    yield f"  irdl.{kind} @{name} {{"
    yield '    %expr = irdl.base "#builtin.string"'
    yield "    irdl.parameters(expr: %expr)"
    yield "  }"


def _operation(name: str, cls: type[OpDef], open_places: Places) -> Iterator[str]:
    fields = cls.fields()
    for line in (cls.__doc__ or "").strip().partition("\n\n")[0].splitlines():
        yield f"  // {line.strip()}"
    yield f"  irdl.operation @{name.partition('.')[2]} {{"
    for what, declared in (("operands", fields.operands), ("results", fields.results)):
        named = list[str]()
        for field, kind in declared.items():
            given = open_places.get((name, field))
            for place in [field] if given is None else [f"{field}_{i}" for i in range(given)]:
                yield from _value(place, kind)
                how = "optional " if given is not None else {"OptOperand": "optional "}.get(kind, "")
                named.append(f"{place}: {'variadic ' if kind in _OPEN and given is None else how}%{place}")
        if named:
            yield f"    irdl.{what}({', '.join(named)})"
    for field, annotation in fields.attrs.items():
        yield from _attribute(field, annotation)
    if fields.attrs:
        pairs = ", ".join(f'"{field}" = %{field}' for field in fields.attrs)
        yield f"    irdl.attributes {{{pairs}}}"
    for field in fields.regions:
        yield f"    %{field} = irdl.region"
    if fields.regions:
        yield f"    irdl.regions({', '.join(f'{field}: %{field}' for field in fields.regions)})"
    yield "  }"


def _value(place: str, kind: str) -> Iterator[str]:
    """The constraint of an operand or result: a tensor; where anything is passed on, a symbol's value too."""
    if kind in ("HandleOperand", "HandleResult"):
        yield f"    %{place} = irdl.base @sparsec::@handle"
    elif kind in _OPEN:
        yield from _any_of(place, ['irdl.base "!builtin.tensor"', "irdl.base @sparsec::@sym"])
    else:
        yield f'    %{place} = irdl.base "!builtin.tensor"'


def _any_of(name: str, choices: Iterable[str]) -> Iterator[str]:
    listed = list(dict.fromkeys(choices))
    if len(listed) == 1:
        yield f"    %{name} = {listed[0]}"
        return
    parts = [f"%{name}.{i}" for i in range(len(listed))]
    yield from (f"    {part} = {choice}" for part, choice in zip(parts, listed, strict=True))
    yield f"    %{name} = irdl.any_of({', '.join(parts)})"


def _attribute(field: str, annotation: Any) -> Iterator[str]:
    yield from _any_of(field, _choices(annotation))


def _choices(annotation: Any) -> Iterator[str]:
    """What an attribute of a declared type may be."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        for arm in get_args(annotation):
            yield from _choices(arm)
    elif origin is Literal:
        for value in get_args(annotation):
            yield f'irdl.is "{value}"' if isinstance(value, str) else f"irdl.is {value} : i64"
    elif annotation is bool:
        yield from ("irdl.is false", "irdl.is true")
    elif annotation is Sym:
        yield "irdl.base @sparsec::@expr"
    else:
        base = _BASES.get(origin or annotation)
        yield "irdl.any" if base is None else f'irdl.base "{base}"'


__all__ = ["FOREIGN", "Places", "places", "print_irdl", "segment_sizes", "segments_of"]
