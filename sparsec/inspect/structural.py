"""What differs between two modules, op by op: renumbered values, moved lines and spelled-out defaults do not show.

Ops of two functions are paired in order: those that are alike in layer, name, attributes, types and regions, and in
the stretches between, those of one name and layer. A pair that is not wholly alike shows as changed; so does one that
reads another value than the partner of what it read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Hashable, Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal, TypeAlias

from sparsec.inspect.unified import changed_lines
from sparsec.ir.core import Block, Func, Module, Op, Value
from sparsec.ir.equal import attr_key, attrs_key, block_key, func_key
from sparsec.ir.printer import Printer, format_attr

Kind: TypeAlias = Literal["removed", "added", "changed"]


@dataclass(frozen=True)
class Change:
    """One difference.

    Args:
        func: the function's name, in the module that has it.
        before, after: the op's lines, less its location; "" on the side that lacks it.
        what: of a changed op: `attributes`, `types`, `operands`, `regions`; of a function, `function` or `arguments`.
        loc: the user's line.
    """

    kind: Kind
    func: str
    before: str
    after: str
    what: tuple[str, ...] = ()
    loc: str = ""

    def __str__(self) -> str:
        lines = [f"  {line}" for line in changed_lines(self.before, self.after)]
        place = f"  ({self.loc})" if self.loc else ""
        return "\n".join([f"@{self.func}: {self.kind}{': ' if self.what else ''}{', '.join(self.what)}{place}", *lines])


def compare(a: Module, b: Module) -> list[Change]:
    """The differences from `a` to `b`: none if they compute the same in the same way.

    Functions are paired by name; of those left over, equal ones are one function under two names.
    """
    found = list[Change]()
    if attr_key(a.attrs) != attr_key(b.attrs):
        keys = [key for key in dict.fromkeys((*a.attrs, *b.attrs)) if a.attrs.get(key) != b.attrs.get(key)]
        before, after = (format_attr({key: m.attrs[key] for key in keys if key in m.attrs}) for m in (a, b))
        found.append(Change("changed", "module", before, after, ("attributes",)))
    found += _renamed(a, b)
    for name, func in a.funcs.items():
        if name in b.funcs and func_key(func) != func_key(b.funcs[name]):
            found += _functions(func, b.funcs[name])
    return found


def _renamed(a: Module, b: Module) -> Iterator[Change]:
    """Functions that only one of the modules has, under any name."""
    kept = {func_key(func) for name, func in b.funcs.items() if name not in a.funcs}
    gone = {func_key(func) for name, func in a.funcs.items() if name not in b.funcs}
    for name, func in a.funcs.items():
        if name not in b.funcs and func_key(func) not in kept:
            yield Change("removed", name, _head(func), "", ("function",))
    for name, func in b.funcs.items():
        if name not in a.funcs and func_key(func) not in gone:
            yield Change("added", name, "", _head(func), ("function",))


def _head(func: Func) -> str:
    return f"func @{func.name} ({len(func.body.ops)} ops)"


class _Side:
    """The ops of one function, with what each is by itself."""

    def __init__(self, func: Func) -> None:
        self.func, self.ops = func, func.body.ops
        self.printer = Printer()
        self.printer.func(func)
        self.parts = [_parts(op) for op in self.ops]
        self.keys = [(op.loc.scope, op.name, *parts.values()) for op, parts in zip(self.ops, self.parts, strict=True)]
        self.names = [(op.loc.scope, op.name) for op in self.ops]

    def text(self, op: Op) -> str:
        first, last = self.printer.spans[op]
        lines = self.printer.lines[first:last]
        margin = len(lines[0]) - len(lines[0].lstrip())
        return "\n".join(line[margin:] for line in lines)


def _parts(op: Op) -> Mapping[str, Hashable]:
    """What an op is made of, less its operands, by name."""
    return {
        "attributes": attrs_key(op),
        "types": tuple(result.type for result in op.results),
        "regions": tuple(block_key(region, dict.fromkeys(_outer(region), -1)) for region in op.regions),
    }


def _outer(region: Block) -> Iterator[Value]:
    """What a region reads from around it."""
    ops = list(region.walk())
    inner = {*region.args, *(value for op in ops for value in op.results)}
    inner.update(arg for op in ops for block in op.regions for arg in block.args)
    yield from (value for op in ops for value in op.operands if value not in inner)


def _functions(a: Func, b: Func) -> Iterator[Change]:
    """What differs between two functions of one name."""
    before, after = _Side(a), _Side(b)
    said = [Counter(f"{arg.type} {func.arg_attrs.get(arg, {})}" for arg in func.body.args) for func in (a, b)]
    if said[0] != said[1]:
        gone, come = said[0] - said[1], said[1] - said[0]
        yield Change("changed", a.name, "\n".join(gone.elements()), "\n".join(come.elements()), ("arguments",))
    pairs = dict(_paired(before, after))
    same = _values(a, b, {before.ops[i]: after.ops[j] for i, j in pairs.items()})
    kept = set(same.values())
    partners, next_ = {j: i for i, j in pairs.items()}, 0
    for i, old in enumerate(before.ops):
        if i not in pairs:
            yield Change("removed", a.name, before.text(old), "", (), _place(old))
            continue
        for j in range(next_, pairs[i]):
            if j not in partners:
                yield Change("added", a.name, "", after.text(after.ops[j]), (), _place(after.ops[j]))
        next_, new = pairs[i] + 1, after.ops[pairs[i]]
        what = [name for name, part in before.parts[i].items() if part != after.parts[pairs[i]][name]]
        what += ["operands"] if _reads_others(old, new, same, kept) else []
        if what:
            text = before.text(old), after.text(new)
            yield Change("changed", a.name, *text, tuple(what), _place(new) or _place(old))
    for j in range(next_, len(after.ops)):
        yield Change("added", a.name, "", after.text(after.ops[j]), (), _place(after.ops[j]))


def partners(a: Func, b: Func) -> tuple[dict[Op, Op], dict[Value, Value]]:
    """Which op of `a` became which of `b`, and which value: of those that were not removed or replaced."""
    before, after = _Side(a), _Side(b)
    ops = {before.ops[i]: after.ops[j] for i, j in _paired(before, after)}
    return ops, _values(a, b, ops)


def _paired(before: _Side, after: _Side) -> Iterator[tuple[int, int]]:
    """Which op became which, by number, rising: those that are alike, and between them those of one name and layer."""
    alike = SequenceMatcher(None, before.keys, after.keys, autojunk=False)
    for tag, first, last, begin, end in alike.get_opcodes():
        if tag == "equal":
            yield from zip(range(first, last), range(begin, end), strict=True)
        elif tag == "replace":
            named = SequenceMatcher(None, before.names[first:last], after.names[begin:end], autojunk=False)
            for i, j, size in named.get_matching_blocks():
                yield from ((first + i + n, begin + j + n) for n in range(size))


def _values(a: Func, b: Func, ops: Mapping[Op, Op]) -> dict[Value, Value]:
    """Which value became which."""
    by_source = {str(b.arg_attrs.get(arg, {}).get("source", i)): arg for i, arg in enumerate(b.body.args)}
    same = dict[Value, Value]()
    for i, arg in enumerate(a.body.args):
        if (partner := by_source.get(str(a.arg_attrs.get(arg, {}).get("source", i)))) is not None:
            same[arg] = partner
    for old, new in ops.items():
        same.update(zip(old.results, new.results, strict=False))
    return same


def _reads_others(old: Op, new: Op, same: Mapping[Value, Value], kept: Container[Value]) -> bool:
    """Whether an op reads other values than before, beside what was removed, added or replaced: that shows by itself.

    kept: the values that had a partner before.
    """
    if old.segments != new.segments or len(old.operands) != len(new.operands):
        return True
    pairs = zip(old.operands, new.operands, strict=True)
    return any(left in same and right in kept and same[left] is not right for left, right in pairs)


def _place(op: Op) -> str:
    return str(op.loc) if op.loc else ""
