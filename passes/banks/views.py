"""Ops that only arrange elements: reshapes, permutations, slices, stacks."""

from __future__ import annotations

from collections.abc import Sequence

from sparsec.ir.core import Op
from sparsec.ir.types import Dim, Sym
from sparsec.passes.banks.read import Reader, index_of, reads, size_of
from sparsec.passes.banks.rollup import rolled
from sparsec.passes.banks.sorting import chunk_of, joined, sizes_of
from sparsec.passes.banks.substitute import moved, simplify, substitute
from sparsec.passes.banks.terms import (
    Affine,
    Atom,
    Axis,
    Leaf,
    Num,
    Term,
    Var,
    View,
)
from sparsec.passes.rules import attr, same_size


@reads("aten.clone", "aten.contiguous", "aten.alias", "aten.detach", "aten.lift_fresh_copy")
def same(reader: Reader, op: Op) -> View:
    return reader[op.operands[0]]


@reads("aten.reshape", "aten.view", "aten._unsafe_view", "aten.flatten.using_ints", "aten.unflatten.int")
def reshape(reader: Reader, op: Op) -> View | None:
    view = reader[op.operands[0]]
    return regrouped(view, op.results[0].tensor.shape)


def regrouped(view: View, shape: Sequence[Dim]) -> View | None:
    """A view with its atoms grouped to axes of other sizes; an atom is split where it must be."""
    atoms = [atom for axis in view.axes for atom in axis]
    changes, axes = dict[Atom, Term](), list[Axis]()
    todo = list(shape)
    while todo:
        size = todo.pop(0)
        if size == 1:
            axes.append(())
            continue
        count = next(
            (n for n in range(1, len(atoms) + 1) if same_size(tuple(atom.size for atom in atoms[:n]), (size,))), None
        )
        if count is not None:
            axes.append(tuple(atoms[:count]))
            del atoms[:count]
            continue
        if not atoms:
            return None
        # One atom must give several axes: the first of its new pieces is this axis.
        whole = atoms.pop(0)
        rest = next((n for n in range(1, len(todo) + 1) if same_size((whole.size,), (size, *todo[:n]))), None)
        if rest is None:
            return None
        pieces = [Atom(dim, f"{whole.name}.{i}") for i, dim in enumerate((size, *todo[:rest])) if dim != 1]
        changes[whole] = index_of(tuple(pieces))
        atoms[:0] = pieces
        todo.insert(0, size)
    if atoms:
        return None
    return View(tuple(axes), substitute(view.term, changes))


@reads("aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze")
def squeeze(reader: Reader, op: Op) -> View | None:
    return regrouped(reader[op.operands[0]], op.results[0].tensor.shape)


@reads("aten.unsqueeze")
def unsqueeze(reader: Reader, op: Op) -> View:
    axes = list(reader[op.operands[0]].axes)
    dim = int(attr(op, "dim"))
    axes.insert(dim if dim >= 0 else dim + len(axes) + 1, ())
    return View(tuple(axes), reader[op.operands[0]].term)


@reads("aten.permute", "aten.transpose.int", "aten.t", "aten.mT", "aten.numpy_T", "aten.movedim.int")
def permute(reader: Reader, op: Op) -> View | None:
    view, rank = reader[op.operands[0]], op.operands[0].tensor.rank
    order = list(range(rank))
    if op.name == "aten.permute":
        order = [int(dim) % rank for dim in attr(op, "dims")]
    elif op.name == "aten.transpose.int":
        a, b = int(attr(op, "dim0")) % rank, int(attr(op, "dim1")) % rank
        order[a], order[b] = b, a
    elif op.name == "aten.movedim.int":
        source, to = int(attr(op, "source")) % rank, int(attr(op, "destination")) % rank
        order.insert(to, order.pop(source))
    elif op.name == "aten.mT":
        order[-1], order[-2] = order[-2], order[-1]
    else:
        order.reverse()
    return View(tuple(view.axes[i] for i in order), view.term)


@reads("aten.expand", "aten.expand_as", "aten.repeat", "aten.tile")
def expand(reader: Reader, op: Op) -> View | None:
    """A new axis, or one of size 1, repeats; `repeat` puts its copies outside of what was there."""
    view, shape = reader[op.operands[0]], op.results[0].tensor.shape
    axes = list(((),) * (len(shape) - len(view.axes)) + view.axes)
    for i, dim in enumerate(shape):
        if dim == 1 or (axes[i] and (op.name.startswith("aten.expand") or same_size((size_of(axes[i]),), (dim,)))):
            continue
        if not axes[i]:
            axes[i] = (Atom(dim, f"{op.results[0].name}.{i}"),)
            continue
        times = attr(op, "repeats" if op.name == "aten.repeat" else "dims")
        if op.name not in ("aten.repeat", "aten.tile") or len(times) != len(shape):
            return None
        axes[i] = (Atom(times[i], f"{op.results[0].name}.{i}"), *axes[i])
    return View(tuple(axes), view.term)


@reads("aten.repeat_interleave.self_int")
def repeat_interleave(reader: Reader, op: Op) -> View | None:
    view, dim, times = reader[op.operands[0]], attr(op, "dim"), attr(op, "repeats")
    if not isinstance(dim, int) or not isinstance(times, int):
        return None
    axes = list(view.axes)
    if times != 1:
        axes[dim] = (*axes[dim], Atom(times, f"{op.results[0].name}.r"))
    return View(tuple(axes), view.term)


def sliced(view: View, dim: int, start: int, size: Dim, step: int, name: str) -> View | None:
    """Every step-th element from `start` on along an axis of one atom."""
    axis = view.axes[dim]
    if len(axis) != 1 or isinstance(size, Sym):
        return None
    axes = list(view.axes)
    if size == 1:
        axes[dim] = ()
        return moved(view, {axis[0]: Num(start)}, tuple(axes))
    piece = Atom(size, name)
    axes[dim] = (piece,)
    return moved(view, {axis[0]: simplify(Affine(Var(piece), step, start))}, tuple(axes))


@reads("aten.slice.Tensor", "aten.narrow")
def slice_(reader: Reader, op: Op) -> View | None:
    view, rank = reader[op.operands[0]], op.operands[0].tensor.rank
    dim = int(attr(op, "dim")) % rank
    start, step = attr(op, "start") or 0, attr(op, "step") if op.name == "aten.slice.Tensor" else 1
    before, after = op.operands[0].tensor.shape[dim], op.results[0].tensor.shape[dim]
    if same_size((before,), (after,)) and step == 1:
        return view
    if isinstance(after, Sym) or isinstance(start, Sym):
        return chunk_of(reader, view, dim, *sizes_of(start, attr(op, "end")))
    if not isinstance(start, int) or (start < 0 and not isinstance(before, int)):
        return None
    return sliced(view, dim, start % before if isinstance(before, int) else start, after, step, op.results[0].name)


@reads("aten.select.int")
def select(reader: Reader, op: Op) -> View | None:
    view, rank = reader[op.operands[0]], op.operands[0].tensor.rank
    dim, index = int(attr(op, "dim")) % rank, attr(op, "index")
    if not isinstance(index, int):
        return None
    if index < 0:
        size = op.operands[0].tensor.shape[dim]
        if not isinstance(size, int):
            return None
        index += size
    return selected(view, dim, index)


def selected(view: View, dim: int, index: int) -> View | None:
    axis = view.axes[dim]
    if len(axis) > 1:
        return None
    return moved(view, {axis[0]: Num(index)} if axis else {}, (*view.axes[:dim], *view.axes[dim + 1 :]))


@reads("aten.unbind.int")
def unbind(reader: Reader, op: Op) -> list[View | None]:
    view, rank = reader[op.operands[0]], op.operands[0].tensor.rank
    return [selected(view, int(attr(op, "dim")) % rank, i) for i in range(len(op.results))]


@reads("aten.split.Tensor", "aten.split_with_sizes", "aten.chunk")
def split(reader: Reader, op: Op) -> list[View | None]:
    view, rank = reader[op.operands[0]], op.operands[0].tensor.rank
    dim = int(attr(op, "dim")) % rank
    views, start = list[View | None](), list[Dim]()
    for result in op.results:
        size = result.tensor.shape[dim]
        if isinstance(size, Sym) or any(isinstance(item, Sym) for item in start):
            views.append(chunk_of(reader, view, dim, tuple(start), size))
        else:
            views.append(sliced(view, dim, sum(int(item) for item in start), size, 1, result.name))
        start.append(size)
    return views


@reads("aten.cat", "aten.concat", "aten.stack")
def cat(reader: Reader, op: Op) -> View | None:
    """Equal pieces on top of each other, or the chunks of a sorted list put together again."""
    values = [value for value in op.operands if value.tensor.shape != (0,)]
    views = [reader[value] for value in values]
    rank = op.results[0].tensor.rank
    dim = int(attr(op, "dim")) % rank
    if all(isinstance(view.term, Leaf) and not view.term.routed for view in views):
        return None  # parameters: the stack itself is the leaf
    if op.name == "aten.stack":
        views = [View((*view.axes[:dim], (), *view.axes[dim:]), view.term) for view in views]
    if all(not view.axes[dim] for view in views):
        atom = Atom(len(views), f"{op.results[0].name}.e")
        return rolled(views, dim, Var(atom), (atom,))
    return joined(views, dim)
