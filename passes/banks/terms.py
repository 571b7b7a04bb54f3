"""Terms of the index calculus: what one element of a tensor is, as a formula over index variables.

A tensor is a `View`: its axes name index variables (atoms), its term says what stands at an index. An axis is a tuple
of atoms: two for an axis that was made by flattening two, none for an axis of size 1. For example, with `%ids` of
`[T, k]` and `%x` of `[T, H]`

    aten.one_hot(%ids) {num_classes = 8}     axes t, j, e     [ids[t, j] == e]
    aten.linear(%x, %w)                      axes t, i        sum h: x[t, h] * w[i, h]
    aten.index.Tensor(%w, [%ids])            axes t, j, i, h  w[ids[t, j], i, h]

So spellings of one computation become one formula, up to the few rules in `normal.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeAlias

from sparsec.ir.core import Attr, Value
from sparsec.ir.types import Dim, DType, product
from sparsec.passes.rules import same_size

Axis: TypeAlias = tuple["Atom", ...]


class Atom:
    """An index variable that runs from 0 to its size; two are the same only if they are one object."""

    __slots__ = ("name", "size")

    def __init__(self, size: Dim, name: str) -> None:
        self.size, self.name = size, name

    def __repr__(self) -> str:
        return self.name


class Chosen(Atom):
    """Numbers the places where `when` holds, a formula over the atoms `base`: `where(mask)`, `x[mask]`."""

    __slots__ = ("base", "when")

    def __init__(self, size: Dim, name: str, base: Axis, when: Term) -> None:
        super().__init__(size, name)
        self.base, self.when = base, when


class Sorted(Atom):
    """Numbers the elements of `key`, a flat list over the atoms `base`, in ascending order of their value."""

    __slots__ = ("base", "key")

    def __init__(self, size: Dim, name: str, base: Axis, key: Term) -> None:
        super().__init__(size, name)
        self.base, self.key = base, key


class Unreadable(Exception):
    """A combination of tensors that has no formula."""


@dataclass(frozen=True, eq=False)
class Term:
    """Base of all terms. Terms are values: equal if they are written the same."""

    @cached_property
    def free(self) -> frozenset[Atom]:
        """The index variables that the term depends on."""
        return frozenset[Atom]().union(*(part.free for part in self.parts)) - frozenset(self.bound)

    @cached_property
    def parts(self) -> tuple[Term, ...]:
        """The terms directly inside this one."""
        found = list[Term]()
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Term):
                found.append(value)
            elif isinstance(value, tuple):
                found += [item for item in value if isinstance(item, Term)]  # pyright: ignore[reportUnknownVariableType]
        return tuple(found)

    @property
    def bound(self) -> Axis:
        """The index variables that the term itself runs over."""
        return ()

    @cached_property
    def routed(self) -> bool:
        """Whether an index or a comparison in it depends on data."""
        return any(part.routed for part in self.parts)

    @cached_property
    def gemms(self) -> int:
        """How many products with a matrix lie inside each other."""
        return max((part.gemms for part in self.parts), default=0)

    @cached_property
    def chooses(self) -> bool:
        """Whether a comparison in it says which elements count."""
        return any(part.chooses for part in self.parts)

    @cached_property
    def size(self) -> int:
        return 1 + sum(part.size for part in self.parts)

    @cached_property
    def _key(self) -> tuple[Any, ...]:
        return (type(self), *(getattr(self, field.name) for field in fields(self)))

    @cached_property
    def _hash(self) -> int:
        return hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Term) and self._hash == other._hash and self._key == other._key)

    def map(self, change: Callable[[Term], Term]) -> Term:
        """The same term with `change` applied to its parts."""
        changes = dict[str, Any]()
        for field in fields(self):
            old = getattr(self, field.name)
            new: Any = old
            if isinstance(old, Term):
                new = change(old)
            elif isinstance(old, tuple):
                new = tuple(change(item) if isinstance(item, Term) else item for item in old)  # pyright: ignore[reportUnknownVariableType]
                new = old if all(a is b for a, b in zip(old, new, strict=True)) else new  # pyright: ignore[reportUnknownVariableType,reportUnknownArgumentType]
            if new is not old:
                changes[field.name] = new
        return simplify(replace(self, **changes)) if changes else self


@dataclass(frozen=True, eq=False)
class Var(Term):
    """The value of an index variable."""

    atom: Atom

    @cached_property
    def free(self) -> frozenset[Atom]:
        return frozenset((self.atom,))


@dataclass(frozen=True, eq=False)
class Num(Term):
    """A number; bools are numbers."""

    value: int | float


@dataclass(frozen=True, eq=False)
class Leaf(Term):
    """An element of a tensor that nothing more is known of."""

    value: Value
    at: tuple[Term, ...]

    @cached_property
    def routed(self) -> bool:
        return any(isinstance(index, Leaf | Rank | Coord | Pick) or index.routed for index in self.at)


@dataclass(frozen=True, eq=False)
class Stacked(Term):
    """An element of the tensors `values` put on top of each other: `at[0]` says which."""

    values: tuple[Value, ...]
    at: tuple[Term, ...]

    @cached_property
    def routed(self) -> bool:
        return any(isinstance(index, Leaf) or index.routed for index in self.at)


@dataclass(frozen=True, eq=False)
class Point(Term):
    """A pointwise operator applied to elements."""

    name: str
    attrs: tuple[tuple[str, Attr], ...]
    args: tuple[Term, ...]
    dtype: DType


@dataclass(frozen=True, eq=False)
class Times(Term):
    """A product of elements, as `aten.mul.Tensor` (or a mask applied) makes it."""

    left: Term
    right: Term
    dtype: DType


@dataclass(frozen=True, eq=False)
class Plus(Term):
    """A sum of elements, one after the other."""

    terms: tuple[Term, ...]
    dtype: DType


@dataclass(frozen=True, eq=False)
class Sum(Term):
    """The sum of a term over all values of some atoms."""

    over: Axis
    body: Term
    dtype: DType
    matrix: bool = False  #: whether it is a product with a matrix

    @property
    def bound(self) -> Axis:
        return self.over

    @cached_property
    def gemms(self) -> int:
        return self.body.gemms + self.matrix


@dataclass(frozen=True, eq=False)
class Exists(Term):
    """1 where the body is not 0 for some value of the atoms, else 0."""

    over: Axis
    body: Term

    @property
    def bound(self) -> Axis:
        return self.over


@dataclass(frozen=True, eq=False)
class Same(Term):
    """1 where both sides are equal integers, else 0."""

    left: Term
    right: Term

    @cached_property
    def routed(self) -> bool:
        return any(not isinstance(side, Var | Num) for side in (self.left, self.right))

    @cached_property
    def chooses(self) -> bool:
        return True


@dataclass(frozen=True, eq=False)
class Not(Term):
    """1 - a mask."""

    mask: Term


@dataclass(frozen=True, eq=False)
class Flat(Term):
    """The number of an index tuple in row-major order."""

    items: tuple[Term, ...]
    sizes: tuple[Dim, ...]


@dataclass(frozen=True, eq=False)
class Div(Term):
    """An index divided by a size, rounded down."""

    index: Term
    by: Dim


@dataclass(frozen=True, eq=False)
class Mod(Term):
    """The rest of that division."""

    index: Term
    by: Dim


@dataclass(frozen=True, eq=False)
class Affine(Term):
    """scale * index + offset."""

    index: Term
    scale: int
    offset: int


@dataclass(frozen=True, eq=False)
class Coord(Term):
    """The value of a base atom at the place that a `Chosen` atom numbers."""

    place: Term  #: a variable of a Chosen atom
    base: Atom  #: only a name here, not a use of it

    @cached_property
    def routed(self) -> bool:
        return True


@dataclass(frozen=True, eq=False)
class Pick(Term):
    """The flat number of the element that a `Sorted` atom puts at a place: argsort."""

    place: Term
    atom: Sorted

    @cached_property
    def routed(self) -> bool:
        return True


@dataclass(frozen=True, eq=False)
class Rank(Term):
    """The place of an element, by its flat number, in a sorted list: the inverse of Pick."""

    element: Term
    atom: Sorted

    @cached_property
    def routed(self) -> bool:
        return True


@dataclass(frozen=True, eq=False)
class Placed(Term):
    """Slots written to the places that they choose: `value` where `when` holds for a slot of `over`, else a number."""

    over: Axis
    when: Term
    value: Term
    otherwise: float

    @property
    def bound(self) -> Axis:
        return self.over


@dataclass(frozen=True, eq=False)
class Along(Term):
    """An operator along the axis that an atom numbers, such as a softmax, at a place of that axis."""

    name: str
    attrs: tuple[tuple[str, Attr], ...]
    over: Axis
    body: Term
    at: Term
    dtype: DType

    @property
    def bound(self) -> Axis:
        return self.over

    @cached_property
    def free(self) -> frozenset[Atom]:
        return (self.body.free - frozenset(self.over)) | self.at.free


@dataclass(frozen=True, eq=False)
class Running(Term):
    """The inclusive running sum along flattened atoms, at an index."""

    over: Axis
    body: Term
    at: Term

    @property
    def bound(self) -> Axis:
        return self.over

    @cached_property
    def free(self) -> frozenset[Atom]:
        return (self.body.free - frozenset(self.over)) | self.at.free


@dataclass(frozen=True, eq=False)
class Within(Term):
    """1 where a count is no more than a limit: what an expert's capacity keeps."""

    count: Term
    limit: Dim

    @cached_property
    def chooses(self) -> bool:
        return True


@dataclass(frozen=True)
class View:
    """A tensor: the atoms of each axis, and what stands at them."""

    axes: tuple[Axis, ...]
    term: Term

    def at(self, changes: Mapping[Atom, Term], axes: tuple[Axis, ...]) -> View:
        return View(axes, substitute(self.term, changes))


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
            return term.map(self.apply)
        clashing = [atom for atom in term.bound if atom in self.incoming]
        if clashing:
            fresh: dict[Atom, Term] = {atom: Var(Atom(atom.size, atom.name + "'")) for atom in clashing}
            term = rename_bound(term, fresh)
        shadowed = {atom: new for atom, new in self.changes.items() if atom not in term.bound}
        inner = self if len(shadowed) == len(self.changes) else _Substitution(shadowed)
        if isinstance(term, Running | Along):  # the place is outside of what they run over
            return replace(term, body=inner.apply(term.body), at=self.apply(term.at))
        return term.map(inner.apply)


def rename_bound(term: Term, fresh: Mapping[Atom, Term]) -> Term:
    """A term that runs over other atoms: those that `fresh` gives."""
    over = tuple(new.atom if isinstance(new := fresh.get(atom), Var) else atom for atom in term.bound)
    if isinstance(term, Placed):
        return replace(term, over=over, when=substitute(term.when, fresh), value=substitute(term.value, fresh))
    assert isinstance(term, Sum | Exists | Running | Along)
    return replace(term, over=over, body=substitute(term.body, fresh))
