"""The rewriter: rules that match an op and replace it, applied until none matches any more.

A rule is a function from an op and the rewriter to whether it changed anything:

    @rule("aten.alias", "aten.detach")
    def drop_alias(op: Op, rw: Rewriter) -> bool:
        '''alias(x) -> x'''
        rw.replace(op, op.operands)
        return True

Insertions and removals are collected and carried out once per sweep, so that a sweep is linear in the ops. Every op
that a rule makes gets the locations of all ops that the same application removed; a rule never touches `loc`.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from sparsec.ir.core import Argument, Attr, Block, Module, Op, Value
from sparsec.ir.loc import fuse
from sparsec.ir.opdef import OpDef, make
from sparsec.ir.types import Type

Match: TypeAlias = Callable[[Op, "Rewriter"], bool]

MAX_SWEEPS = 64  # more than any terminating rule set of ours needs; a cycle of rules is an error


@dataclass(frozen=True)
class Rule:
    """A rewrite rule: the names of the ops it starts from (none: any op), and what it does with one."""

    match: Match
    roots: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.match.__name__

    @property
    def place(self) -> str:
        """Where the rule itself is written: `passes/raise_route.py:41`."""
        return source_place(self.match.__module__, inspect.unwrap(self.match).__code__.co_firstlineno)

    def __str__(self) -> str:
        return f"{self.name} ({self.place})"


def source_place(module: str, line: int) -> str:
    """Where a line of a Python module is written: `passes/raise_route.py:41`, from the root of the project."""
    path = module.split(".")
    path = path[1:] if path[0] == "sparsec" and path[1:2] in (["passes"], ["codegen"], ["runtime"]) else path
    return f"{'/'.join(path)}.py:{line}"


def rule(*roots: str) -> Callable[[Match], Rule]:
    """Make a function a rule that starts from ops named `roots`."""

    def wrap(match: Match) -> Rule:
        return Rule(match, roots)

    return wrap


@dataclass
class Rewriter:
    """What a rule may do.

    `made` remembers, for each op that a rule made, the rule and the ops it replaced; `gone`, for each op that a rule
    removed or made another stand for, the rule; `replaced`, for each value that a rule put in place of another, that.
    """

    counts: Counter[Rule] = field(default_factory=Counter)
    made: dict[Op, str] = field(default_factory=dict)
    gone: dict[Op, str] = field(default_factory=dict)
    replaced: dict[Value, Value] = field(default_factory=dict)
    current: Rule | None = None
    failed: tuple[Rule, Op] | None = None  #: the rule that raised an error, and the op that it was looking at
    _before: dict[Op, list[Op]] = field(default_factory=dict)
    _after: dict[Op | Block, list[Op]] = field(default_factory=dict)
    _created: list[Op] = field(default_factory=list)
    _erased: list[Op] = field(default_factory=list)
    _absorbed: list[Op] = field(default_factory=list)
    _dirty: set[Block] = field(default_factory=set)

    def insert(self, op: Op, before: Op) -> Op:
        """Put a new op in front of another one."""
        self._place(op, before.block)
        self._before.setdefault(before, []).append(op)
        return op

    def insert_after(self, op: Op, value: Value) -> Op:
        """Put a new op directly behind the definition of a value (at the block's start for an argument)."""
        anchor = value.owner
        self._place(op, anchor.block if isinstance(anchor, Op) else anchor)
        self._after.setdefault(anchor, []).append(op)
        return op

    def make(
        self,
        before: Op,
        name: str,
        operands: Sequence[Argument],
        result_types: Iterable[Type] | None = None,
        attrs: Mapping[str, Attr] | None = None,
        regions: Iterable[Block] = (),
    ) -> OpDef:
        """Make an op by name and put it in front of `before`."""
        op = make(name, operands, result_types, attrs, regions)
        self.insert(op, before)
        return op

    def replace(self, op: Op, values: Sequence[Value]) -> None:
        """Let `values` stand for the results of `op`, and remove it."""
        for result, value in zip(op.results, values, strict=True):
            result.replace_by(value)
            self.replaced[value] = self.replaced.get(result, result)
        self.erase(op)

    def replace_op(
        self,
        op: Op,
        name: str,
        operands: Sequence[Argument],
        attrs: Mapping[str, Attr] | None = None,
        result_types: Iterable[Type] | None = None,
        regions: Iterable[Block] = (),
    ) -> OpDef:
        """Replace an op by a new one, which has the same result types unless others are given."""
        types = tuple(result.type for result in op.results) if result_types is None else result_types
        new = self.make(op, name, operands, types, attrs, regions)
        self.replace(op, new.results)
        return new

    def erase(self, op: Op) -> None:
        """Remove an op whose results nobody reads. Raises: ValueError if somebody does."""
        if any(result.users for result in op.results):
            raise ValueError(f"'{op.name}' ({op.loc}) is erased while its results are used")
        for inner in op.walk():
            inner.operands = ()
        if op.block is not None:
            self._dirty.add(op.block)
            op.block = None
        self._erased.append(op)

    def absorb(self, ops: Iterable[Op]) -> None:
        """Say that the new ops stand for `ops`, which stay for now because others may still read them."""
        self._absorbed += ops

    def apply(self, rule: Rule, op: Op) -> bool:
        """Apply one rule to one op; new ops get the locations of what was replaced."""
        self.current, self._created, self._erased, self._absorbed = rule, [], [], []
        try:
            changed = rule.match(op, self)
        except Exception:
            self.failed = rule, op
            raise
        finally:
            self.current = None
        if changed:
            self.counts[rule] += 1
            gone = self._absorbed or self._erased or [op]
            loc = fuse([*([] if self._absorbed else [op.loc]), *(old.loc for old in gone)])
            by = f"{rule.place} ({rule.name})"
            self.gone.update(dict.fromkeys((*self._erased, *self._absorbed), by))
            origin = f"{by} from {', '.join(dict.fromkeys(old.name for old in gone))}"
            for new in self._created:
                new.loc = new.loc if new.loc else loc
                self.made[new] = origin
        return changed

    def flush(self) -> None:
        """Carry out the insertions and removals collected so far."""
        for block in self._dirty:
            ops = list[Op]()
            self._emit_after(block, block, ops)
            for op in block.ops:
                self._emit(op, block, ops)
            block.ops = ops
        self._dirty.clear()
        self._before.clear()
        self._after.clear()

    def _place(self, op: Op, block: Block | None) -> None:
        if block is None:
            raise ValueError(f"'{op.name}' is inserted beside an op that is in no block")
        op.block = block
        self._dirty.add(block)
        self._created.append(op)

    def _emit(self, op: Op, block: Block, out: list[Op]) -> None:
        for new in self._before.get(op, ()):
            self._emit(new, block, out)
        if op.block is block:
            out.append(op)
        self._emit_after(op, block, out)

    def _emit_after(self, anchor: Op | Block, block: Block, out: list[Op]) -> None:
        for new in self._after.get(anchor, ()):
            self._emit(new, block, out)


def rewrite(module: Module, rules: Sequence[Rule], rewriter: Rewriter | None = None) -> Rewriter:
    """Apply rules to every op of a module, regions included, in order and over again until nothing changes.

    Raises: RuntimeError if the rules undo each other.
    """
    rw = rewriter or Rewriter()
    by_root: dict[str, list[Rule]] = {}
    anywhere = [rule for rule in rules if not rule.roots]
    for rule in rules:
        for root in rule.roots:
            by_root.setdefault(root, []).append(rule)
    for _ in range(MAX_SWEEPS):
        changes = 0
        for func in list(module.funcs.values()):
            changes += _sweep(func.body, by_root, anywhere, rw)
            rw.flush()
        if not changes:
            return rw
    raise RuntimeError(f"rewriting does not end: {', '.join(str(rule) for rule in rw.counts)}")


def _sweep(block: Block, by_root: Mapping[str, list[Rule]], anywhere: list[Rule], rw: Rewriter) -> int:
    changes = 0
    for op in block.ops:
        for region in op.regions:
            changes += _sweep(region, by_root, anywhere, rw)
        for rule in (*by_root.get(op.name, ()), *anywhere):
            if op.block is block and rw.apply(rule, op):
                changes += 1
    return changes
