"""Find the router of each expert bank and make it one `moe.route`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsec.dialects.builtin import Yield
from sparsec.dialects.moe import Route
from sparsec.ir.core import Block, Module, Op, Value
from sparsec.ir.equal import ValueMap
from sparsec.ir.opdef import OpDef, make
from sparsec.ir.rewrite import Rewriter, rule
from sparsec.ir.types import Dim, TensorType, product
from sparsec.passes.base import Pass, PassContext, register
from sparsec.passes.lone_routers import lone_routers
from sparsec.passes.row_slice import Problem, Slice, close
from sparsec.passes.rows import LINEAR, folded, localise

BANKS = ("moe.experts", "moe.grouped_linear")
AFTER_ROUTE = ("moe.capacity",)  # change ids between route and bank


@register
@dataclass(frozen=True)
class RaiseRoute(Pass):
    """Outline the row-local ops that lead from a router's logits to a bank's ids and weights into `moe.route`.

    The slice goes backwards from the two operands of `moe.experts` to the logits, the result of a linear layer, and
    small parameters; other tensors with one row per token (ids that are given, a mask) become operands too. What else
    of the slice the model reads becomes a further result, with the row-local ops on the way to it. Where the slice does
    not close, the ops stay and a remark says which one is in the way. A remark also names routers that no bank reads.
    """

    name: ClassVar[str] = "raise-route"
    max_ops: int = 64  #: a router of more ops stays as it is

    def run(self, module: Module, ctx: PassContext) -> None:
        declined = set[Op]()

        @rule(*BANKS)
        def raise_route(op: Op, rw: Rewriter) -> bool:
            chosen = _chosen(op)
            if chosen is None or op.block is None:
                return False
            ids, weights = chosen
            found = close(ids, weights, op)
            if isinstance(found, Slice):
                places = {other: i for i, other in enumerate(op.block.ops)}
                at = _latest([*found.sources, *found.params], places)
                if at is None:
                    return False  # behind an op of this sweep: the next one will see it
                after = {other for other, i in places.items() if i > places.get(at.op, -1)}  # type: ignore[arg-type]
                found.extend(after)
                if len(found.ops) <= self.max_ops:
                    for problem in found.outside:
                        ctx.missed(problem.op, why=f"{problem.why}: left outside the router", try_=problem.suggestion)
                    ctx.passed(op, f"router of {len(found.ops)} ops raised to moe.route from %{found.logits.name}")
                    outline(found, at, after, rw)
                    return True
                why = f"the router has {len(found.ops)} ops, more than max-ops={self.max_ops}"
                found = Problem(op, why, "run raise-route{max-ops=N} with a greater N")
            ctx.missed(found.op, why=found.why, try_=found.suggestion)
            declined.add(op)
            return False

        ctx.rewrite(module, [raise_route])
        routes = [op for op in module.main.body.ops if isinstance(op, Route)]
        banked = {view for op in routes for view in _same_rows(op.logits)}
        chains = {op for bank in declined for op in _behind(bank)}
        for op, experts in lone_routers(module.main, banked):
            if op not in chains:
                why = f"a router that chooses among {experts} experts feeds no bank of experts that was found"
                ctx.missed(op, why=why, try_=_TRY_BANK)


_TRY_BANK = "see what raise-experts says of these experts, or call sparsec.ops.experts"


def _chosen(op: Op) -> tuple[Value, Value] | None:
    """The ids and weights of a bank as its router gives them; None where it has no router of its own."""
    assert isinstance(op, OpDef)
    ids, weights = op.ids, op.weights  # type: ignore[attr-defined]
    while ids.op is not None and ids.op.name in AFTER_ROUTE:
        ids = ids.op.operands[0]
    if weights is None or (ids.op is not None and ids.op.dialect == "moe"):
        return None
    return ids, weights


def _same_rows(value: Value) -> list[Value]:
    """A value and what it is a reshape of."""
    found = [value]
    while value.op is not None and value.op.name == "aten.reshape":
        value = value.op.operands[0]
        found.append(value)
    return found


def _behind(bank: Op) -> set[Op]:
    """The ops that a bank's ids and weights are made by, up to linear layers."""
    chosen = _chosen(bank)
    found, stack = set[Op](), [value.op for value in chosen or ()]
    while stack:
        op = stack.pop()
        if op is not None and op not in found and op.name not in LINEAR:
            found.add(op)
            stack += [operand.op for operand in op.operands]
    return found


def _latest(values: list[Value], places: dict[Op, int]) -> Value | None:
    """The value that is defined last; None where one is defined by an op that has no place yet."""
    if any(value.op is not None and value.op not in places for value in values):
        return None
    return max(values, key=lambda value: -1 if value.op is None else places[value.op])


def outline(found: Slice, at: Value, after: set[Op], rw: Rewriter) -> None:
    """Put a `moe.route` behind `at`, and let the bank and the ops `after` it read its results."""
    tokens: Dim = found.tokens

    def behind(name: str, operand: Value, type: TensorType) -> Value:
        nonlocal at
        new = rw.insert_after(make(name, [operand], [type], {"shape": type.shape}), at).results[0]
        at, new.name = new, operand.name
        return new

    reads, operands, inner = [*found.sources, *found.params], list[Value](), list[TensorType]()
    for value in reads:
        type = _operand_type(value, found)
        operands.append(value if value.type == type else behind("aten.reshape", value, type))
        inner.append(folded(value.tensor, found.rows[value], tokens))
    names = ["logits", *(value.name.rpartition(".")[2] for value in operands[1:])]
    body = Block([value.type for value in operands], names)
    values: ValueMap = dict(zip(reads, body.args, strict=True))
    for value, type in zip(reads, inner, strict=True):
        if values[value].type != type:
            attrs, loc = {"shape": type.shape}, found.ops[0].loc
            reshape = body.append(make("aten.reshape", [values[value]], [type], attrs, loc=loc))
            values[value] = reshape.results[0]
    for op in found.ops:
        for new in localise(op, _rows(op, found), tokens, values):
            body.append(new)
    outs = [values[found.ids], values[found.weights]]
    for value in found.extras:
        inside = values[value]
        if inside.tensor.rank == 1:
            type = TensorType((tokens, 1), inside.tensor.dtype)
            unsqueeze = make("aten.unsqueeze", [inside], [type], {"dim": -1}, loc=found.ops[-1].loc)
            inside = body.append(unsqueeze).results[0]
        outs.append(inside)
    body.append(Yield(outs, loc=found.ops[-1].loc if found.ops else found.bank.loc))
    route = rw.insert_after(Route(operands, [out.type for out in outs], {}, [body]), at)
    rw.absorb(found.ops or [found.bank])
    names = ["ids", "weights", *(value.name for value in found.extras)]
    inside_ops = set(found.ops)
    last = route.results[-1]
    for old, result, name in zip((found.ids, found.weights, *found.extras), route.results, names, strict=True):
        result.name = name
        new_value = result
        if old.type != result.type:
            reshape = make("aten.reshape", [result], [old.type], {"shape": old.tensor.shape})
            new_value = rw.insert_after(reshape, last).results[0]
        for user in list(old.users):
            if user not in inside_ops and user in after:
                user.operands = tuple(new_value if operand is old else operand for operand in user.operands)


def _operand_type(value: Value, found: Slice) -> TensorType:
    """How the route takes a value: [T, n] with rows; a parameter as it is, or as a vector if it has several axes."""
    type, rows = value.tensor, found.rows[value]
    if rows:
        return TensorType((found.tokens, *(type.shape[rows:] or (1,))), type.dtype)
    plain = type.rank <= 1 or (type.rank == 2 and type.shape[0] == 1)
    return type if plain else TensorType((product(type.shape),), type.dtype)


def _rows(op: Op, found: Slice) -> int:
    """Rows of an op's results: the slice came through one of them."""
    return next(found.rows[result] for result in op.results if result in found.rows)
