"""Ops that multiply with matrices, and sums."""

from __future__ import annotations

from collections.abc import Sequence

from sparsec.ir.core import Op, Value
from sparsec.ir.types import DType
from sparsec.passes.banks.read import MAX_GEMMS, Reader, matched, reads, unify
from sparsec.passes.banks.sorting import ends_groups, sorted_key
from sparsec.passes.banks.terms import Axis, Leaf, Num, Plus, Sorted, Sum, Term, Times, Var, View, substitute
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
            if axis and (not known or len(axis) < len(known)):
                # The shorter writing of an axis wins; the terms so far follow.
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
    matrix = len(terms) == 2 and not any(map(is_gate, terms))
    return View(tuple(names.get(letter, ()) for letter in out), add_up(over, body, dtype, matrix))


def is_gate(term: Term) -> bool:
    """Whether a factor says which experts a token takes, and how much of them."""
    return term.routed and not term.gemms and not isinstance(term, Leaf)


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


def _data(reader: Reader, values: Sequence[Value]) -> list[View]:
    """The factors of a product; what two matrices went into is only looked through to weigh it."""
    views = [reader.data(value) for value in values]
    if any(is_gate(view.term) for view in views):
        return views
    return [reader.data(value, MAX_GEMMS - 1) for value in values]


def _with_bias(reader: Reader, view: View | None, bias: Value | None, dtype: DType) -> View | None:
    if view is None or bias is None:
        return view
    if (found := unify([view, reader.data(bias)])) is None:
        return None
    axes, (term, added) = found
    return View(axes, plus(term, added, dtype))


@reads("aten.linear")
def linear(reader: Reader, op: Op) -> View | None:
    x, w = _data(reader, op.operands[:2])
    lead = "abcdefg"[: len(x.axes) - 1]
    dtype = op.results[0].tensor.dtype
    view = contract([x, w], [f"{lead}x", "yx"], f"{lead}y", dtype)
    return _with_bias(reader, view, op.operands[2] if len(op.operands) > 2 else None, dtype)


@reads("aten.mm", "aten.bmm", "aten.matmul")
def matmul(reader: Reader, op: Op) -> View | None:
    return product_of(_data(reader, op.operands), op.results[0].tensor.dtype)


@reads("aten.addmm", "aten.baddbmm")
def addmm(reader: Reader, op: Op) -> View | None:
    if attr(op, "beta") != 1 or attr(op, "alpha") != 1:
        return None
    dtype = op.results[0].tensor.dtype
    return _with_bias(reader, product_of(_data(reader, op.operands[1:]), dtype), op.operands[0], dtype)


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
    return contract(_data(reader, op.operands), given.split(","), out, op.results[0].tensor.dtype)


@reads("aten._grouped_mm", "torch.transformers.grouped_mm_fallback")
def grouped_mm(reader: Reader, op: Op) -> View | None:
    """Rows in groups, each multiplied with the matrix of its group: the rows of a list sorted by expert."""
    if len(op.operands) != 3:
        return None
    x, w = _data(reader, op.operands[:2])
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
