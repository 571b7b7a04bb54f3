"""Pointwise ops: kept where they may belong to an expert, followed where they weigh or mask."""

from __future__ import annotations

from sparsec.dialects.aten import overload
from sparsec.ir.core import Attr, Op
from sparsec.ir.types import DType, Sym
from sparsec.passes.banks.contract import plus, times
from sparsec.passes.banks.read import HANDLERS, Reader, index_of, reads, unify
from sparsec.passes.banks.select import exists, is_mask, negated
from sparsec.passes.banks.substitute import substitute
from sparsec.passes.banks.terms import (
    Along,
    Atom,
    Num,
    Placed,
    Plus,
    Point,
    Running,
    Same,
    Sum,
    Term,
    Times,
    Var,
    View,
)
from sparsec.passes.banks.views import sliced
from sparsec.passes.rules import attr, is_pointwise


@reads("aten._to_copy", "aten.to.dtype", "aten.type_as", "torch.prims.convert_element_type")
def cast(reader: Reader, op: Op) -> View | None:
    """Casts of masks, counts and numbers change nothing that is counted on."""
    view, dtype = reader[op.operands[0]], op.results[0].tensor.dtype
    if is_exact(view.term) or not op.operands[0].tensor.dtype.is_float:
        return view
    if not dtype.is_float:
        return View(view.axes, exists((), view.term)) if dtype is DType.i1 and view.term.chooses else None
    return View(view.axes, Point("aten._to_copy", (("dtype", dtype),), (view.term,), dtype)) if _kept(view) else None


def is_exact(term: Term) -> bool:
    """Whether a term is a small integer, which every dtype holds."""
    match term:
        case Sum(body=body):
            return is_exact(body)
        case Times() | Plus() | Point("aten.sub.Tensor" | "aten.sub.Scalar"):
            return all(map(is_exact, term.parts))
        case _:
            return is_mask(term) or isinstance(term, Running | Num)


def _kept(view: View) -> bool:
    return view.term.routed or view.term.gemms > 0


@reads("aten.mul.Tensor", "aten.mul.Scalar", "aten.logical_and", "aten.bitwise_and.Tensor", "aten.__and__.Tensor")
def multiply(reader: Reader, op: Op) -> View | None:
    views = [reader.data(value) for value in op.operands]
    if len(views) == 1:
        other = attr(op, "other")
        if isinstance(other, Sym):
            return None
        views.append(View((), Num(other)))
    if not any(map(_kept, views)) or (found := unify(views)) is None:
        return None
    axes, (left, right) = found
    return View(axes, times(left, right, op.results[0].tensor.dtype))


@reads("aten.add.Tensor", "aten.add.Scalar", "aten.sub.Scalar", "aten.sub.Tensor")
def add(reader: Reader, op: Op) -> View | None:
    """A sum of data; of integers, what counts on."""
    views = [reader.data(value) for value in op.operands]
    other = attr(op, "other") if op.name == "aten.add.Scalar" else 0
    if op.name.startswith("aten.add") and attr(op, "alpha") == 1 and isinstance(other, int | float):
        if op.name == "aten.add.Scalar":
            views.append(View((), Num(other)))
        if not any(map(_kept, views)) or (found := unify(views)) is None:
            return None
        return View(found[0], plus(found[1][0], found[1][1], op.results[0].tensor.dtype))
    return pointwise(reader, op)


@reads("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def masked_fill(reader: Reader, op: Op) -> View | None:
    """masked_fill(x, mask, 0) is x where the mask is 0."""
    view, mask = reader.data(op.operands[0]), reader[op.operands[1]]
    fill = reader[op.operands[2]].term if len(op.operands) > 2 else Num(_number(attr(op, "value")))
    if fill != Num(0) or not is_mask(mask.term) or (found := unify([view, mask])) is None:
        return None
    axes, (value, hidden) = found
    return View(axes, times(value, negated(hidden), op.results[0].tensor.dtype))


@reads("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf")
def where(reader: Reader, op: Op) -> View | None:
    """where(mask, x, 0) and where(mask, 0, x)."""
    mask = reader[op.operands[0]]
    if not is_mask(mask.term):
        return None
    sides = [reader.data(value) for value in op.operands[1:]]
    if op.name == "aten.where.ScalarOther":
        sides.append(View((), Num(_number(attr(op, "other")))))
    elif op.name == "aten.where.ScalarSelf":
        sides.insert(0, View((), Num(_number(attr(op, "self")))))
    if (found := unify([mask, *sides])) is None:
        return None
    axes, (condition, yes, no) = found
    if no == Num(0):
        return View(axes, times(yes, condition, op.results[0].tensor.dtype))
    return View(axes, times(no, negated(condition), op.results[0].tensor.dtype)) if yes == Num(0) else None


def _number(value: object) -> float:
    return value if isinstance(value, int | float) else float("nan")


def pointwise(reader: Reader, op: Op) -> View | None:
    """Any other pointwise op on what experts make."""
    if not is_pointwise(op.name) or op.segments is not None or len(op.results) != 1:
        return None
    views = [reader.data(value) for value in op.operands]
    if not any(map(_kept, views)) or (found := unify(views)) is None:
        return None
    axes, terms = found
    attrs, dtype = attrs_of(op), op.results[0].tensor.dtype
    (first, *rest) = terms
    if isinstance(first, Placed) and not rest:
        if _of_number(op, first.otherwise) != 0:
            return None
        value = Point(op.name, attrs, (first.value,), dtype)
        return View(axes, Sum(first.over, times(first.when, value, dtype), dtype))
    return View(axes, Point(op.name, attrs, tuple(terms), dtype))


def attrs_of(op: Op) -> tuple[tuple[str, Attr], ...]:
    return tuple(sorted(op.attrs.items(), key=lambda item: item[0]))


def _of_number(op: Op, number: float) -> float:
    """What a pointwise op makes of a number."""
    import torch

    operator = overload(op.name)
    return float("nan") if operator is None or op.attrs else float(operator(torch.tensor(number)))


@reads("aten.glu")
def glu(reader: Reader, op: Op) -> View | None:
    """a * sigmoid(b) of the two halves of an axis."""
    view, dtype = reader.data(op.operands[0]), op.results[0].tensor.dtype
    dim = int(attr(op, "dim")) % len(view.axes)
    size = op.results[0].tensor.shape[dim]
    if not _kept(view) or not isinstance(size, int):
        return None
    halves = [sliced(view, dim, start, size, 1, f"{op.results[0].name}.{start}") for start in (0, size)]
    if halves[0] is None or halves[1] is None or (found := unify([halves[0], halves[1]])) is None:
        return None
    axes, (value, gate) = found
    return View(axes, times(value, Point("aten.sigmoid", (), (gate,), dtype), dtype))


@reads("aten.softmax.int")
def softmax(reader: Reader, op: Op) -> View | None:
    """A softmax over experts of which all but the chosen ones are masked is one over the slots."""
    view, dtype = reader[op.operands[0]], op.results[0].tensor.dtype
    term, dim = view.term, int(attr(op, "dim")) % len(view.axes)
    if not isinstance(term, Placed) or term.otherwise != float("-inf") or len(term.over) != 1:
        return None
    if not isinstance(term.when, Same) or term.when.right != index_of(view.axes[dim]):
        return None
    slot = Atom(term.over[0].size, term.over[0].name)
    attrs = tuple((name, -1 if name == "dim" else value) for name, value in attrs_of(op))
    body = substitute(term.value, {term.over[0]: Var(slot)})
    value = Along(op.name, attrs, (slot,), body, Var(term.over[0]), dtype)
    return View(view.axes, Sum(term.over, times(term.when, value, dtype), dtype))


HANDLERS[""] = pointwise  # of every op that has no handler of its own
