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

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeAlias

from sparsec.ir.core import Attr, Value
from sparsec.ir.types import Dim, DType

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
    def reads(self) -> bool:
        """Whether it depends on data, not on index variables alone."""
        return self.routed or any(part.reads for part in self.parts)

    @cached_property
    def chooses(self) -> bool:
        """Whether a comparison in it says which elements count."""
        return any(part.chooses for part in self.parts)

    @cached_property
    def size(self) -> int:
        """How many terms are inside of each other or side by side: what it takes to write it."""
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
        return replace(self, **changes) if changes else self


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
        return any(index.reads for index in self.at)

    @cached_property
    def reads(self) -> bool:
        return True


@dataclass(frozen=True, eq=False)
class Stacked(Term):
    """An element of the tensors `values` put on top of each other: `at[0]` says which."""

    values: tuple[Value, ...]
    at: tuple[Term, ...]

    @cached_property
    def routed(self) -> bool:
        return any(index.reads for index in self.at)

    @cached_property
    def reads(self) -> bool:
        return True


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

    @cached_property
    def size(self) -> int:
        return max(part.size for part in self.terms)  # a sum over experts is as large as one of them


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
