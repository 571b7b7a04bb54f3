"""Find the router of each expert bank and make it one `moe.route`."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from sparsec.dialects.builtin import Yield
from sparsec.dialects.moe import Experts, Route
from sparsec.ir.core import Block, Module, Op, Value
from sparsec.ir.equal import ValueMap
from sparsec.ir.opdef import make
from sparsec.ir.rewrite import Rewriter, rule
from sparsec.ir.types import Dim, TensorType
from sparsec.passes.base import Pass, PassContext, register
from sparsec.passes.rows import LINEAR, is_small, localise, operand_rows


@register
@dataclass(frozen=True)
class RaiseRoute(Pass):
    """Outline the row-local ops that lead from a router's logits to a bank's ids and weights into `moe.route`.

    The slice goes backwards from the two operands of `moe.experts` and must close on one tensor of logits, the result
    of a linear layer, and small parameters. Where it does not, the ops stay and a remark says which one is in the way.
    """

    name: ClassVar[str] = "raise-route"
    max_ops: int = 64  #: a router of more ops stays as it is

    def run(self, module: Module, ctx: PassContext) -> None:
        @rule("moe.experts")
        def raise_route(op: Op, rw: Rewriter) -> bool:
            assert isinstance(op, Experts)
            if op.ids.op is not None and op.ids.op.dialect == "moe":
                return False
            found = Slice(op.ids.tensor.shape[0])
            problem = found.collect(op)
            if problem is None and len(found.ops) > self.max_ops:
                problem = Problem(op, f"the router has {len(found.ops)} ops, more than max-ops={self.max_ops}", "")
            if problem is not None:
                ctx.missed(problem.op, why=problem.why, try_=problem.suggestion)
                return False
            route = outline(found, op, rw)
            ctx.passed(op, f"router of {len(found.ops)} ops raised to moe.route from %{found.logits.name}")
            return route

        ctx.rewrite(module, [raise_route])


@dataclass(frozen=True)
class Problem:
    """Why a slice does not close."""

    op: Op
    why: str
    suggestion: str


_WRITE_ROW_LOCAL = "compute ids and weights from one token's logits alone"


@dataclass
class Slice:
    """The ops between a router's logits and a bank's ids and weights."""

    tokens: Dim
    rows: dict[Value, int] = field(default_factory=dict)  #: leading axes that count tokens, for every value met
    ops: list[Op] = field(default_factory=list)  #: in the order of their block
    sources: list[Value] = field(default_factory=list)  #: what has rows and comes from outside: the logits
    params: list[Value] = field(default_factory=list)

    @property
    def logits(self) -> Value:
        return self.sources[0]

    def collect(self, bank: Experts) -> Problem | None:
        """Fill the slice for `bank`. Returns what is in the way, if anything is."""
        stack: list[tuple[Value, int, Op]] = [(bank.weights, 1, bank), (bank.ids, 1, bank)]
        ops: dict[Op, None] = {}
        while stack:
            value, rows, user = stack.pop()
            if value in self.rows:
                if self.rows[value] != rows:
                    return Problem(user, f"%{value.name} is used both per token and across tokens", _WRITE_ROW_LOCAL)
                continue
            self.rows[value] = rows
            if (problem := self._visit(value, rows, user, ops, stack)) is not None:
                return problem
        if not self.sources:
            return Problem(bank, "the ids and weights depend on no logits", "")
        if len(self.sources) > 1:
            names = ", ".join(_origin(value) for value in self.sources)
            return Problem(bank, f"the router reads more than one tensor per token: {names}", _WRITE_ROW_LOCAL)
        shape = self.logits.tensor.shape[self.rows[self.logits] :]
        sizes = (*shape, bank.ids.tensor.shape[-1])
        if len(shape) != 1 or not all(isinstance(size, int) for size in sizes):
            return Problem(bank, f"the logits {self.logits.type} are no [tokens, experts] of known width", "")
        self.ops = in_order(ops, (bank.ids, bank.weights))
        return None

    def _visit(
        self, value: Value, rows: int, user: Op, ops: dict[Op, None], stack: list[tuple[Value, int, Op]]
    ) -> Problem | None:
        """Take in the op behind a value, or note the value as coming from outside."""
        op = value.op
        stop = op is None or op.name in LINEAR or (not rows and not all(map(is_small, op.operands)))
        if not stop and op is not None:
            if op in ops:
                if any(self.rows.get(result, rows) != rows for result in op.results):
                    return Problem(op, f"'{op.name}' is used both per token and across tokens", _WRITE_ROW_LOCAL)
                return None
            verdict = operand_rows(op, rows)
            if not isinstance(verdict, str):
                ops[op] = None
                stack += [(operand, count, op) for operand, count in zip(op.operands, verdict, strict=True)]
                return None
            if rows:
                return Problem(op, f"'{op.name}' {verdict}", _WRITE_ROW_LOCAL)
        if rows:
            if not isinstance(value.type, TensorType) or not value.type.dtype.is_float:
                return Problem(user, f"the router starts from {_origin(value)}, not from logits", _WRITE_ROW_LOCAL)
            self.sources.append(value)
        elif is_small(value):
            self.params.append(value)
        else:
            return Problem(user, f"the router reads {_origin(value)}, which is more than one number per expert", "")
        return None


def outline(found: Slice, bank: Experts, rw: Rewriter) -> bool:
    """Put a `moe.route` behind the logits, and let the bank and all later users read its results."""
    logits, at = found.logits, found.logits
    later = {op: i for i, op in enumerate(bank.block.ops)} if bank.block and any(p.op for p in found.params) else {}
    for param in found.params:
        if param.op is not None and (at.op is None or later.get(param.op, -1) > later.get(at.op, -1)):
            at = param
    flat = logits
    if found.rows[logits] > 1:
        shape = (found.tokens, logits.tensor.shape[-1])
        type = TensorType(shape, logits.tensor.dtype)
        flat = rw.insert_after(make("aten.reshape", [logits], [type], {"shape": shape}), at).results[0]
        flat.name = logits.name
    tokens = flat.tensor.shape[0]
    body = Block(
        [flat.type, *(param.type for param in found.params)],
        ["logits", *(param.name.rpartition(".")[2] for param in found.params)],
    )
    values: ValueMap = dict(zip([logits, *found.params], body.args, strict=True))
    for op in found.ops:
        new = localise(op, found.rows[_row_result(op, found)], tokens, values)
        if new is not None:
            body.append(new)
    yields = body.append(Yield([values[bank.ids], values[bank.weights]], loc=found.ops[-1].loc))
    route = rw.insert_after(Route([flat, *found.params], [v.type for v in yields.operands], {}, [body]), at)
    rw.absorb(found.ops)
    position = later.get(at.op, -1) if at.op is not None else -1
    for old, result, name in zip((bank.ids, bank.weights), route.results, ("ids", "weights"), strict=True):
        result.name = name
        for user in list(old.users):
            if user not in found.ops and (not later or later.get(user, len(later)) > position):
                user.operands = tuple(result if operand is old else operand for operand in user.operands)
    return True


def _row_result(op: Op, found: Slice) -> Value:
    """A result whose rows are known: the slice came through it."""
    return next(result for result in op.results if result in found.rows)


def in_order(ops: Container[Op], ends: Sequence[Value]) -> list[Op]:
    """The ops behind `ends` such that each comes after those whose results it reads."""
    done: dict[Op, None] = {}
    stack = [(value.op, False) for value in reversed(ends)]
    while stack:
        op, ready = stack.pop()
        if op is None or op in done or op not in ops:
            continue
        if ready:
            done[op] = None
        else:
            stack.append((op, True))
            stack += [(operand.op, False) for operand in reversed(op.operands)]
    return list(done)


def _origin(value: Value) -> str:
    """A value in words: its name and type, and the op behind it."""
    made = f" of '{value.op.name}' ({value.op.loc})" if value.op is not None else ""
    return f"%{value.name or '?'}: {value.type}{made}"
