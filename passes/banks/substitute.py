"""Substitution of index variables, and the simplest writing of terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from sparsec.ir.types import Dim, product
from sparsec.passes.banks.terms import (
    Affine,
    Along,
    Atom,
    Axis,
    Chosen,
    Coord,
    Div,
    Exists,
    Flat,
    Mod,
    Not,
    Num,
    Pick,
    Placed,
    Rank,
    Running,
    Same,
    Sum,
    Term,
    Unreadable,
    Var,
    View,
)
from sparsec.passes.rules import same_size


def rebuilt(term: Term, change: Callable[[Term], Term]) -> Term:
    """A term with `change` applied to its parts, in its simplest writing."""
    new = term.map(change)
    return new if new is term else simplify(new)


def simplify(term: Term) -> Term:
    """A term in its simplest writing, for terms whose parts are simple."""
    match term:
        case Div(Flat(items, sizes), by) if same_size(sizes[1:], (by,)):
            return items[0]
        case Div(Flat(items, sizes), by) if len(sizes) > 2 and same_size(sizes[-1:], (by,)):
            return Flat(items[:-1], sizes[:-1])
        case Mod(Flat(items, sizes), by) if same_size(sizes[1:], (by,)):
            return items[1] if len(items) == 2 else Flat(items[1:], sizes[1:])
        case Mod(Flat(items, sizes), by) if same_size(sizes[-1:], (by,)):
            return items[-1]
        case Div(Num(value), by) if isinstance(by, int):
            return Num(int(value) // by)
        case Mod(Num(value), by) if isinstance(by, int):
            return Num(int(value) % by)
        case Div(index, 1):
            return index
        case Mod(_, 1):
            return Num(0)
        case Flat(items, sizes) if (whole := _unflattened(items, sizes)) is not None:
            return whole
        case Affine(Num(value), scale, offset):
            return Num(int(value) * scale + offset)
        case Affine(Affine(index, inner, start), scale, offset):
            return simplify(Affine(index, inner * scale, start * scale + offset))
        case Affine(index, 1, 0):
            return index
        case Pick(Rank(element, a), b) if a is b:
            return element
        case Rank(Pick(place, a), b) if a is b:
            return place
        case Same(Num(a), Num(b)):
            return Num(int(a == b))
        case Same(a, b) if a == b:
            return Num(1)
        case Not(Not(mask)):
            return mask
        case Not(Num(value)):
            return Num(int(not value))
        case Coord(Var(atom), _) if not isinstance(atom, Chosen):
            raise Unreadable("rows that were chosen are combined with others")
        case _:
            return term


def _unflattened(items: tuple[Term, ...], sizes: tuple[Dim, ...]) -> Term | None:
    """What was taken apart by Div and Mod only to be put together again."""
    if len(items) == 1:
        return items[0]
    match items[-2:]:
        case (Div(a, m), Mod(b, n)) if a == b and same_size((m,), (n,)) and same_size((n,), sizes[-1:]):
            return simplify(Flat((*items[:-2], a), (*sizes[:-2], product(sizes[-2:]))))
        case _:
            return None


def substitute(term: Term, changes: Mapping[Atom, Term]) -> Term:
    """A term with variables replaced, all at once."""
    return _Substitution(changes).apply(term) if changes else term


class _Substitution:
    """One simultaneous replacement; shared parts are done once."""

    def __init__(self, changes: Mapping[Atom, Term]) -> None:
        self.changes = changes
        self.keys = frozenset(changes)
        self.done: dict[Term, Term] = {}
        self.incoming = frozenset[Atom]().union(*(new.free for new in changes.values()))

    def apply(self, term: Term) -> Term:
        if not term.free & self.keys:
            return term
        if isinstance(term, Var):
            return self.changes[term.atom]
        if (known := self.done.get(term)) is None:
            known = self.done[term] = self._apply(term)
        return known

    def _apply(self, term: Term) -> Term:
        if not term.bound:
            return rebuilt(term, self.apply)
        clashing = [atom for atom in term.bound if atom in self.incoming]
        if clashing:
            fresh: dict[Atom, Term] = {atom: Var(Atom(atom.size, atom.name + "'")) for atom in clashing}
            term = rename_bound(term, fresh)
        shadowed = {atom: new for atom, new in self.changes.items() if atom not in term.bound}
        inner = self if len(shadowed) == len(self.changes) else _Substitution(shadowed)
        if isinstance(term, Running | Along):  # the place is outside of what they run over
            return replace(term, body=inner.apply(term.body), at=self.apply(term.at))
        return rebuilt(term, inner.apply)


def moved(view: View, changes: Mapping[Atom, Term], axes: tuple[Axis, ...]) -> View:
    """A view with atoms replaced, over other axes."""
    return View(axes, substitute(view.term, changes))


def rename_bound(term: Term, fresh: Mapping[Atom, Term]) -> Term:
    """A term that runs over other atoms: those that `fresh` gives."""
    over = tuple(new.atom if isinstance(new := fresh.get(atom), Var) else atom for atom in term.bound)
    if isinstance(term, Placed):
        return replace(term, over=over, when=substitute(term.when, fresh), value=substitute(term.value, fresh))
    assert isinstance(term, Sum | Exists | Running | Along)
    return replace(term, over=over, body=substitute(term.body, fresh))
