"""Seats: rows that wait for their expert in a buffer [experts, seats, hidden], as dispatch tensors put them there."""

from __future__ import annotations

from sparsec.passes.banks.capacity import count_of
from sparsec.passes.banks.normal import Product, reduce
from sparsec.passes.banks.substitute import substitute
from sparsec.passes.banks.terms import Atom, Exists, Leaf, Same, Sum, Term, Times, Var


def seated(term: Term) -> Term | None:
    """The row that sits at a pair's own seat: sum over t' of (t' has expert e and seat c) * x[t'] is x[t].

    No two pairs of an expert have one count, so that a pair's seat holds its own token and no other. Rows that were not
    seated are zeros there; but what an expert makes of them is weighed with zero by the mask that kept them out.
    """
    if not isinstance(term, Sum) or term.matrix or len(term.over) != 1:
        return None
    (other,) = term.over
    product, stack = Product([other], []), [term.body]
    while stack:
        match stack.pop():
            case Times(left, right, _):
                stack += [left, right]
            case Exists(slots, body):
                product.over += slots
                stack.append(body)
            case factor:
                product.factors.append(factor)
    reduce(product)
    over = product.over
    rows = [factor for factor in product.factors if isinstance(factor, Leaf) and factor.value.tensor.dtype.is_float]
    same = [factor for factor in product.factors if isinstance(factor, Same)]
    counts = [choice for choice in same if count_of(choice.left) and count_of(choice.right)]
    experts = [choice for choice in same if choice not in counts]
    if len(counts) != 1 or len(experts) != 1:
        return None
    rows = [row for row in rows if other in row.free and row.free - experts[0].left.free]  # the others weigh
    if len(rows) != 1:
        return None
    place = _place(experts[0], over)
    if place is None or substitute(counts[0].left, place) != counts[0].right or not _counts(counts[0], experts[0]):
        return None
    return substitute(rows[0], {other: place[other]})


def _place(choice: Same, over: list[Atom]) -> dict[Atom, Term] | None:
    """What the atoms of one pair must be for its ids to be those of another: ids[t', j'] and ids[t, j]."""
    match choice:
        case Same(Leaf(a, mine), Leaf(b, wanted)) if a is b:
            found = {i.atom: j for i, j in zip(mine, wanted, strict=True) if isinstance(i, Var) and i.atom in over}
            rest = [(i, j) for i, j in zip(mine, wanted, strict=True) if not (isinstance(i, Var) and i.atom in over)]
            return found if set(found) == set(over) and all(i == j for i, j in rest) else None
        case _:
            return None


def _counts(count: Same, choice: Same) -> bool:
    """Whether a running count is of the pairs that have the same expert."""
    found = count_of(count.right)
    return found is not None and isinstance(found[0].body, Same) and found[0].body.right == choice.right
