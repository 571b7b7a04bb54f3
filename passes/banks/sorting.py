"""Ops that group rows by expert: sorts, their inverses, counts, offsets, and rows cut into one chunk per expert."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sparsec.ir.core import Op, Value
from sparsec.ir.types import Dim, Sym, SymType
from sparsec.passes.banks.read import Reader, index_of, reads, size_of, taken_apart
from sparsec.passes.banks.rollup import rolled
from sparsec.passes.banks.substitute import moved, rebuilt, simplify, substitute
from sparsec.passes.banks.terms import (
    Affine,
    Atom,
    Chosen,
    Coord,
    Div,
    Mod,
    Num,
    Pick,
    Rank,
    Running,
    Same,
    Sorted,
    Sum,
    Term,
    Var,
    View,
)
from sparsec.passes.rules import attr, same_size


@reads("aten.sort", "aten.sort.stable", "aten.argsort", "aten.argsort.stable")
def sort(reader: Reader, op: Op) -> list[View | None] | None:
    """Values and places of a list of integers in ascending order."""
    view, result = reader[op.operands[0]], op.results[-1]
    if len(view.axes) != 1 or op.operands[0].tensor.dtype.is_float or attr(op, "descending") is True:
        return None
    if any(isinstance(atom, Sorted) for atom in view.axes[0]) and isinstance(view.term, Pick):
        return _inverse(view, result)
    rows = reader.atoms.setdefault(op, Sorted(size_of(view.axes[0]), f"{result.name}.row", view.axes[0], view.term))
    places = View(((rows,),), Pick(Var(rows), rows))
    return [View(((rows,),), sorted_key(rows, Var(rows))), places] if len(op.results) == 2 else [places]


def _inverse(view: View, result: Value) -> list[View | None]:
    """argsort(order): where each element went."""
    assert isinstance(view.term, Pick)
    atom = Atom(size_of(view.axes[0]), f"{result.name}.flat")
    return [View(((atom,),), Rank(Var(atom), view.term.atom))]


def sorted_key(rows: Sorted, place: Term) -> Term:
    """The value that a sorted list has at a place."""
    return substitute(rows.key, taken_apart(rows.base, simplify(Pick(place, rows))))


@reads("aten.floor_divide.Scalar", "aten.floor_divide", "aten.div.Tensor_mode", "aten.div.Scalar_mode",
       "aten.remainder.Scalar", "aten.fmod.Scalar")  # fmt: skip
def divide(reader: Reader, op: Op) -> View | None:
    """Pair number // k and pair number % k."""
    view = reader[op.operands[0]]
    by: object = attr(op, "other")
    if len(op.operands) == 2:
        other = reader[op.operands[1]].term
        by = other.value if isinstance(other, Num) else None
    if op.results[0].tensor.dtype.is_float or not isinstance(by, int | Sym) or by == 0:
        return None
    cls = Mod if op.name in ("aten.remainder.Scalar", "aten.fmod.Scalar") else Div
    return View(view.axes, simplify(cls(view.term, by)))


@reads("aten.arange", "aten.arange.start", "aten.arange.start_step")
def arange(reader: Reader, op: Op) -> View | None:
    start, step = attr(op, "start") or 0, attr(op, "step") if op.name == "aten.arange.start_step" else 1
    if not isinstance(start, int) or not isinstance(step, int) or op.results[0].tensor.dtype.is_float:
        return None
    atom = Atom(op.results[0].tensor.shape[0], f"{op.results[0].name}.0")
    if atom.size == 1:
        return View(((),), Num(start))
    return View(((atom,),), simplify(Affine(Var(atom), step, start)))


@reads("aten.histc", "aten.bincount")
def count(reader: Reader, op: Op) -> View | None:
    """How often each of 0, 1, 2 ... occurs."""
    view, bins = reader[op.operands[0]], op.results[0].tensor.shape[0]
    if op.name == "aten.histc" and (attr(op, "min") not in (0, None) or attr(op, "max") != int(bins) - 1):
        return None
    if len(op.operands) != 1 or (not view.term.routed and not view.term.free):
        return None
    atom = Atom(bins, f"{op.results[0].name}.e")
    over = tuple(piece for axis in view.axes for piece in axis)
    return View(((atom,),), Sum(over, Same(view.term, Var(atom)), op.results[0].tensor.dtype))


@reads("aten.cumsum")
def running(reader: Reader, op: Op) -> View | None:
    view, rank = reader[op.operands[0]], op.operands[0].tensor.rank
    dim = int(attr(op, "dim")) % rank
    if not view.axes[dim] or not view.term.routed:
        return None
    axis = view.axes[dim]
    inner = tuple(Atom(atom.size, atom.name + "~") for atom in axis)
    body = substitute(view.term, {a: Var(b) for a, b in zip(axis, inner, strict=True)})
    return View(view.axes, Running(inner, body, index_of(axis)))


@reads("aten.item", "aten._local_scalar_dense")
def item(reader: Reader, op: Op) -> None:
    """Remembers which of which counts a size is."""
    source, kind = op.operands[0].op, op.results[0].type
    if source is None or not isinstance(kind, SymType) or source.name not in ("aten.unbind.int", "aten.select.int"):
        return
    index = op.operands[0].index if source.name == "aten.unbind.int" else attr(source, "index")
    view = reader[source.operands[0]]
    if len(view.axes) == 1 and isinstance(index, int):
        reader.counted[kind.expr] = (view, index)


def is_count(view: View, rows: Sorted) -> bool:
    """Whether `view`, of one axis, says how often each number occurs in the list that `rows` sorts."""
    if len(view.axes) != 1 or len(view.axes[0]) != 1 or not isinstance(view.term, Sum):
        return False
    (number,) = view.axes[0]
    counted = in_base(view.term, rows)
    return counted is not None and counted == Same(rows.key, Var(number))


def in_base(sum_: Sum, rows: Sorted) -> Term | None:
    """The body of a sum over all elements of a list, written over the base atoms of `rows`; None for another list."""
    over, body = sum_.over, sum_.body
    if len(over) == 1 and isinstance(over[0], Sorted):
        sorted_ = over[0]
        if sorted_.key != rows.key:
            return None
        element = Var(Atom(sorted_.size, "pair"))
        body = substitute(body, {sorted_: simplify(Rank(element, sorted_))})
        return substitute(body, {element.atom: index_of(rows.base)})
    if set(over) == set(rows.base):
        return body
    if not same_size([atom.size for atom in over], [atom.size for atom in rows.base]):
        return None
    if len(over) == 1:
        return substitute(body, {over[0]: index_of(rows.base)})
    if len(over) != len(rows.base):
        return None
    return substitute(body, {a: Var(b) for a, b in zip(over, rows.base, strict=True)})


def ends_groups(view: View, rows: Sorted) -> bool:
    """Whether `view` holds, for each number, where its group ends in the list that `rows` sorts."""
    if not isinstance(view.term, Running) or len(view.axes) != 1 or len(view.axes[0]) != 1:
        return False
    run = view.term
    return run.at == Var(view.axes[0][0]) and is_count(View((run.over,), run.body), rows)


def sizes_of(start: object, end: object) -> tuple[Sequence[Dim], Dim]:
    """Which sizes lie in front of a slice, and its own: `u0 + u1` to `u0 + u1 + u2`."""
    before, until = ([Sym(name) for name in _SIZE.findall(str(place))] for place in (start, end))
    return until[:-1], until[-1] if until and before == until[:-1] else 0


_SIZE = re.compile(r"u\d+")


def chunk_of(reader: Reader, view: View, dim: int, start: Sequence[Dim], size: Dim) -> View | None:
    """The rows of one expert in a list sorted by expert, cut out by counts that are known at run time."""
    axis = view.axes[dim]
    known = [reader.counted.get(item) if isinstance(item, Sym) else None for item in (*start, size)]
    if len(axis) != 1 or not isinstance(axis[0], Sorted) or any(item is None for item in known):
        return None
    counts = [item for item in known if item is not None]
    if [number for _, number in counts] != list(range(len(counts))) or any(c is not counts[0][0] for c, _ in counts):
        return None
    rows, expert = axis[0], len(start)
    if not is_count(counts[0][0], rows):
        return None
    when = Same(sorted_key(rows, Var(rows)), Num(expert))
    chunk = reader.atoms.setdefault((rows, expert), Chosen(size, f"{rows.name}.{expert}", (rows,), when))
    return moved(view, {rows: Coord(Var(chunk), rows)}, (*view.axes[:dim], (chunk,), *view.axes[dim + 1 :]))


def joined(views: Sequence[View], dim: int) -> View | None:
    """All chunks of a sorted list, put together again: row by row what its expert's chunk holds."""
    chunks = [view.axes[dim][0] for view in views if len(view.axes[dim]) == 1]
    chosen = [chunk for chunk in chunks if isinstance(chunk, Chosen)]
    if len(chosen) != len(views) or len({chunk.base for chunk in chosen}) != 1 or len(chosen[0].base) != 1:
        return None
    rows = chosen[0].base[0]
    numbers = [chunk.when.right for chunk in chosen if isinstance(chunk.when, Same)]
    if not isinstance(rows, Sorted) or numbers != [Num(i) for i in range(len(views))]:
        return None
    whole = [
        View(view.axes, placed(view.term, chunk, {rows: Var(rows)})) for view, chunk in zip(views, chosen, strict=True)
    ]
    return rolled(whole, dim, sorted_key(rows, Var(rows)), (rows,))


def placed(term: Term, chunk: Chosen, base: dict[Atom, Term]) -> Term:
    """A term over a chosen place, over the base atoms that the place stands for."""
    if chunk not in term.free:
        return term
    if isinstance(term, Coord) and term.place == Var(chunk):
        return base[term.base]
    return rebuilt(term, lambda part: placed(part, chunk, base))
