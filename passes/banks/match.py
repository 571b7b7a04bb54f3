"""Recognises a bank of experts: sum over slots of weight * down[e](act(up[e](x))), where e = ids[token, slot].

A bank is found in whatever spelling, since spellings differ only in the terms that `normal` takes away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sparsec.ir.types import Dim, DType
from sparsec.passes.banks.capacity import Capacity, capacity_of
from sparsec.passes.banks.normal import Product, drop_skipped, flatten, products, reduce, spread, without_casts
from sparsec.passes.banks.rollup import roll_up
from sparsec.passes.banks.seats import seated
from sparsec.passes.banks.substitute import substitute
from sparsec.passes.banks.terms import (
    Affine,
    Atom,
    Axis,
    Chosen,
    Exists,
    Flat,
    Leaf,
    Not,
    Num,
    Plus,
    Point,
    Same,
    Stacked,
    Sum,
    Term,
    Times,
    Var,
    View,
    Within,
)


class NoBank(Exception):
    """Why a term is no bank of experts, in words."""


class Dense(NoBank):
    """A mixture that has no choice in it."""


@dataclass(frozen=True)
class Matrix:
    """A product with a weight: sum over `inner` of x * weight + bias; `outer` numbers the columns."""

    x: Term
    weight: Leaf | Stacked
    bias: Term | None
    inner: Atom


@dataclass
class Bank:
    """What a matched term says: terms over token atoms, slot atoms and the atoms of the expert's widths."""

    tokens: Axis
    slots: Axis
    ids: Term  #: over tokens and slots
    number: Term  #: what the matrices are chosen by: `ids`, or an atom that runs over all experts
    weights: list[Term]  #: factors over tokens and slots
    scales: list[Term]  #: the same, of the rows that go into the expert
    x: Term  #: over tokens and `hidden`
    hidden: Atom
    ups: list[Matrix]  #: the products inside the activation, in order of their columns; none for linear experts
    activation: Term  #: over the columns `inner`, with `ups` as leafs
    inner: Atom
    down: Matrix
    out: Atom
    capacity: Capacity | None = None  #: which pairs are kept
    needs_zero: bool = False  #: whether an expert must give zeros for a row of zeros
    parts: dict[Term, int] = field(default_factory=dict[Term, int])  #: term of an up product -> its place in `ups`

    @property
    def experts(self) -> int:
        """How many experts there are. Raises: NoBank."""
        weight = self.down.weight
        if isinstance(weight, Stacked):
            return len(weight.values)
        for index, size in zip(weight.at, weight.value.tensor.shape, strict=True):
            count = size if index == self.number else index.sizes[0] if isinstance(index, Flat) else None
            if isinstance(count, int):
                return count
        raise NoBank("the number of experts is not known")


def match(view: View) -> Bank:
    """The bank behind a view of [tokens..., hidden]. Raises: NoBank."""
    if not view.axes or len(view.axes[-1]) != 1:
        raise NoBank("its last axis is no hidden dimension")
    tokens, out = tuple(atom for axis in view.axes[:-1] for atom in axis), view.axes[-1][0]
    found = products(view.term)
    for product in found:
        reduce(product)
        spread(product)
        drop_skipped(product)
    product = merged(found)
    return _bank(product, tokens, out)


def merged(found: list[Product]) -> Product:
    """Products that differ in the number of an expert, then in that of a slot, as one."""
    groups = dict[Term, list[tuple[int, Product]]]()
    rest = list[Product]()
    for product in found:
        fixed = [factor for factor in product.factors if _is_choice(factor)]
        if len(fixed) != 1:
            rest.append(product)
            continue
        (same,) = fixed
        assert isinstance(same, Same) and isinstance(same.right, Num)
        product.factors.remove(same)
        canonical = _renamed(product, groups, same.left)
        groups.setdefault(canonical, []).append((int(same.right.value), product))
    for ids, members in groups.items():
        members.sort(key=lambda member: member[0])
        numbers = [number for number, _ in members]
        if numbers != list(range(len(numbers))):
            raise NoBank(f"it adds up the experts {numbers}, not each from 0 on once")
        whole = _rolled([product for _, product in members], ids)
        whole.numbers.append((ids, len(members)))
        rest.append(whole)
    if len(rest) == 1:
        return rest[0]
    return _rolled_slots(rest)


def _is_choice(factor: Term) -> bool:
    """Whether a factor says that a slot's expert has a certain number."""
    return isinstance(factor, Same) and isinstance(factor.right, Num) and not isinstance(factor.left, Num)


def _renamed(product: Product, groups: dict[Term, list[tuple[int, Product]]], ids: Term) -> Term:
    """The ids of a product in the atoms of an earlier one that has the same, to which the product is brought."""
    for known, members in groups.items():
        first = members[0][1]
        if len(first.over) != len(product.over):
            continue
        changes: dict[Atom, Term] = {a: Var(b) for a, b in zip(product.over, first.over, strict=True)}
        if substitute(ids, changes) == known:
            product.substitute(changes)
            product.over = list(first.over)
            return known
    return ids


def _rolled(members: Sequence[Product], number: Term) -> Product:
    first = members[0]
    if len({len(member.factors) for member in members}) != 1:
        raise NoBank("its experts are not all computed in the same way")
    factors = [roll_up(terms, number) for terms in zip(*(member.factors for member in members), strict=True)]
    found = [factor for factor in factors if factor is not None]
    if len(found) != len(factors):
        raise NoBank("its experts are not all computed in the same way")
    return Product(list(first.over), found)


def _rolled_slots(rest: list[Product]) -> Product:
    """One product per slot, as one over all slots."""
    if not rest or any(product.over or len(product.numbers) != len(rest[0].numbers) for product in rest):
        raise NoBank("it adds up terms that are no experts of one bank")
    slot = Atom(len(rest), "slot")
    product = _rolled(rest, Var(slot))
    numbers = [_numbered([of.numbers[i] for of in rest], slot) for i in range(len(rest[0].numbers))]
    return Product([slot], product.factors, numbers)


def _numbered(found: Sequence[tuple[Term, Dim]], slot: Atom) -> tuple[Term, Dim]:
    term = roll_up([number for number, _ in found], Var(slot))
    if term is None or len({size for _, size in found}) != 1:
        raise NoBank("its slots are not all computed in the same way")
    return term, found[0][1]


def _bank(product: Product, tokens: Axis, out: Atom) -> Bank:
    factors = _with_down(product, out)
    downs = [factor for factor in factors if factor.gemms]
    if len(downs) != 1:
        raise NoBank(f"it has {len(downs)} factors that matrices went into, not one")
    weights = [factor for factor in factors if factor is not downs[0] and not isinstance(factor, Within)]
    limits = [factor for factor in factors if isinstance(factor, Within)]
    slots = tuple(product.over)
    allowed = frozenset((*tokens, *slots))
    for weight in weights:
        if not weight.free <= allowed:
            raise NoBank("a weight depends on more than the token and the slot")
    down = matrix_of(downs[0], out)
    if down is None:
        raise NoBank("its result is not the product of an activation and a matrix")
    inner = down.inner
    activation, on_hidden = _unweighed(down, inner)
    weights += on_hidden
    ups = list[tuple[Term, Matrix]]()
    if not activation.gemms:
        return _linear(Product(product.over, [*weights, *limits], product.numbers), tokens, activation, down, out)
    _find_ups(activation, inner, ups)
    if not ups:
        raise NoBank("no product with a matrix lies inside of the activation")
    ids = expert_of(down.weight, {inner, out})
    for _, up in ups:
        if expert_of(up.weight, {inner, up.inner}) != ids:
            raise NoBank("the matrices of one expert are chosen by different numbers")
    if not ids.free <= allowed or not ids.free:
        raise NoBank("the expert's number does not depend on the token")
    hidden = ups[0][1].inner
    x, scales = _input(ups[0][1].x, allowed, hidden)
    for _, up in ups[1:]:
        if substitute(up.x, {up.inner: Var(hidden)}) != ups[0][1].x:
            raise NoBank("the matrices of one expert multiply different inputs")
    bank = Bank(tokens, slots, ids, ids, weights, scales, x, hidden, [], activation, inner, down, out)
    _order_parts(bank, ups)
    counts = [size for number, size in product.numbers if number == ids]
    if any(count != bank.experts for count in counts):
        raise NoBank(f"{counts[0]} of {bank.experts} experts are added up")
    if len(limits) > 1:
        raise NoBank("pairs are dropped by more than one limit")
    for limit in limits:
        bank.capacity = capacity_of(limit, ids, tokens, slots)
        if bank.capacity is None:
            raise NoBank("pairs are dropped by a count of something else than their expert's pairs")
    if isinstance(ids, Var):
        _choose(bank, ids.atom)
    return bank


def _linear(product: Product, tokens: Axis, rows: Term, down: Matrix, out: Atom) -> Bank:
    """Experts of one matrix each."""
    allowed = frozenset((*tokens, *product.over))
    ids = expert_of(down.weight, {down.inner, out})
    if isinstance(ids, Var) or not ids.free <= allowed or not ids.free or any(f.chooses for f in product.factors):
        raise NoBank("the expert's number does not depend on the token, or more than two matrices follow each other")
    x, scales = _input(rows, allowed, down.inner)
    if scales and down.bias is not None:
        raise NoBank("rows are scaled in front of a linear layer with a bias")
    weights = [*product.factors, *scales]
    bank = Bank(tokens, tuple(product.over), ids, ids, weights, [], x, down.inner, [], rows, down.inner, down, out)
    counts = [size for number, size in product.numbers if number == ids]
    if any(count != bank.experts for count in counts):
        raise NoBank(f"{counts[0]} of {bank.experts} experts are added up")
    return bank


def _unweighed(down: Matrix, inner: Atom) -> tuple[Term, list[Term]]:
    """The activation, and the weights that it is multiplied by in front of the second matrix."""
    if down.bias is not None or not isinstance(down.x, Times):
        return down.x, []
    for side, other in ((down.x.left, down.x.right), (down.x.right, down.x.left)):
        if inner not in other.free and not other.gemms and not isinstance(other, Num):
            return side, [other]
    return down.x, []


def _choose(bank: Bank, expert: Atom) -> None:
    """Where every expert runs on every row, but on zeros unless the row chose it: the slots that chose it."""
    product = Product([], [])
    for scale in bank.scales:
        flatten(scale, product)
    chosen = [factor for factor in product.factors if isinstance(factor, Same) and factor.right == Var(expert)]
    rest = [factor for factor in product.factors if factor not in chosen]
    if expert.size != bank.experts:
        raise NoBank(f"{expert.size} of {bank.experts} experts are added up")
    if bank.weights or len(chosen) != 1 or any(expert in factor.free for factor in rest):
        raise Dense("every expert runs on every token")
    (choice,) = chosen
    bank.slots = tuple(atom for atom in bank.slots if atom is not expert) + tuple(product.over)
    bank.ids, bank.scales, bank.needs_zero = choice.left, rest, True


def _with_down(product: Product, out: Atom) -> list[Term]:
    """The factors, with a down projection that stands beside its activation put together with it."""
    for weight in product.factors:
        if isinstance(weight, Leaf | Stacked) and out in weight.free:
            inner = [atom for atom in product.over if Var(atom) in weight.at]
            beside = [f for f in product.factors if f is not weight and f.gemms and any(a in f.free for a in inner)]
            if beside and len(inner) == 1:
                product.over.remove(inner[0])
                dtype = dtype_of(weight)
                rows = beside[0]
                for factor in beside[1:]:  # an activation that is a product was taken apart with the rest
                    rows = Times(rows, factor, dtype)
                joint = Sum((inner[0],), Times(rows, weight, dtype), dtype, True)
                return [f for f in product.factors if f is not weight and f not in beside] + [joint]
    return product.factors


def dtype_of(term: Term) -> DType:
    """The dtype that a term is computed in."""
    match term:
        case Leaf(value, _):
            return value.tensor.dtype
        case Stacked(values, _):
            return values[0].tensor.dtype
        case Point(dtype=dtype) | Times(dtype=dtype) | Plus(dtype=dtype) | Sum(dtype=dtype):
            return dtype
        case Same() | Exists() | Not():
            return DType.i1
        case _:
            return DType.f32


def matrix_of(term: Term, outer: Atom) -> Matrix | None:
    """A product with a matrix whose columns `outer` numbers, with its bias."""
    term = without_casts(term)
    bias: Term | None = None
    if isinstance(term, Plus):
        sums = [part for part in term.terms if without_casts(part).gemms]
        others = [part for part in term.terms if not without_casts(part).gemms]
        if len(sums) != 1 or len(others) != 1 or not isinstance(others[0], Leaf | Stacked):
            return None
        term, bias = without_casts(sums[0]), others[0]
    if not isinstance(term, Sum) or not term.matrix or len(term.over) != 1:
        return None
    inner = term.over[0]
    factors = Product([], [])
    stack = [term.body]
    while stack:
        part = stack.pop()
        if isinstance(part, Times):
            stack += [part.right, part.left]
        else:
            factors.factors.append(part)
    weights = [f for f in factors.factors if isinstance(f, Leaf | Stacked) and outer in f.free and inner in f.free]
    rest = [f for f in factors.factors if f not in weights]
    if len(weights) != 1 or not rest or any(outer in f.free for f in rest):
        return None
    x = rest[0]
    for other in rest[1:]:
        x = Times(x, other, term.dtype)
    weight = weights[0]
    assert isinstance(weight, Leaf | Stacked)
    return Matrix(x, weight, bias, inner)


def expert_of(weight: Leaf | Stacked, widths: set[Atom]) -> Term:
    """The term that says whose matrix it is. Raises: NoBank."""
    found = list[Term]()
    for index in weight.at:
        if isinstance(index, Flat) and not index.items[0].free & widths:
            found.append(index.items[0])
        elif not index.free & widths:
            found.append(index)
    found = [index for index in found if index != Num(0)] or found
    if len(found) != 1:
        raise NoBank("a matrix is the same for all experts")
    return found[0]


def _find_ups(term: Term, inner: Atom, ups: list[tuple[Term, Matrix]]) -> None:
    """The products with matrices inside of an activation over the columns `inner`."""
    if (up := matrix_of_columns(term, inner)) is not None:
        if all(known != term for known, _ in ups):
            ups.append((term, up))
        return
    if isinstance(term, Point | Times | Plus):
        if isinstance(term, Plus):
            # (x W + b) + 1: the product and its bias are one part.
            for part in _plus_parts(term):
                _find_ups(part, inner, ups)
            return
        for part in term.parts:
            _find_ups(part, inner, ups)
    elif not isinstance(term, Num):
        raise NoBank("the activation is not pointwise over the columns of an expert")


def _plus_parts(term: Plus) -> list[Term]:
    """The summands, with a product and the bias right behind it as one."""
    parts = list[Term]()
    for part in term.terms:
        biased = isinstance(part, Leaf | Stacked) and parts and isinstance(parts[-1], Sum)
        if biased:
            parts[-1] = Plus((parts[-1], part), term.dtype)
        else:
            parts.append(part)
    return parts if len(parts) > 1 else list(term.terms)


def matrix_of_columns(term: Term, inner: Atom) -> Matrix | None:
    if isinstance(term, Point) or inner not in term.free:
        return None
    return matrix_of(term, inner)


def _input(x: Term, allowed: frozenset[Atom], hidden: Atom) -> tuple[Term, list[Term]]:
    """The rows that go into the experts, and the weights that they are scaled by."""
    factors, stack = list[Term](), [x]
    while stack:
        part = without_casts(stack.pop())
        if isinstance(part, Times):
            stack += [part.right, part.left]
        else:
            factors.append(part)
    factors = [seated(factor) or factor for factor in factors]
    rows = [factor for factor in factors if hidden in factor.free]
    scales = [factor for factor in factors if hidden not in factor.free]
    if len(rows) != 1 or not isinstance(rows[0], Leaf):
        raise NoBank("the input of the experts is not a row per token")
    if any(not scale.free <= allowed for scale in scales):
        raise NoBank("the input of the experts is scaled by more than a weight per token and slot")
    return rows[0], scales


def _order_parts(bank: Bank, ups: list[tuple[Term, Matrix]]) -> None:
    """Parts of one weight in the order of their columns; parts of several in the order of their use."""

    def place(item: tuple[int, tuple[Term, Matrix]]) -> tuple[int, int]:
        i, (_, up) = item
        first = next(n for n, (_, other) in enumerate(ups) if _same_tensor(up.weight, other.weight))
        return first, columns_of(up.weight, bank.inner)[1] if _shared(up, ups) else i

    for i, (_, (term, up)) in enumerate(sorted(enumerate(ups), key=place)):
        bank.ups.append(up)
        bank.parts[term] = i


def _shared(up: Matrix, ups: list[tuple[Term, Matrix]]) -> bool:
    return sum(_same_tensor(up.weight, other.weight) for _, other in ups) > 1


def _same_tensor(a: Leaf | Stacked, b: Leaf | Stacked) -> bool:
    return (
        (a.value is b.value)
        if isinstance(a, Leaf) and isinstance(b, Leaf)
        else (isinstance(a, Stacked) and isinstance(b, Stacked) and a.values == b.values)
    )


def columns_of(weight: Leaf | Stacked, inner: Atom) -> tuple[int, int]:
    """Step and start of the columns that `inner` numbers. Raises: NoBank."""
    for index in weight.at:
        match index:
            case Var(atom) if atom is inner:
                return 1, 0
            case Affine(Var(atom), scale, offset) if atom is inner:
                return scale, offset
            case Flat(items, _) if items[-1] == Var(inner):
                return 1, 0
            case Flat(items, _) if isinstance(items[-1], Affine) and items[-1].index == Var(inner):
                return items[-1].scale, items[-1].offset
            case _:
                pass
    raise NoBank("the columns of a matrix are taken in no order that a kernel knows")


def is_rolled_out(term: Term) -> bool:
    """Whether a term adds up experts one by one, each chosen by its number."""
    terms = term.terms if isinstance(term, Plus) else (term,)
    return all(part.gemms and _has_number(part) for part in terms)


def _has_number(term: Term) -> bool:
    stack, seen = [term], set[Term]()
    while stack:
        part = stack.pop()
        if isinstance(part, Same) and isinstance(part.right, Num):
            return True
        if part not in seen:
            seen.add(part)
            stack += [*part.parts, *(atom.when for atom in part.bound if isinstance(atom, Chosen))]
    return False


def adds_rows(term: Term) -> bool:
    """Whether a term adds up what several matrices give for one row: a mixture, be it a dense one."""
    return isinstance(term, Sum) and not term.matrix


def picks_experts(term: Term) -> bool:
    """Whether data says which matrices are multiplied with, or whose results count."""
    stack, seen = [term], set[Term]()
    while stack:
        part = stack.pop()
        if isinstance(part, Leaf) and part.routed and part.value.tensor.rank >= 3:
            return True
        if part not in seen:
            seen.add(part)
            stack += part.parts
    return term.chooses
