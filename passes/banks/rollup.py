"""Rolling up: terms that differ only in a number, or in tensors of one type, as one term over that number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from sparsec.passes.banks.substitute import rename_bound, simplify, substitute
from sparsec.passes.banks.terms import (
    Axis,
    Chosen,
    Leaf,
    Num,
    Stacked,
    Term,
    Var,
    View,
)


def roll_up(terms: Sequence[Term], number: Term) -> Term | None:
    """The term that gives `terms[i]` where `number` is i. None where the terms are not alike.

    They may differ in numbers that count 0, 1, 2 ..., and in the tensors of leafs, which become `Stacked`.
    """
    first = terms[0]
    if all(term is first or term == first for term in terms):
        return first
    kinds = {type(term) for term in terms}
    if len(kinds) != 1:
        return None
    if isinstance(first, Num):
        values = [term.value for term in terms if isinstance(term, Num)]
        return number if values == list(range(len(values))) else None
    if isinstance(first, Leaf):
        return _leafs([term for term in terms if isinstance(term, Leaf)], number)
    if first.bound:
        terms = _alike(terms)
        first = terms[0]
    changes = dict[str, Any]()
    for field in fields(first):
        found = [getattr(term, field.name) for term in terms]
        if all(item is found[0] for item in found):
            continue
        merged = _merge(found, number)
        if merged is None:
            return None
        changes[field.name] = merged
    return simplify(replace(first, **changes))


def _alike(terms: Sequence[Term]) -> Sequence[Term]:
    """Terms that run over atoms of their own, with those of the first."""
    over = terms[0].bound
    if any(len(term.bound) != len(over) for term in terms):
        return terms
    return [
        term if term.bound == over else rename_bound(term, {a: Var(b) for a, b in zip(term.bound, over, strict=True)})
        for term in terms
    ]


def _merge(found: list[Any], number: Term) -> Any:
    """One field of several terms."""
    if isinstance(found[0], Term):
        return roll_up(found, number)
    if isinstance(found[0], tuple) and any(isinstance(item, Term) for item in found[0]):  # pyright: ignore[reportUnknownVariableType]
        if len({len(item) for item in found}) != 1:
            return None
        parts = [roll_up(items, number) for items in zip(*found, strict=True)]
        return tuple(parts) if all(part is not None for part in parts) else None
    return found[0] if all(item == found[0] for item in found) else None


def _leafs(terms: list[Leaf], number: Term) -> Term | None:
    """Leafs at the same place: of one tensor at other numbers, or of several tensors."""
    at = [roll_up(items, number) for items in zip(*(term.at for term in terms), strict=False)]
    if any(index is None for index in at) or len({len(term.at) for term in terms}) != 1:
        return None
    known = tuple(index for index in at if index is not None)
    values = tuple(term.value for term in terms)
    if len(set(values)) == 1:
        return Leaf(values[0], known)
    if len(set(values)) != len(values) or len({value.type for value in values}) != 1:
        return None
    return Stacked(values, (number, *known))


def rolled(views: Sequence[View], dim: int, number: Term, axis: Axis) -> View | None:
    """Views of one shape but for axis `dim`, as one view that has `axis` there and `views[i]` where `number` is i."""
    first = views[0]
    terms = [term for view in views if (term := over_axes_of(view, first, dim)) is not None]
    whole = roll_up(terms, number) if len(terms) == len(views) else None
    return None if whole is None else View((*first.axes[:dim], axis, *first.axes[dim + 1 :]), whole)


def over_axes_of(view: View, other: View, skip: int = -1) -> Term | None:
    """The term of a view, over the atoms of another one; None where the axes are not of the same pieces."""
    changes = dict[Any, Term]()
    for i, (mine, wanted) in enumerate(zip(view.axes, other.axes, strict=True)):
        if i == skip:
            continue
        if len(mine) != len(wanted) or (mine != wanted and any(isinstance(atom, Chosen) for atom in mine)):
            return None
        changes |= {a: Var(b) for a, b in zip(mine, wanted, strict=True) if a is not b}
    return substitute(view.term, changes)
