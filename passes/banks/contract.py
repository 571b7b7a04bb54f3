"""Ops that multiply with matrices, and sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sparsec.ir.core import Op, Value
from sparsec.ir.types import DType
from sparsec.passes.banks.read import MAX_GEMMS, Reader, matched, plainness, reads, unify
from sparsec.passes.banks.sorting import ends_groups, sorted_key
from sparsec.passes.banks.substitute import substitute
from sparsec.passes.banks.terms import (
    Atom,
    Axis,
    Num,
    Plus,
    Sorted,
    Sum,
    Term,
    Times,
    Var,
    View,
)
from sparsec.passes.rules import attr, same_size


def contract(views: Sequence[View], letters: Sequence[str], out: str, dtype: DType) -> View | None:
    """An einsum: equal letters are one axis; letters that the result lacks are summed over."""
    names = dict[str, Axis]()
    terms = list[Term]()
    for view, own in zip(views, letters, strict=True):
        if len(own) != len(view.axes) or len(set(own)) != len(own):
            return None
        wanted = list[Axis]()
        for letter, axis in zip(own, view.axes, strict=True):
            known = names.get(letter, ())
            if axis and (not known or plainness(axis) < plainness(known)):
                # The better writing of an axis wins; the terms so far follow.
                if known:
                    terms = [matched(term, [known], [axis]) for term in terms]
                names[letter] = known = axis
            wanted.append(known)
        if any(
            mine and not same_size([a.size for a in mine], [a.size for a in axis])
            for mine, axis in zip(view.axes, wanted, strict=True)
        ):
            return None
        terms.append(matched(view.term, view.axes, wanted))
    over = tuple(atom for letter, axis in names.items() if letter not in out for atom in axis)
    body = terms[0]
    for term in terms[1:]:
        body = times(body, term, dtype)
    matrix = len(terms) == 2 and not any(is_gate(term, atom) or is_row(term, atom) for term in terms for atom in over)
    return View(tuple(names.get(letter, ()) for letter in out), add_up(over, body, dtype, matrix))


def is_row(term: Term, atom: Atom) -> bool:
    """Whether what a matrix was multiplied with depends on an atom: that is an axis of rows, not of columns."""
    if isinstance(term, Sum) and term.matrix:
        factors = term.body.parts if isinstance(term.body, Times) else (term.body,)
        deepest = max(factors, key=lambda factor: factor.gemms)
        return deepest.gemms > 0 and atom in deepest.free
    return term.gemms > 0 and any(is_row(part, atom) for part in term.parts)


def is_gate(term: Term, atom: Atom) -> bool:
    """Whether a factor chooses values of an atom: a sum over it picks, it does not multiply with a matrix."""
    if isinstance(term, Times):
        return is_gate(term.left, atom) or is_gate(term.right, atom)
    if isinstance(term, Sum):
        return is_gate(term.body, atom)
    return term.chooses and not term.gemms and atom in term.free


def times(left: Term, right: Term, dtype: DType) -> Term:
    """A product, without factors that are known."""
    if isinstance(right, Num) and right.value == 1:
        return left
    if isinstance(left, Num) and left.value == 1:
        return right
    if any(isinstance(side, Num) and side.value == 0 for side in (left, right)):
        return Num(0)
    return Times(left, right, dtype)


def add_up(over: Axis, body: Term, dtype: DType, matrix: bool = False) -> Term:
    if isinstance(body, Num) and body.value == 0:
        return body
    return Sum(over, body, dtype, matrix) if over else body


def plus(left: Term, right: Term, dtype: DType) -> Term:
    terms = [
        term
        for side in (left, right)
        for term in (side.terms if isinstance(side, Plus) else (side,))
        if not (isinstance(term, Num) and term.value == 0)
    ]
    if not terms:
        return Num(0)
    return terms[0] if len(terms) == 1 else Plus(tuple(terms), dtype)


def _product(reader: Reader, values: Sequence[Value], multiply: Callable[[Sequence[View]], View | None]) -> View | None:
    """A product of tensors; what two matrices went into is looked through to weigh it, not to multiply it again."""
    view = multiply([reader.data(value) for value in values])
    if view is None or view.term.gemms <= MAX_GEMMS:
        return view
    return multiply([reader.data(value, MAX_GEMMS - 1) for value in values])


def _with_bias(reader: Reader, view: View | None, bias: Value | None, dtype: DType) -> View | None:
    if view is None or bias is None:
        return view
    if (found := unify([view, reader.data(bias)])) is None:
        return None
    axes, (term, added) = found
    return View(axes, plus(term, added, dtype))


@reads("aten.linear")
def linear(reader: Reader, op: Op) -> View | None:
    lead = "abcdefg"[: op.operands[0].tensor.rank - 1]
    dtype = op.results[0].tensor.dtype
    view = _product(reader, op.operands[:2], lambda views: contract(views, [f"{lead}x", "yx"], f"{lead}y", dtype))
    return _with_bias(reader, view, op.operands[2] if len(op.operands) > 2 else None, dtype)


@reads("aten.mm", "aten.bmm", "aten.matmul")
def matmul(reader: Reader, op: Op) -> View | None:
    return _product(reader, op.operands, lambda views: product_of(views, op.results[0].tensor.dtype))


@reads("aten.addmm", "aten.baddbmm")
def addmm(reader: Reader, op: Op) -> View | None:
    if attr(op, "beta") != 1 or attr(op, "alpha") != 1:
        return None
    dtype = op.results[0].tensor.dtype
    view = _product(reader, op.operands[1:], lambda views: product_of(views, dtype))
    return _with_bias(reader, view, op.operands[0], dtype)


def product_of(views: Sequence[View], dtype: DType) -> View | None:
    """[..., m, k] @ [..., k, n], batch axes broadcast; vectors as matmul has them."""
    a, b = views
    if not a.axes or not b.axes:
        return None
    batch = "abcdef"[: max(len(a.axes), len(b.axes), 2) - 2]
    left = batch[len(batch) - max(0, len(a.axes) - 2) :] + ("mk" if len(a.axes) > 1 else "k")
    right = batch[len(batch) - max(0, len(b.axes) - 2) :] + ("kn" if len(b.axes) > 1 else "k")
    out = batch + ("m" if len(a.axes) > 1 else "") + ("n" if len(b.axes) > 1 else "")
    return contract([a, b], [left, right], out, dtype)


@reads("aten.einsum")
def einsum(reader: Reader, op: Op) -> View | None:
    equation = str(attr(op, "equation")).replace(" ", "")
    given, arrow, out = equation.partition("->")
    if not arrow or "." in equation:
        return None
    dtype = op.results[0].tensor.dtype
    return _product(reader, op.operands, lambda views: contract(views, given.split(","), out, dtype))


@reads("aten._grouped_mm", "torch.transformers.grouped_mm_fallback")
def grouped_mm(reader: Reader, op: Op) -> View | None:
    """Rows in groups, each multiplied with the matrix of its group: the rows of a list sorted by expert."""
    if len(op.operands) != 3:
        return None
    x, w = (reader.data(value, MAX_GEMMS - 1) for value in op.operands[:2])
    offsets = reader[op.operands[2]]
    if len(x.axes) != 2 or len(w.axes) != 3 or len(x.axes[0]) != 1 or len(w.axes[0]) != 1:
        return None
    rows = x.axes[0][0]
    if not isinstance(rows, Sorted) or not ends_groups(offsets, rows):
        return None
    own = View(w.axes[1:], substitute(w.term, {w.axes[0][0]: sorted_key(rows, Var(rows))}))
    return contract([x, own], ["rx", "xy"], "ry", op.results[0].tensor.dtype)


@reads("aten.sum.dim_IntList", "aten.sum")
def sum_(reader: Reader, op: Op) -> View | None:
    view, rank = reader.data(op.operands[0]), op.operands[0].tensor.rank
    dims = attr(op, "dim") if op.name == "aten.sum.dim_IntList" else None
    dims = {int(dim) % rank for dim in (dims or range(rank))} if rank else set[int]()
    over = tuple(atom for i, axis in enumerate(view.axes) if i in dims for atom in axis)
    keep = op.name == "aten.sum.dim_IntList" and attr(op, "keepdim")
    axes = [axis if i not in dims else () for i, axis in enumerate(view.axes) if keep or i not in dims]
    if not view.term.routed and not view.term.gemms:
        return None
    if any(atom not in view.term.free for atom in over):
        return None
    return View(tuple(axes), add_up(over, view.term, op.results[0].tensor.dtype))
