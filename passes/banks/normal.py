"""Normal forms: a term as a sum of products, with selections and sorts turned into sums over (token, slot) pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sparsec.ir.types import Dim, DType
from sparsec.passes.banks.capacity import seat_limit
from sparsec.passes.banks.read import index_of, taken_apart
from sparsec.passes.banks.sorting import placed
from sparsec.passes.banks.substitute import rebuilt, rename_bound, substitute
from sparsec.passes.banks.terms import (
    Atom,
    Chosen,
    Exists,
    Flat,
    Leaf,
    Num,
    Plus,
    Point,
    Rank,
    Same,
    Sorted,
    Sum,
    Term,
    Times,
    Var,
    Within,
)


@dataclass
class Product:
    """The sum over some atoms of a product of factors."""

    over: list[Atom]
    factors: list[Term]
    numbers: list[tuple[Term, Dim]] = field(default_factory=list[tuple[Term, Dim]])
    """Terms that an atom was fixed to, with its size: beyond it the product is zero."""

    def substitute(self, changes: dict[Atom, Term]) -> None:
        self.factors = [substitute(factor, changes) for factor in self.factors]
        self.numbers = [(substitute(number, changes), size) for number, size in self.numbers]


def products(term: Term) -> list[Product]:
    """A term as a sum of products. What is not linear, and products with matrices, are factors as a whole."""
    match term:
        case Plus(terms, _) if all(part.gemms for part in terms):
            return [product for part in terms for product in products(part)]
        case Point() if is_cast(term):
            return products(term.args[0])
        case Times(left, right, _) if len(found := products(left)) > 1:
            return [_times(product, right) for product in found]
        case Times(left, right, _) if len(found := products(right)) > 1:
            return [_times(product, left) for product in found]
        case _:
            product = Product([], [])
            flatten(term, product)
            return [product]


def _times(product: Product, factor: Term) -> Product:
    flatten(factor, product)
    return product


def flatten(term: Term, into: Product) -> None:
    if isinstance(term, Times):
        flatten(term.left, into)
        flatten(term.right, into)
    elif isinstance(term, Sum) and not term.matrix:
        clashing: dict[Atom, Term] = {atom: Var(copy_of(atom)) for atom in term.over if atom in into.over}
        term = rename_bound(term, clashing) if clashing else term
        assert isinstance(term, Sum)
        into.over += term.over
        flatten(term.body, into)
    elif is_cast(term) and isinstance(term, Point):
        flatten(term.args[0], into)  # sums and weights are taken in f32 whatever they pass through
    elif term != Num(1):
        into.factors.append(term)


def copy_of(atom: Atom) -> Atom:
    """A new atom that runs over the same numbers."""
    return Atom(atom.size, atom.name)


def is_cast(term: Term) -> bool:
    """Whether a term is a conversion between floats."""
    return isinstance(term, Point) and term.name == "aten._to_copy"


def without_casts(term: Term) -> Term:
    while is_cast(term) and isinstance(term, Point):
        term = term.args[0]
    return term


def reduce(product: Product) -> None:
    """Take out atoms that number selections or sorted rows, and comparisons that fix an atom."""
    while _reduce_once(product):
        pass
    product.factors = list(dict.fromkeys(factor for factor in product.factors if not _is_mask_twice(factor, product)))


def _is_mask_twice(factor: Term, product: Product) -> bool:
    """Whether a mask is implied by another factor: some slot is the expert's where a given slot is."""
    if not isinstance(factor, Exists):
        return False
    if len(factor.over) > 1:
        return False
    inside = Product([], [])
    flatten(factor.body, inside)
    if not inside.over and all(part in product.factors for part in inside.factors):
        return True
    return any(
        all(substitute(part, {factor.over[0]: Var(atom)}) in product.factors for part in inside.factors)
        for atom in product.over
        if factor.over and not inside.over and atom.size == factor.over[0].size
    )


def _reduce_once(product: Product) -> bool:
    for atom in product.over:
        if isinstance(atom, Chosen):
            fresh: dict[Atom, Term] = {base: Var(copy_of(base)) for base in atom.base}
            product.factors = [placed(factor, atom, fresh) for factor in product.factors]
            product.numbers = [(placed(number, atom, fresh), size) for number, size in product.numbers]
            _replace(product, atom, fresh, substitute(atom.when, fresh))
            return True
        if isinstance(atom, Sorted) and any(atom in factor.free for factor in product.factors):
            fresh = {base: Var(copy_of(base)) for base in atom.base}
            element = substitute(index_of(atom.base), fresh)
            product.substitute({atom: Rank(element, atom)})
            _replace(product, atom, fresh)
            return True
    for factor in product.factors:
        if isinstance(factor, Times | Sum) and not (isinstance(factor, Sum) and factor.matrix):
            product.factors.remove(factor)
            flatten(factor, product)
            return True
        if isinstance(factor, Same) and (changes := _solved(factor, product.over)):
            product.factors.remove(factor)
            for atom, number in changes.items():
                if (limit := seat_limit(number, atom.size)) is not None:
                    product.factors.append(limit)
                product.numbers.append((number, atom.size))
            product.over = [atom for atom in product.over if atom not in changes]
            product.substitute(changes)
            return True
    return False


def _replace(product: Product, atom: Atom, fresh: dict[Atom, Term], *factors: Term) -> None:
    product.over.remove(atom)
    product.over += [new.atom for new in fresh.values() if isinstance(new, Var)]
    product.factors += factors


def _solved(same: Same, over: Sequence[Atom]) -> dict[Atom, Term]:
    """The atoms that a comparison fixes, and to what."""
    for side, other in ((same.left, same.right), (same.right, same.left)):
        atoms = [side] if isinstance(side, Var) else list(side.items) if isinstance(side, Flat) else []
        mine = [item.atom for item in atoms if isinstance(item, Var)]
        if mine and len(mine) == len(atoms) and all(atom in over and atom not in other.free for atom in mine):
            return taken_apart(tuple(mine), other)
    return {}


def drop_skipped(product: Product) -> None:
    """Take out that rows of experts out of range are masked: a bank skips them, whatever they hold."""
    masks = [f for f in product.factors if isinstance(f, Within) and isinstance(f.count, Leaf)]
    for mask in dict.fromkeys(masks):
        number = mask.count

        def in_range(term: Term, mask: Within = mask, number: Term = number) -> Term:
            match term:
                case Times(left, right, _) if right == mask:
                    return in_range(left)
                case Times(left, right, _) if left == mask:
                    return in_range(right)
                case Point("aten.clamp" | "aten.clamp_max", attrs, (inner,), _) if inner == number:
                    kept = dict(attrs).get("max") == mask.limit and dict(attrs).get("min") in (None, 0)
                    return inner if kept else term
                case _:
                    return rebuilt(term, in_range)

        product.factors = [in_range(factor) for factor in product.factors if factor != mask]
        product.numbers.append((number, mask.limit + 1 if isinstance(mask.limit, int) else mask.limit))


def spread(product: Product) -> None:
    """A mask that holds where one of a token's slots holds is the sum over its slots, as no two slots are equal."""
    for factor in list(product.factors):
        if isinstance(factor, Exists) and isinstance(factor.body, Same) and are_distinct(factor):
            product.factors.remove(factor)
            flatten(Sum(factor.over, factor.body, DType.i64), product)
    reduce(product)


def are_distinct(mask: Exists) -> bool:
    """Whether at most one of the slots that a mask looks at can be the one."""
    assert isinstance(mask.body, Same)
    ids = mask.body.left if isinstance(mask.body.left, Leaf) else mask.body.right
    if not isinstance(ids, Leaf) or len(mask.over) > 1:
        return not mask.over
    made = ids.value.op
    while made is not None and made.name in ("aten.reshape", "aten._to_copy", "aten.slice.Tensor", "aten.clone"):
        made = made.operands[0].op
    return made is not None and made.name in ("aten.topk", "aten.sort", "aten.argsort", "moe.route")
