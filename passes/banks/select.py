"""Ops that choose: comparisons with an expert's number, masks, gathers and scatters by index."""

from __future__ import annotations

from collections.abc import Sequence

from sparsec.ir.core import Op, Value
from sparsec.ir.types import DType, Sym
from sparsec.passes.banks.contract import add_up, plus, times
from sparsec.passes.banks.read import Reader, index_of, matched, reads, size_of, taken_apart, unify
from sparsec.passes.banks.substitute import moved, substitute
from sparsec.passes.banks.terms import (
    Atom,
    Axis,
    Chosen,
    Coord,
    Exists,
    Leaf,
    Not,
    Num,
    Pick,
    Placed,
    Plus,
    Rank,
    Running,
    Same,
    Sorted,
    Sum,
    Term,
    Times,
    Var,
    View,
    Within,
)
from sparsec.passes.rules import attr


@reads("aten.eq.Scalar", "aten.eq.Tensor", "aten.ne.Scalar", "aten.ne.Tensor")
def equal(reader: Reader, op: Op) -> View | None:
    """Comparing integers; a mask compared with 0 or 1 is a mask."""
    if any(value.tensor.dtype.is_float for value in op.operands):
        return None
    views = [reader[value] for value in op.operands]
    if len(views) == 1:
        other = attr(op, "other")
        if isinstance(other, Sym) or other != int(other):
            return None
        views.append(View((), Num(int(other))))
    if (found := unify(views)) is None:
        return None
    axes, (left, right) = found
    if is_mask(left) and isinstance(right, Num) and right.value in (0, 1):
        same = left if right.value == 1 else Not(left)
    else:
        same = Same(left, right)
    return View(axes, same if op.name.startswith("aten.eq") else negated(same))


def is_mask(term: Term) -> bool:
    return isinstance(term, Same | Exists | Not | Within)


def negated(mask: Term) -> Term:
    return mask.mask if isinstance(mask, Not) else Not(mask)


@reads("aten.logical_not", "aten.bitwise_not")
def logical_not(reader: Reader, op: Op) -> View | None:
    view = reader[op.operands[0]]
    return View(view.axes, negated(view.term)) if is_mask(view.term) else None


def positive(reader: Reader, op: Op) -> View | None:
    """count > 0."""
    view = reader[op.operands[0]]
    if attr(op, "other") != 0 or not view.term.routed or not is_nonnegative(view.term):
        return None
    return View(view.axes, exists((), view.term))


def is_nonnegative(term: Term) -> bool:
    """Whether a term is certainly not below zero."""
    match term:
        case Same() | Not() | Exists() | Running() | Within():
            return True
        case Num(value):
            return value >= 0
        case Sum(body=body):
            return is_nonnegative(body)
        case Times(left, right, _):
            return is_nonnegative(left) and is_nonnegative(right)
        case Leaf(value, _):
            return has_no_negatives(value)
        case _:
            return False


_NEVER_BELOW_ZERO = frozenset(
    f"aten.{name}"
    for name in ["softmax.int", "sigmoid", "exp", "relu", "softplus", "abs", "sqrt", "one_hot", "clamp_min", "square"]
)
_NO_MORE_THAN_OPERANDS = frozenset(
    f"aten.{name}"
    for name in ["topk", "reshape", "_to_copy", "div.Tensor", "mul.Tensor", "add.Tensor", "sum.dim_IntList", "gather",
                 "max.dim", "amax", "unsqueeze", "squeeze.dim", "expand", "permute", "t", "transpose.int", "clone",
                 "slice.Tensor", "select.int", "sort"]
)  # fmt: skip


def has_no_negatives(value: Value) -> bool:
    """Whether the ops behind a tensor make no negative number."""
    op = value.op
    if op is None:
        return False
    if op.name in _NEVER_BELOW_ZERO:
        return op.name != "aten.clamp_min" or float(attr(op, "min")) >= 0
    return op.name in _NO_MORE_THAN_OPERANDS and all(
        has_no_negatives(operand) for operand in op.operands if operand.tensor.dtype.is_float
    )


def exists(over: Axis, body: Term) -> Term:
    if isinstance(body, Sum | Exists):
        return Exists((*over, *body.over), body.body)
    return Exists(over, body) if over or not is_mask(body) else body


@reads("aten.any.dim", "aten.any.dims", "aten.any", "aten.amax", "aten.max.dim")
def any_(reader: Reader, op: Op) -> View | Sequence[View | None] | None:
    view, rank = reader[op.operands[0]], op.operands[0].tensor.rank
    if not is_mask(view.term):
        return None
    dim = attr(op, "dim") if op.name != "aten.any" else None
    dims = {int(item) % rank for item in (dim if isinstance(dim, tuple) else range(rank) if dim is None else (dim,))}
    over = tuple(atom for i, axis in enumerate(view.axes) if i in dims for atom in axis)
    keep = op.name != "aten.any" and attr(op, "keepdim")
    axes = tuple(axis if i not in dims else () for i, axis in enumerate(view.axes) if keep or i not in dims)
    made = View(axes, exists(over, view.term))
    return [made, None] if op.name == "aten.max.dim" else made


@reads("aten.one_hot")
def one_hot(reader: Reader, op: Op) -> View | None:
    view, classes = reader[op.operands[0]], attr(op, "num_classes")
    if not isinstance(classes, int) or classes < 1:
        return None
    atom = Atom(classes, f"{op.results[0].name}.e")
    return View((*view.axes, (atom,) if classes > 1 else ()), Same(view.term, Var(atom) if classes > 1 else Num(0)))


@reads("aten.where", "aten.nonzero", "aten.nonzero_numpy")
def nonzero(reader: Reader, op: Op) -> list[View | None] | View | None:
    """The places of a mask's ones: one list per axis, or a matrix with a column per axis."""
    if len(op.operands) != 1:
        return None
    view, size = reader[op.operands[0]], op.results[0].tensor.shape[0]
    if not view.term.routed:
        return None
    place = chosen(reader, op.operands[0], view, size)
    coords = [substitute(index_of(axis), _coords(place)) for axis in view.axes]
    if op.name != "aten.nonzero":
        return [View(((place,),), coord) for coord in coords]
    if len(coords) == 1:
        return View(((place,), ()), coords[0])
    reader.atoms[op.results[0]] = [View(((place,),), coord) for coord in coords]
    return None


def chosen(reader: Reader, mask: Value, view: View, size: object) -> Chosen:
    """The atom that numbers the ones of a mask; one for all who choose by it."""
    base = tuple(atom for axis in view.axes for atom in axis)
    made: Chosen = reader.atoms.setdefault((base, view.term), Chosen(size, f"{mask.name}.place", base, view.term))  # type: ignore[arg-type]
    return made


def _coords(place: Chosen) -> dict[Atom, Term]:
    return {atom: Coord(Var(place), atom) for atom in place.base}


@reads("aten.index.Tensor")
def index(reader: Reader, op: Op) -> View | None:
    """x[i], x[:, i], x[i, j], x[mask]."""
    x, given = op.operands[0], op.arguments[1]
    indices = given if isinstance(given, tuple) else tuple(op.arguments[1:])
    view = reader.data(x) if x.tensor.dtype.is_float else reader[x]
    if isinstance(view.term, Plus) or (isinstance(view.term, Sum) and not view.term.matrix and view.term.gemms):
        view = reader.leaf(x)  # rows of a sum that goes on: what they hold so far matters to nobody
    places = [i for i, item in enumerate(indices) if item is not None]
    used = [item for item in indices if isinstance(item, Value)]
    if used and used[0].tensor.dtype is DType.i1:
        return _by_mask(reader, view, used, places, op)
    if places != list(range(places[0], places[0] + len(places))):
        return None
    if (found := unify([reader[item] for item in used])) is None:
        return None
    axes, terms = found
    if len(places) == len(view.axes) and any(_is_looked_up(view.term, term) for term in terms):
        return None
    changes = dict[Atom, Term]()
    for place, term in zip(places, terms, strict=True):
        changes |= taken_apart(view.axes[place], term)
    return moved(view, changes, (*view.axes[: places[0]], *axes, *view.axes[places[0] + len(places) :]))


def _is_looked_up(table: Term, index: Term) -> bool:
    """Whether numbers are looked up by ids as they are: weights that a router gathers, one number per slot."""
    return isinstance(table, Leaf) and not table.routed and isinstance(index, Leaf) and not index.routed


def _by_mask(reader: Reader, view: View, used: Sequence[Value], places: Sequence[int], op: Op) -> View | None:
    mask = reader[used[0]]
    first = places[0]
    if len(used) != 1 or not mask.term.routed:
        return None
    own = view.axes[first : first + len(mask.axes)]
    place = chosen(reader, used[0], mask, op.results[0].tensor.shape[first])
    term = substitute(matched(view.term, own, mask.axes), _coords(place))
    return View((*view.axes[:first], (place,), *view.axes[first + len(mask.axes) :]), term)


@reads("aten.gather", "aten.index_select", "aten.take_along_dim")
def gather(reader: Reader, op: Op) -> View | None:
    x, ids = op.operands[:2]
    view, by = (reader.data(x) if x.tensor.dtype.is_float else reader[x]), reader[ids]
    if op.name == "aten.gather" and _is_looked_up(view.term, by.term):
        return None
    dim = int(attr(op, "dim")) % len(view.axes)
    axis = view.axes[dim]
    if op.name == "aten.index_select":
        return moved(view, taken_apart(axis, by.term), (*view.axes[:dim], *by.axes, *view.axes[dim + 1 :]))
    others = [i for i in range(len(view.axes)) if i != dim]
    if op.name == "aten.take_along_dim":  # broadcasts
        by = View(tuple(mine or view.axes[i] if i != dim else mine for i, mine in enumerate(by.axes)), by.term)
    if any(view.axes[i] and size_of(view.axes[i]) != size_of(by.axes[i]) for i in others):
        return None
    term = matched(view.term, [view.axes[i] for i in others], [by.axes[i] for i in others])
    return View(by.axes, substitute(term, taken_apart(axis, by.term)))


@reads("aten.scatter.value", "aten.scatter.src", "aten.scatter_add", "aten.scatter_reduce.two")
def scatter(reader: Reader, op: Op) -> View | None:
    """Values put where an index says: on zeros, the sum of those that chose a place."""
    target, by, *given = op.operands
    base, ids = reader[target], reader[by]
    dim = int(attr(op, "dim")) % target.tensor.rank
    source = reader.data(given[0]) if given else View(tuple(() for _ in base.axes), _number(op))
    adds = op.name == "aten.scatter_add" or (op.name == "aten.scatter_reduce.two" and attr(op, "reduce") == "sum")
    if (found := unify([ids, source])) is None or (op.name == "aten.scatter_reduce.two" and not adds):
        return None
    axes, (number, value) = found
    if any(size_of(a) != size_of(b) for i, (a, b) in enumerate(zip(axes, base.axes, strict=True)) if i != dim):
        return None
    own = base.axes[dim] if isinstance(base.term, Num) else _fresh(target, dim)
    out, dtype = (*axes[:dim], own, *axes[dim + 1 :]), op.results[0].tensor.dtype
    choice = Same(number, index_of(own))
    if isinstance(base.term, Num) and base.term.value != 0 and not adds:
        return View(out, Placed(axes[dim], choice, value, float(base.term.value)))
    if base.term != Num(0) and not adds:
        return None
    added = View(out, add_up(axes[dim], times(choice, value, dtype), dtype))
    return added if base.term == Num(0) else _onto(base, added, dtype)


def _onto(base: View, added: View, dtype: DType) -> View | None:
    """What is added to a tensor, and the tensor."""
    if (found := unify([base, added])) is None:
        return None
    axes, (before, more) = found
    return View(axes, plus(before, more, dtype))


def _number(op: Op) -> Term:
    value = attr(op, "value")
    return Num(value if isinstance(value, int | float) else 0)


@reads("aten.index_add", "aten.index_put", "aten._unsafe_index_put")
def index_add(reader: Reader, op: Op) -> View | None:
    """Rows added to the tokens that an index names; a permutation written out; `out[mask] = out[mask] + rows`."""
    if op.name == "aten.index_add":
        dim = int(attr(op, "dim")) % op.operands[0].tensor.rank
        if attr(op, "alpha") != 1:
            return None
        return _added(reader, op, [(dim, op.operands[1])], reader.data(op.operands[2]), True)
    given, values = op.arguments[1], reader.data(op.operands[-1])
    indices = given if isinstance(given, tuple) else (given,)
    pairs = [(i, item) for i, item in enumerate(indices) if isinstance(item, Value)]
    return _added(reader, op, pairs, values, attr(op, "accumulate") is True)


def _added(reader: Reader, op: Op, pairs: Sequence[tuple[int, Value]], rows: View, accumulate: bool) -> View | None:
    target, dtype = op.operands[0], op.results[0].tensor.dtype
    base, (dim, by) = reader[target], pairs[0]
    if len(pairs) != 1:
        return None
    number = reader[by]
    if by.tensor.dtype is DType.i1:
        mask, place = number, chosen(reader, by, number, rows.axes[dim][0].size if rows.axes[dim] else 1)
        out = mask.axes
        if len(rows.axes[dim]) != 1 or rows.axes[dim][0] is not place or not mask.term.routed:
            return None
        condition: Term = Num(1)
        for axis in mask.axes:
            mine = substitute(index_of(axis), _coords(place))
            condition = times(condition, Same(mine, index_of(axis)), DType.i64)
        place_axis: Axis = (place,)
    else:
        if len(number.axes) != 1 or (found := unify([View((rows.axes[dim],), Num(0)), number])) is None:
            return None
        (place_axis,), (_, mine) = found
        rows = View(
            (*rows.axes[:dim], place_axis, *rows.axes[dim + 1 :]),
            matched(rows.term, [rows.axes[dim]], [place_axis]),
        )
        if not accumulate and isinstance(mine, Pick) and len(place_axis) == 1:
            return _permuted(rows, mine, place_axis[0], dim)
        out = (base.axes[dim] or (Atom(1, "one"),),) if isinstance(base.term, Num) else (_fresh(target, dim),)
        condition = Same(mine, index_of(out[0]))
    value = rows.term
    if not accumulate and base.term != Num(0):
        beyond = _beyond(rows, target)
        if beyond is None and not _is_elsewhere(base.term, place_axis):
            return None
        value = beyond or value
    added = add_up(place_axis, times(condition, value, dtype), dtype)
    view = View((*rows.axes[:dim], *out, *rows.axes[dim + 1 :]), added)
    return view if base.term == Num(0) else _onto(base, view, dtype)


def _fresh(target: Value, dim: int) -> Axis:
    return (Atom(target.tensor.shape[dim], f"{target.name}.{dim}"),)


def _permuted(rows: View, mine: Pick, place: Atom, dim: int) -> View | None:
    """values[order] = rows: rows put back to where they came from."""
    if not isinstance(place, Sorted) or mine.atom is not place:
        return None
    element = Atom(place.size, f"{place.name}.back")
    term = substitute(rows.term, {place: Rank(Var(element), place)})
    return View((*rows.axes[:dim], (element,), *rows.axes[dim + 1 :]), term)


def _is_elsewhere(term: Term, place: Axis) -> bool:
    """Whether a sum of rows put at chosen tokens has none where `place` puts its own: other experts of one slot."""
    if len(place) != 1 or not (mine := _choice(place[0])):
        return False
    terms = term.terms if isinstance(term, Plus) else (term,)
    return all(
        isinstance(part, Sum)
        and len(part.over) == 1
        and (other := _choice(part.over[0])) is not None
        and other[0] is mine[0]
        and other[1] != mine[1]
        for part in terms
    )


def _choice(place: Atom) -> tuple[Value, Term] | None:
    """The ids that a selection compares with a number, where a token has one slot only."""
    if not isinstance(place, Chosen) or not isinstance(place.when, Same) or not isinstance(place.when.left, Leaf):
        return None
    ids = place.when.left
    if any(not isinstance(index, Var) and index != Num(0) for index in ids.at) or ids.free != frozenset(place.base):
        return None
    return (ids.value, place.when.right) if len(place.base) < 2 or len(ids.at) == len(place.base) == 1 else None


def _beyond(rows: View, target: Value) -> Term | None:
    """What rows hold beyond what the target has at the same places; None where they do not add to it."""
    if not isinstance(rows.term, Plus):
        return None
    rest = tuple(term for term in rows.term.terms if not (isinstance(term, Leaf) and term.value is target))
    if len(rest) != len(rows.term.terms) - 1:
        return None
    return rest[0] if len(rest) == 1 else Plus(rest, rows.term.dtype)
