"""Checks a module: every problem at once, each at the user's line and shown in the text of its function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sparsec.diagnostics import CompileError, Diagnostic
from sparsec.ir.core import Attr, Block, Func, Module, Op, Value
from sparsec.ir.derived import is_derivation
from sparsec.ir.opdef import OpDef, declared_problems
from sparsec.ir.printer import TERMINATORS, Printer
from sparsec.ir.types import Sym, SymType, TensorType, Type, dims_of, symbols

KINDS = ("input", "param", "buffer", "constant", "derived")
RESULT_KINDS = ("output", "mutation")
_FAILURES = (TypeError, ValueError, IndexError, KeyError, AttributeError, ArithmeticError, AssertionError)


def verify_module(module: Module) -> None:
    """Check the module; say nothing where it is sound.

    Checked are each op against its class and by its own `verify`, that values are defined before their use and within
    sight (a region sees only its arguments), terminators, that callees exist and fit, attributes of arguments, and
    that each symbol of a type is bound.

    Raises:
        CompileError: with every problem.
    """
    found = list(problems(module))
    if found:
        raise CompileError(_diagnostics(found))


@dataclass(frozen=True)
class Problem:
    """What is wrong, in which function, and at which op (None: at its head)."""

    func: Func
    op: Op | None
    message: str
    hint: str = ""


def problems(module: Module) -> Iterator[Problem]:
    """Every problem of the module, in the order of its text."""
    types = _Types()
    for func in module.funcs.values():
        yield from _Checker(module, func, types).run()


# ----------------------------------------------------------------------------------------------------------- symbols
@dataclass
class _Types:
    """The symbols of types, by identity: the same few type objects stand at thousands of values."""

    known: dict[int, tuple[Type, frozenset[str], frozenset[str]]] = field(
        default_factory=dict[int, tuple[Type, frozenset[str], frozenset[str]]]
    )

    def of(self, type: Type) -> tuple[Type, frozenset[str], frozenset[str]]:
        """The type, the symbols that a value of it binds (they stand alone), and all that it mentions."""
        entry = self.known.get(id(type))
        if entry is None:
            dims = dims_of(type)
            bound = frozenset(str(dim) for dim in dims if isinstance(dim, Sym) and dim.isidentifier())
            used = frozenset(name for dim in dims for name in symbols(dim))
            entry = self.known[id(type)] = (type, bound, used)
        return entry


def is_unbacked(symbol: str) -> bool:
    """Whether a symbol gets its value from an op's result (`u0`), not from an argument."""
    return symbol[0] == "u" and symbol[1:].isdigit()


# ----------------------------------------------------------------------------------------------------------- checking
class _Checker:
    def __init__(self, module: Module, func: Func, types: _Types) -> None:
        self.module, self.func, self.types = module, func, types

    def run(self) -> Iterator[Problem]:
        func = self.func
        for message in (*_head_problems(func), *_derived_problems(func, self.module)):
            yield Problem(func, None, message)
        yield from self.block(func.body, set(), "func.return", None)

    def block(self, block: Block, bound: set[str], terminator: str, owner: Op | None) -> Iterator[Problem]:
        """Problems of a block whose surroundings bind the symbols `bound`."""
        func, types = self.func, self.types
        for arg in block.args:
            bound |= types.of(arg.type)[1]
        for arg in block.args:
            if unbound := types.of(arg.type)[2] - bound:
                yield Problem(func, owner, _unbound(arg, unbound))
        if not block.ops or block.ops[-1].name != terminator:
            yield Problem(func, owner, f"{_what(owner)} does not end in `{TERMINATORS[terminator]}`")
        visible = set(block.args)
        last = len(block.ops) - 1
        for i, op in enumerate(block.ops):
            if op.name in TERMINATORS and (i != last or op.name != terminator):
                yield Problem(func, op, f"`{TERMINATORS[op.name]}` stands where it does not end {_what(owner)}")
            if op.block is not block:
                yield Problem(func, op, f"'{op.name}' does not know the block that it stands in")
            for operand in op.operands:
                if operand not in visible:
                    yield self._invisible(op, operand, block)
                elif op not in operand.users:
                    yield Problem(func, op, f"{_name(operand)} does not know '{op.name}' as its user")
            for message in self.op(op):
                yield Problem(func, op, message)
            for region in op.regions:
                yield from self.block(region, set(bound), "moe.yield", op)
            for result in op.results:
                visible.add(result)
                _, binds, used = types.of(result.type)
                if not used <= bound:
                    is_sym = isinstance(result.type, SymType)
                    bound |= {name for name in binds if is_sym or is_unbacked(name)}
                    if missing := used - bound:
                        yield Problem(func, op, _unbound(result, missing))
            for key, value in op.attrs.items():
                if isinstance(value, (Sym, tuple)) and (unknown := _mentioned(value) - bound):
                    yield Problem(func, op, f"attribute '{key}' mentions {_list(unknown)}, which no argument binds")

    def op(self, op: Op) -> list[str]:
        """Problems of an op by its class."""
        if not isinstance(op, OpDef):
            return [f"'{op.name}' has no class: make ops by `sparsec.ir.opdef.make`"]
        found = list(declared_problems(op))
        if not found and (not op.regions or all(region.ops for region in op.regions)):
            try:
                found = list(op.verify())
            except _FAILURES as error:  # what `verify` reads is itself malformed
                found = [f"cannot be checked: {error}"]
        ranks, devices = op.attrs.get("ranks"), self.module.attrs.get("devices")
        if op.dialect == "dist" and ranks is not None and devices is not None and ranks != devices:
            found.append(f"is for {ranks} ranks, the module for {devices} devices (its attribute `devices`)")
        if found:
            return [f"'{op.name}' {message}" for message in found]
        callee = op.attrs.get("callee")
        return list(self._call_problems(op, callee)) if isinstance(callee, str) else []

    def _invisible(self, op: Op, operand: Value, block: Block) -> Problem:
        name = _name(operand)
        home = operand.owner.block if isinstance(operand.owner, Op) else operand.owner
        if home is block:
            return Problem(self.func, op, f"'{op.name}' uses {name} before its definition")
        if home is None:
            return Problem(self.func, op, f"'{op.name}' uses {name}, whose op was erased")
        return Problem(
            self.func,
            op,
            f"'{op.name}' uses {name}, which is defined outside of {_what(block.parent)}",
            "a region sees only its own arguments: make the value an operand of the op and an argument of the region",
        )

    def _call_problems(self, op: Op, name: str) -> Iterator[str]:
        """How a launch differs from the function that it names. Sizes may differ: the callee has its own symbols."""
        callee = self.module.funcs.get(name)
        if callee is None:
            known = ", ".join(f"@{other}" for other in self.module.funcs if other != self.func.name)
            yield f"'{op.name}' calls @{name}, which is not in the module (it has: {known or 'no other function'})"
            return
        first = op.arguments[0] if op.arguments else ()
        given = [value for value in (first if isinstance(first, tuple) else (first,)) if value is not None]
        yield from _mismatches(op, name, "argument", [v.type for v in given], [arg.type for arg in callee.body.args])
        if callee.body.ops:
            yield from _mismatches(op, name, "result", [v.type for v in op.results], callee.result_types)


def _mismatches(op: Op, callee: str, what: str, given: Sequence[Type], wanted: Sequence[Type]) -> Iterator[str]:
    if len(given) != len(wanted):
        yield f"'{op.name}' has {len(given)} {what}s, @{callee} has {len(wanted)}"
        return
    for i, (have, need) in enumerate(zip(given, wanted, strict=True)):
        if not _fits(have, need):
            yield f"{what} {i} of '{op.name}' is {have}, @{callee} has {need}"


def _fits(have: Type, need: Type) -> bool:
    if not isinstance(have, TensorType) or not isinstance(need, TensorType):
        return type(have) is type(need)
    same = have.dtype == need.dtype and have.rank == need.rank
    return same and all(
        a == b for a, b in zip(have.shape, need.shape, strict=True) if isinstance(a, int) and isinstance(b, int)
    )


def _head_problems(func: Func) -> Iterator[str]:
    """Problems of a function's attributes."""
    args = set(func.body.args)
    for value, attrs in func.arg_attrs.items():
        if value not in args:
            yield f"@{func.name} has attributes for {_name(value)}, which is not its argument"
        yield from _kind_problems(f"argument {_name(value)}", attrs, KINDS, KINDS[1:])
    count = len(func.body.ops[-1].operands) if func.body.ops else 0
    for i, attrs in func.result_attrs.items():
        if not 0 <= i < count:
            yield f"@{func.name} has attributes for result {i}, it returns {count}"
        yield from _kind_problems(f"result {i}", attrs, RESULT_KINDS, ("mutation",))


def _derived_problems(func: Func, module: Module) -> Iterator[str]:
    """How derived weights differ from what the functions that they name compute."""
    to_come = {str(attrs.get("source")) for attrs in func.arg_attrs.values() if attrs.get("kind") == "derived"}
    for value in func.body.args:
        attrs = func.arg_attrs.get(value, {})
        if attrs.get("kind") != "derived":
            continue
        name, of = attrs.get("function"), attrs.get("of")
        made = module.funcs.get(name) if isinstance(name, str) else None
        if made is None or made is func or not is_derivation(made):
            yield f"{_name(value)} is derived by @{name}, which is no function of the module that computes weights"
        elif not isinstance(of, tuple) or not all(isinstance(source, str) for source in of):
            yield f"{_name(value)} is derived and does not say what it is computed `of`"
        elif len(of) != len(made.body.args):
            yield f"{_name(value)} is computed of {len(of)} weights, @{name} takes {len(made.body.args)}"
        elif late := to_come.intersection(map(str, of)):
            yield f"{_name(value)} is computed of {_list(late)}, which is not derived before it"
        elif made.body.ops and made.result_types != (value.type,):
            yield f"{_name(value)} is {value.type}, @{name} returns ({', '.join(map(str, made.result_types))})"
        to_come.discard(str(attrs.get("source")))


def _kind_problems(
    what: str, attrs: Mapping[str, Attr], kinds: Sequence[str], with_source: Sequence[str]
) -> Iterator[str]:
    kind = attrs.get("kind")
    if kind is not None and kind not in kinds:
        yield f"{what} is of kind {kind!r} (there are: {', '.join(kinds)})"
    if kind in with_source and not isinstance(attrs.get("source"), str):
        yield f"{what} is a {kind} and does not say its `source`"


def _mentioned(attr: Attr) -> set[str]:
    if isinstance(attr, Sym):
        return set(symbols(attr))
    if isinstance(attr, tuple):
        return {name for item in attr for name in _mentioned(item)}
    return set()


def _unbound(value: Value, names: set[str] | frozenset[str]) -> str:
    return f"the type of {_name(value)}, {value.type}, mentions {_list(names)}, which no argument binds"


def _list(names: set[str] | frozenset[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))


def _name(value: Value) -> str:
    return f"%{value.name}" if value.name else f"a {value.type}"


def _what(owner: Op | Func | None) -> str:
    return f"the region of '{owner.name}'" if isinstance(owner, Op) else "the function"


# ---------------------------------------------------------------------------------------------------------- reporting
def _diagnostics(found: list[Problem]) -> Iterator[Diagnostic]:
    printed: dict[str, Printer] = {}
    for problem in found:
        func = problem.func
        if func.name not in printed:
            printed[func.name] = Printer()
            printed[func.name].func(func)
        loc = problem.op.loc if problem.op is not None else func.loc
        notes = (f"in @{func.name}",)
        yield Diagnostic(
            problem.message, loc, excerpt=_excerpt(printed[func.name], problem.op), notes=notes, hint=problem.hint
        )


def _excerpt(printer: Printer, op: Op | None) -> str:
    """The op behind a `>`, between the lines before and after it."""
    first, last = printer.spans[op] if op is not None else (0, 1)
    lines = printer.lines
    head = lines[first:last] if last - first <= 8 else [*lines[first : first + 7], "  ..."]
    shown = [("  ", line) for line in lines[max(0, first - 4) : first] if not line.lstrip().startswith("loc ")][-1:]
    shown += [("> ", line) for line in head]
    shown += [("  ", line) for line in lines[last : last + 4] if not line.lstrip().startswith("loc ")][:1]
    margin = min(len(line) - len(line.lstrip()) for _, line in shown if line.strip())
    return "\n".join(mark + _cut(line[margin:]) for mark, line in shown)


def _cut(line: str) -> str:
    return line if len(line) <= 200 else line[:197] + "..."
