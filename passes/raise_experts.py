"""Find banks of experts in the ops that compute them, and make each one `moe.experts`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import sparsec.passes.banks.capacity as _capacity
import sparsec.passes.banks.pointwise as _pointwise
import sparsec.passes.banks.views as _views
from sparsec.ir.core import Func, Module, Op, Value
from sparsec.ir.rewrite import Rewriter, rule
from sparsec.ir.types import TensorType
from sparsec.passes.banks.build import build
from sparsec.passes.banks.match import Dense, NoBank, adds_rows, is_rolled_out, match, picks_experts
from sparsec.passes.banks.read import Reader
from sparsec.passes.banks.terms import Chosen, Sorted, Unreadable
from sparsec.passes.banks.write import Writer
from sparsec.passes.base import Pass, PassContext, register
from sparsec.passes.rows import LINEAR

assert _views and _pointwise and _capacity  # imported for their readers of ops


@register
@dataclass(frozen=True)
class RaiseExperts(Pass):
    """Make `moe.experts` of banks that a model spells out: loops, masks, gathers, sorted rows, dense products.

    Every tensor is read as a formula over index variables (`passes/banks/terms.py`). A value is a bank, whatever ops it
    came from, where its formula comes down to this: over a token's slots, the sum of a weight times what the expert
    that the slot names makes of the token's row, by an up-projection, an activation and a down-projection.
    """

    name: ClassVar[str] = "raise-experts"

    def run(self, module: Module, ctx: PassContext) -> None:
        plans = dict[Op, _Found]()
        for func in module.funcs.values():
            search = _Search(func)
            plans |= search.found
            for op, why in search.missed():
                ctx.missed(op, why=f"experts are computed here in a way that is no bank: {why}", try_=_TRY)

        @rule()
        def raise_experts(op: Op, rw: Rewriter) -> bool:
            if (found := plans.pop(op, None)) is None:
                return False
            for new in found.writer.ops:
                rw.insert(new, op)
            rw.replace(op, [found.value])
            rw.absorb(sorted(found.ops, key=lambda old: old is not found.first))  # whose line stands for all
            ctx.passed(op, f"bank of {found.experts} experts raised to {found.kind} from {len(found.ops)} ops")
            return True

        if plans:
            ctx.rewrite(module, [raise_experts])


_TRY = "compute each expert as down(activation(up(x))) of the rows that its number chooses, and add what it gives"


@dataclass(frozen=True)
class _Found:
    """A bank to be put in the place of an op's result."""

    writer: Writer
    value: Value
    experts: int
    ops: tuple[Op, ...]  #: what it stands for

    @property
    def first(self) -> Op:
        """The first product with a matrix, if it is in the module that the others are in."""
        first = self.ops[0]
        return next((op for op in self.ops if op.name in LINEAR and op.loc.scope == first.loc.scope), first)

    @property
    def kind(self) -> str:
        return next(op.name for op in reversed(self.writer.ops) if op.dialect == "moe")


class _Search:
    """The banks of one function: from its results backwards, the largest first."""

    def __init__(self, func: Func) -> None:
        self.func, self.reader = func, Reader()
        self.found: dict[Op, _Found] = {}
        self.failed: dict[Op, str] = {}
        self.reader.read_all(func.body.ops)
        needed, broken = set[Value](), set[Value]()
        for op in reversed(func.body.ops):
            if op.results and not any(result in needed for result in op.results):
                continue
            if self._may_be_bank(op) and op.results[0] not in broken:
                try:
                    found = self.found[op] = self._bank(op)
                except (NoBank, Unreadable) as error:
                    if picks_experts(self.reader[op.results[0]].term) or isinstance(error, Dense):
                        self.failed[op] = str(error)
                    if is_rolled_out(self.reader[op.results[0]].term):
                        broken |= self._chain(op)
                else:
                    needed |= {value for new in found.writer.ops for value in new.operands}
                    continue
            needed |= set(op.operands)

    def _may_be_bank(self, op: Op) -> bool:
        if len(op.results) != 1 or not isinstance(op.results[0].type, TensorType):
            return False
        view = self.reader.views.get(op.results[0])
        if view is None or view.term.gemms < 1 or not (view.term.routed or adds_rows(view.term)):
            return False
        return not any(isinstance(atom, Chosen | Sorted) for axis in view.axes for atom in axis)

    def _bank(self, op: Op) -> _Found:
        result = op.results[0]
        bank = match(self.reader[result])
        writer, value = build(bank, result.tensor)
        leafs = {value for new in writer.ops for value in new.operands}
        return _Found(writer, value, bank.experts, tuple(_between(op, leafs)))

    def _chain(self, op: Op) -> set[Value]:
        """The partial sums that a sum over experts adds up: no banks of their own."""
        chain, stack = set[Value](), [op]
        while stack:
            for operand in stack.pop().operands:
                if operand.op is not None and operand not in chain and self._may_be_bank(operand.op):
                    chain.add(operand)
                    stack.append(operand.op)
        return chain

    def missed(self) -> Iterable[tuple[Op, str]]:
        """Where experts are left as they are, with the reason: once for what hangs together."""
        seen = {op for found in self.found.values() for op in found.ops} | set(self.found)
        for op in self.func.body.ops:
            if op not in self.failed:
                continue
            before = set(_between(op, set()))
            if not before & seen:
                yield op, self.failed[op]
            seen.add(op)


def _between(op: Op, leafs: set[Value]) -> Iterable[Op]:
    """The ops behind `op`'s result, up to those that made `leafs`; in the order of their block."""
    found, stack = {op}, [op]
    while stack:
        for operand in stack.pop().operands:
            if operand.op is not None and operand not in leafs and operand.op not in found:
                found.add(operand.op)
                stack.append(operand.op)
    block = op.block
    return [other for other in block.ops if other in found] if block is not None else []
