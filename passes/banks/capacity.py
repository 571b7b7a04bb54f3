"""Capacity: pairs that come after the first so many of their expert are dropped.

Which place a pair has among those of its expert is a running count, in whatever way it is spelled. Two uses are known:
a mask that compares it with a limit (`Within`), and seats, `dispatch[t, e, c]`, at which rows wait for their expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsec.ir.core import Op
from sparsec.ir.types import Dim, Sym, product
from sparsec.passes.banks.pointwise import attrs_of, pointwise
from sparsec.passes.banks.read import Reader, reads
from sparsec.passes.banks.select import positive
from sparsec.passes.banks.substitute import substitute
from sparsec.passes.banks.terms import (
    Axis,
    Flat,
    Leaf,
    Not,
    Num,
    Plus,
    Point,
    Running,
    Same,
    Sum,
    Term,
    Times,
    Var,
    View,
    Within,
)
from sparsec.passes.rules import attr


@dataclass(frozen=True)
class Capacity:
    """What is kept of the pairs: the first `limit` of each expert, counted in an order, per group of tokens."""

    limit: Dim
    order: str  #: "slot" or "token", as of moe.capacity
    groups: Dim


def count_of(term: Term) -> tuple[Running, int] | None:
    """A running count and a number, where a term is their sum wherever the expert counted is the pair's own."""
    match term:
        case Running():
            return term, 0
        case Point("aten._to_copy", _, (inner,), _):
            return count_of(inner)
        case Point("aten.sub.Scalar" | "aten.add.Scalar" as name, attrs, (inner,), _) if found := count_of(inner):
            other = dict(attrs).get("other")
            if not isinstance(other, int) or dict(attrs).get("alpha", 1) != 1:
                return None
            return found[0], found[1] + (other if name == "aten.add.Scalar" else -other)
        case Point("aten.sub.Tensor", _, (Running(_, Same(_, counted), _) as run, Same(_, own)), _) if counted == own:
            return run, -1  # a pair does not count itself
        case Plus((inner, Num(number)), _) if found := count_of(inner):
            return found[0], found[1] + int(number)
        case Times() | Sum(matrix=False):
            return _masked_count(term)
        case _:
            return None


def _masked_count(term: Term) -> tuple[Running, int] | None:
    """count * (the pair's expert is e), summed over e or not."""
    over: Axis = ()
    if isinstance(term, Sum):
        over, term = term.over, term.body
    factors, stack = list[Term](), [term]
    while stack:
        part = stack.pop()
        if isinstance(part, Times):
            stack += [part.left, part.right]
        else:
            factors.append(part)
    counts = [found for factor in factors if (found := count_of(factor)) is not None]
    choices = {factor for factor in factors if isinstance(factor, Same)}
    if len(counts) != 1 or len(choices) != 1 or len(over) > 1 or len(factors) > 1 + factors.count(*choices):
        return None
    ((run, offset),), (choice,) = counts, choices
    if not over:
        return run, offset
    if choice.right != Var(over[0]) or over[0] in choice.left.free:
        return None
    counted = substitute(run, {over[0]: choice.left})
    return (counted, offset) if isinstance(counted, Running) else None


@reads("aten.lt.Scalar", "aten.le.Scalar", "aten.gt.Scalar", "aten.ge.Scalar",
       "aten.lt.Tensor", "aten.le.Tensor", "aten.gt.Tensor", "aten.ge.Tensor")  # fmt: skip
def compare(reader: Reader, op: Op) -> View | None:
    """count < capacity, or more than nothing."""
    view = reader[op.operands[0]]
    limit: object = attr(op, "other")
    if len(op.operands) == 2:
        other = reader[op.operands[1]].term
        limit = other.value if isinstance(other, Num) else None
    if not isinstance(limit, int | Sym):
        return None
    run: Term = view.term
    offset = 0
    if (found := count_of(view.term)) is not None:
        run, offset = found
    elif not _is_number(view.term):
        return positive(reader, op) if op.name == "aten.gt.Scalar" else None
    strict = op.name.startswith(("aten.lt", "aten.ge"))
    within = Within(run, _plus(limit, -offset - strict))
    return View(view.axes, within if op.name.startswith(("aten.lt", "aten.le")) else Not(within))


def _is_number(term: Term) -> bool:
    """Whether a term is the number of a chosen expert."""
    if not isinstance(term, Leaf) or term.value.tensor.dtype.is_float:
        return False
    op = term.value.op
    return term.routed or (op is not None and op.name in ("aten.topk", "aten.argmax", "aten.sort"))


@reads("aten.clamp", "aten.clamp_max")
def clamp(reader: Reader, op: Op) -> View | None:
    """An expert's number kept in range, for rows that are skipped."""
    view, dtype = reader[op.operands[0]], op.results[0].tensor.dtype
    if not _is_number(view.term):
        return pointwise(reader, op)
    return View(view.axes, Point(op.name, attrs_of(op), (view.term,), dtype))


def _plus(dim: Dim, number: int) -> Dim:
    if isinstance(dim, int):
        return dim + number
    return dim if number == 0 else Sym(f"({dim}{number:+d})")


def seat_limit(number: Term, seats: Dim) -> Within | None:
    """That a pair has one of the seats 0, 1 ... that it is put on by its count."""
    found = count_of(number)
    return None if found is None else Within(found[0], _plus(seats, -1 - found[1]))


def capacity_of(mask: Within, ids: Term, tokens: Axis, slots: Axis) -> Capacity | None:
    """The capacity that a mask over pairs stands for; None where it counts anything else."""
    run = mask.count
    if not isinstance(run, Running) or not isinstance(run.body, Same) or run.body.right != ids:
        return None
    items = run.at.items if isinstance(run.at, Flat) else (run.at,)
    atoms = tuple(item.atom for item in items if isinstance(item, Var))
    if len(atoms) != len(items) or len(atoms) != len(run.over):
        return None
    if substitute(run.body.left, {a: Var(b) for a, b in zip(run.over, atoms, strict=True)}) != ids:
        return None
    counted = tuple(atom for atom in atoms if atom in tokens)
    if counted != tokens[len(tokens) - len(counted) :] or set(atoms) != {*counted, *slots}:
        return None
    groups = product(tuple(atom.size for atom in tokens[: len(tokens) - len(counted)]))
    if atoms == (*counted, *slots):
        return Capacity(mask.limit, "token", groups)
    return Capacity(mask.limit, "slot", groups) if atoms == (*slots, *counted) else None
